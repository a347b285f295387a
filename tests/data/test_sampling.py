from collections import Counter

import numpy as np
import pytest

from crcjax.data.sampling import hardness, mined_places, sample_regions, sample_slides, slide_weights, spread_cells

LABELS = np.array([0] * 10 + [1] * 3 + [2] * 5)


def test_every_class_is_sampled_equally_often_and_every_slide_of_a_class_once_per_round() -> None:
    sampled = np.concatenate([sample_slides(LABELS, 7, step, 6) for step in range(30)])
    assert Counter(LABELS[sampled].tolist()) == {0: 60, 1: 60, 2: 60}
    of_class = [slide for slide in sampled.tolist() if LABELS[slide] == 0]
    for start in range(0, 60, 10):
        assert sorted(of_class[start : start + 10]) == list(range(10))


def test_a_steps_sample_does_not_depend_on_earlier_samples() -> None:
    assert (sample_slides(LABELS, 7, 12, 6) == sample_slides(LABELS, 7, 12, 6)).all()
    assert not (sample_slides(LABELS, 7, 12, 6) == sample_slides(LABELS, 8, 12, 6)).all()


def test_sampled_regions_are_distinct_have_tiles_and_are_all_regions_of_a_small_slide() -> None:
    mask = np.ones((40, 2), bool)
    mask[::2] = False
    sampled = sample_regions(mask, 0, 3, 1, 12)
    assert len(set(sampled.tolist())) == 12
    assert (sampled % 2 == 1).all()
    assert sample_regions(mask, 0, 3, 1, 30).tolist() == list(range(1, 40, 2))


def test_sampling_times_weight_counts_each_class_by_its_effective_number() -> None:
    counts = np.bincount(LABELS)
    for beta in (0.9, 0.99):
        expected = counts / ((1 - beta**counts) / (1 - beta))
        actual = np.array([slide_weights(LABELS, beta)[k == LABELS][0] for k in range(3)])
        np.testing.assert_allclose(actual, expected / expected.mean(), rtol=1e-6)
    assert (slide_weights(LABELS, 1.0) == 1).all()
    np.testing.assert_allclose(slide_weights(LABELS, 0.0)[[0, 10]], np.array([10, 3]) / 6, rtol=1e-6)


def test_sites_of_a_class_are_sampled_equally_often_over_a_round() -> None:
    labels = np.array([0] * 12 + [1] * 9)
    sites = np.array([0] * 8 + [1] * 3 + [2] + [0] * 6 + [2] * 3)  # class 1 has no slide of site 1
    sampled = np.concatenate([sample_slides(labels, 3, step, 4, sites=sites) for step in range(36)])
    counts = Counter(zip(labels[sampled].tolist(), sites[sampled].tolist(), strict=True))
    assert counts == {(0, 0): 24, (0, 1): 24, (0, 2): 24, (1, 0): 36, (1, 2): 36}
    of_site = [slide for slide in sampled.tolist() if labels[slide] == 0 and sites[slide] == 0]
    assert all(sorted(of_site[start : start + 8]) == list(range(8)) for start in range(0, 24, 8))


def test_mined_slides_are_sampled_by_their_loss_within_the_fraction_and_classes_stay_balanced() -> None:
    losses = np.full(18, 0.01, np.float32)
    losses[[2, 11, 14]] = 3.0  # one of each class
    plain = np.concatenate([sample_slides(LABELS, 7, step, 8) for step in range(300)])
    mined = np.concatenate(
        [sample_slides(LABELS, 7, step, 8, losses=losses, mined_fraction=0.25) for step in range(300)]
    )
    places = np.concatenate([mined_places(step, 8, 0.25) for step in range(300)])
    assert places.sum() == 600
    assert np.isin(mined[places], [2, 11, 14]).mean() > 0.95
    assert (mined[~places] == plain[:1800]).all()
    assert Counter(LABELS[mined].tolist()) == {0: 800, 1: 800, 2: 800}


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_the_mined_fraction_is_not_exceeded_up_to_any_step(share: float) -> None:
    places = np.concatenate([mined_places(step, 4, share) for step in range(100)])
    total = np.cumsum(places)
    assert (total <= share * np.arange(1, 401) + 1e-6).all()
    assert total[-1] == round(share * 400)


def test_a_slide_of_unknown_loss_is_as_hard_as_the_mean() -> None:
    losses = np.array([1.0, -1.0, 3.0, -1.0], np.float32)
    assert hardness(losses, np.arange(4)).tolist() == [1.0, 2.0, 3.0, 2.0]
    assert hardness(np.full(4, -1.0, np.float32), np.arange(4)).tolist() == [1.0] * 4


def _grid(side: int) -> tuple[np.ndarray, np.ndarray]:
    origin = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)
    return np.ones((side * side, 1), bool), origin


def test_spread_regions_are_further_apart_than_uniform_ones_and_every_region_is_sampled_equally_often() -> None:
    mask, origin = _grid(24)
    mask[::7] = False
    cells, even = spread_cells(mask, origin, 12), np.ones(len(mask))
    assert sorted(np.bincount(cells[cells >= 0]))[0] >= mask.sum() // 12 - 1
    nearest, times = {True: [], False: []}, np.zeros(len(mask))
    for step in range(1500):
        for spread in (True, False):
            given = {"cells": cells, "tissue": even} if spread else {}
            sampled = sample_regions(mask, 0, step, 0, 12, **given)
            assert len(set(sampled.tolist())) == 12
            assert mask[sampled].all()
            times[sampled] += spread
            apart = np.linalg.norm(origin[sampled][:, None] - origin[sampled], axis=-1) + 1e9 * np.eye(12)
            nearest[spread].append(apart.min(axis=1).mean())
    assert np.mean(nearest[True]) > 1.2 * np.mean(nearest[False])
    expected = 1500 * 12 / mask.sum()
    assert abs(times[mask[:, 0]] - expected).max() < 5 * expected**0.5  # five standard deviations


def test_within_a_cell_regions_are_sampled_in_proportion_to_their_tissue() -> None:
    mask, origin = _grid(16)
    tissue = np.where(np.arange(256) % 2, 0.75, 0.25)
    cells = spread_cells(mask, origin, 8)
    sampled = np.concatenate([sample_regions(mask, 0, step, 0, 8, cells=cells, tissue=tissue) for step in range(500)])
    assert abs((sampled % 2).mean() - 0.75) < 0.03


def test_mined_regions_are_shown_and_other_regions_fill_the_bag() -> None:
    mask, origin = _grid(16)
    mask[40] = False
    cells, mined = spread_cells(mask, origin, 10), np.array([5, 40, -1, 200])
    for given in ({}, {"cells": cells, "tissue": np.ones(256)}):
        sampled = sample_regions(mask, 0, 1, 0, 10, mined=mined, **given)
        assert len(set(sampled.tolist())) == 10
        assert {5, 200} <= set(sampled.tolist())
        assert mask[sampled].all()
    assert len(set(cells[sampled].tolist())) == 10
    assert (sample_regions(mask, 0, 1, 0, 10, mined=mined) == sample_regions(mask, 0, 1, 0, 10, mined=mined)).all()
