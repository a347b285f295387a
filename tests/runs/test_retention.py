"""Which checkpoints are kept."""

from hypothesis import given
from hypothesis import strategies as st

from crcjax.runs.retention import Retention, rank, steps_to_keep

METRICS = {
    10: {"balanced_accuracy": 0.9, "loss": 0.9, "tissue_accuracy": 0.1},
    20: {"balanced_accuracy": 0.5, "loss": 0.3, "tissue_accuracy": 0.8},
    30: None,
    40: {"balanced_accuracy": 0.6, "loss": 0.5, "tissue_accuracy": 0.8},
    50: {"balanced_accuracy": 0.4, "loss": 0.8},
    60: None,
}


def test_the_newest_the_best_by_each_metric_and_every_l_th_are_kept() -> None:
    assert steps_to_keep(METRICS, Retention(newest=1, best=1)) == {60, 10}
    assert steps_to_keep(METRICS, Retention(newest=2, best=2)) == {50, 60, 10, 40}
    # The lowest loss; the highest accuracy, of equal ones the newer.
    assert steps_to_keep(METRICS, Retention(1, 1, ("loss", "tissue_accuracy"))) == {60, 10, 20, 40}
    assert steps_to_keep(METRICS, Retention(1, 1, every=30)) == {60, 10, 30}


_ONE = st.none() | st.fixed_dictionaries({"balanced_accuracy": st.floats(0, 1), "loss": st.floats(0, 9)})


@given(st.dictionaries(st.integers(1, 99), _ONE, min_size=1), st.integers(1, 5), st.integers(1, 5), st.integers(0, 20))
def test_the_newest_and_the_checkpoint_that_predicts_are_always_kept(
    metrics: dict, newest: int, best: int, every: int
) -> None:
    keep = steps_to_keep(metrics, Retention(newest, best, ("loss",), every))
    evaluated = [step for step in metrics if metrics[step]]
    assert keep <= set(metrics)
    assert set(sorted(metrics)[-newest:]) <= keep
    if evaluated:
        assert max(evaluated, key=lambda step: (rank(metrics[step]), step)) in keep
    assert len(keep) <= newest + 2 * best + (99 // every if every else 0)
