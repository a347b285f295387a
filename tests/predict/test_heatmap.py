import numpy as np

from crcjax.predict.heatmap import attention_rank, overlay


def test_ranks_span_zero_to_one_and_ties_share() -> None:
    np.testing.assert_allclose(attention_rank(np.array([0.1, 0.4, 0.2])), [0, 1, 0.5])
    np.testing.assert_allclose(attention_rank(np.array([0.2, 0.2, 0.2])), [0.5, 0.5, 0.5])
    assert attention_rank(np.array([1.0])).tolist() == [0.0]


def test_a_known_hot_region_is_coloured_where_it_lies_and_nowhere_else() -> None:
    size, region = (4096, 2048), 256.0
    origin = np.array([[x, y] for y in range(0, 2048, 256) for x in range(0, 4096, 256)], np.int32)
    attention = np.zeros(len(origin))
    hot = int(np.flatnonzero((origin == (1024, 512)).all(axis=1))[0])
    attention[hot] = 1.0
    thumbnail = np.full((500, 1000, 3), 255, np.uint8)
    picture = overlay(thumbnail, origin, region, attention, size).astype(int)
    cold = picture[2, 2]
    rows, columns = np.nonzero(np.abs(picture - cold).sum(axis=-1) > 30)
    scale = 1000 / 4096
    assert abs(columns.min() - 1024 * scale) <= 1
    assert abs(columns.max() + 1 - 1280 * scale) <= 1
    assert abs(rows.min() - 512 * scale) <= 1
    assert abs(rows.max() + 1 - 768 * scale) <= 1
