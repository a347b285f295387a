import statistics

import numpy as np
import pytest

from crcjax.monitor.spikes import robust_z


def test_of_normal_values_it_is_the_usual_z_score() -> None:
    history = np.random.default_rng(0).normal(3.0, 2.0, 20_000).tolist()
    assert robust_z(7.0, history) == pytest.approx(2.0, abs=0.05)
    assert robust_z(1.0, history) == pytest.approx(-1.0, abs=0.05)


def test_outliers_of_the_history_hardly_change_it() -> None:
    history = np.random.default_rng(0).normal(0.0, 1.0, 999).tolist()
    clean = robust_z(10.0, history)
    dirty = robust_z(10.0, history + [1e6] * 100)
    assert 0.7 * clean < dirty < clean
    plain = (10.0 - statistics.mean(history + [1e6] * 100)) / statistics.stdev(history + [1e6] * 100)
    assert plain < 0


def test_shift_and_scale_of_all_values_do_not_change_it() -> None:
    history = np.random.default_rng(1).normal(size=51).tolist()
    assert robust_z(5.0 * 3.0 + 2.0, [5.0 * value + 2.0 for value in history]) == pytest.approx(robust_z(3.0, history))


def test_a_small_change_of_a_constant_history_is_no_outlier() -> None:
    assert robust_z(1.01, [1.0] * 30, min_deviation=0.05) == pytest.approx(0.2)
    assert robust_z(1.01, [1.0] * 30) > 1e6


def test_without_a_history_there_is_no_score() -> None:
    with pytest.raises(statistics.StatisticsError):
        robust_z(1.0, [])
