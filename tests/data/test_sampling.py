from collections import Counter

import numpy as np

from crcjax.data.sampling import draw_regions, draw_slides, slide_weights

LABELS = np.array([0] * 10 + [1] * 3 + [2] * 5)


def test_every_class_is_drawn_alike_and_every_slide_of_a_class_once_a_round() -> None:
    drawn = np.concatenate([draw_slides(LABELS, 7, step, 6) for step in range(30)])
    assert Counter(LABELS[drawn].tolist()) == {0: 60, 1: 60, 2: 60}
    of_class = [slide for slide in drawn.tolist() if LABELS[slide] == 0]
    for start in range(0, 60, 10):
        assert sorted(of_class[start : start + 10]) == list(range(10))


def test_a_step_is_the_same_whether_others_were_drawn_before() -> None:
    assert (draw_slides(LABELS, 7, 12, 6) == draw_slides(LABELS, 7, 12, 6)).all()
    assert not (draw_slides(LABELS, 7, 12, 6) == draw_slides(LABELS, 8, 12, 6)).all()


def test_regions_are_different_filled_and_all_when_few() -> None:
    mask = np.ones((40, 2), bool)
    mask[::2] = False
    drawn = draw_regions(mask, 0, 3, 1, 12)
    assert len(set(drawn.tolist())) == 12
    assert (drawn % 2 == 1).all()
    assert draw_regions(mask, 0, 3, 1, 30).tolist() == list(range(1, 40, 2))


def test_drawing_times_weight_counts_each_class_by_its_effective_number() -> None:
    counts = np.bincount(LABELS)
    for beta in (0.9, 0.99):
        wanted = counts / ((1 - beta**counts) / (1 - beta))
        found = np.array([slide_weights(LABELS, beta)[k == LABELS][0] for k in range(3)])
        np.testing.assert_allclose(found, wanted / wanted.mean(), rtol=1e-6)
    assert (slide_weights(LABELS, 1.0) == 1).all()
    np.testing.assert_allclose(slide_weights(LABELS, 0.0)[[0, 10]], np.array([10, 3]) / 6, rtol=1e-6)
