"""The time between checkpoints: Daly's optimum, the failures of a run, and whole runs that save by the clock."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.config import get_config
from crcjax.models.mil import build_model
from crcjax.monitor.goodput import Attempt
from crcjax.parallel.process_group import ProcessGroup
from crcjax.runs.checkpoint import restore_params
from crcjax.runs.checkpoint_folder import finished_steps
from crcjax.train.loop import train
from crcjax.train.record import due_after
from crcjax.train.save_interval import AUTO, SaveTimer, measured_mtbf_s, optimal_interval_s

DAY_S = 86_400.0


class Clock:
    """A clock that a test sets."""

    time_s = 0.0

    def __call__(self) -> float:
        return self.time_s


def _timer(clock: Clock, minutes: float = AUTO, *, mtbf_s: float = DAY_S, shares_cores: bool = False) -> SaveTimer:
    return SaveTimer(minutes, lambda: mtbf_s, shares_cores, clock)


@pytest.mark.parametrize("save_s", [0.01, 1.0, 30.0, 600.0])
@pytest.mark.parametrize("mtbf_s", [600.0, 3600.0, DAY_S])
def test_no_interval_takes_less_time_in_expectation_than_the_optimal_one(save_s: float, mtbf_s: float) -> None:
    def expected_time(interval_s):
        # For exponentially distributed failures: the expected time per second of training, up to a factor.
        return np.expm1((interval_s + save_s) / mtbf_s) / interval_s

    others_s = np.geomspace(1e-3, 10.0 * mtbf_s, 20_000)
    assert expected_time(optimal_interval_s(save_s, mtbf_s)) <= 1.001 * expected_time(others_s).min()


def test_the_optimum_is_youngs_for_cheap_saves_and_the_time_between_failures_for_very_dear_ones() -> None:
    assert optimal_interval_s(1e-3, DAY_S) == pytest.approx(np.sqrt(2e-3 * DAY_S), rel=1e-3)
    assert optimal_interval_s(3 * DAY_S, DAY_S) == DAY_S


def _attempt(start: int, last: int, hours: float) -> Attempt:
    return Attempt(0.0, start, last, {"steps": hours * 1800.0, "start": hours * 1800.0})


def test_attempts_that_lost_steps_are_failures_and_a_preemption_is_none() -> None:
    assert measured_mtbf_s([_attempt(0, 10, 6.0)]) == 30 * 3600
    preempted = [_attempt(0, 10, 6.0), _attempt(10, 20, 6.0)]
    assert measured_mtbf_s(preempted) == 36 * 3600
    failed = [*preempted, _attempt(15, 30, 6.0), _attempt(25, 40, 6.0)]
    assert measured_mtbf_s(failed) == 48 * 3600 / 3


def test_a_save_is_due_an_interval_after_the_last_one_whatever_made_it() -> None:
    clock = Clock()
    timer = _timer(clock, 2.0)
    clock.time_s = 119.0
    assert not timer.is_due()
    clock.time_s = 120.0
    assert timer.is_due()
    timer.saved(40, 0.1, 0.0)
    assert not timer.is_due()
    clock.time_s = 240.0
    assert timer.is_due()
    timer.start()
    assert not timer.is_due()


def test_without_minutes_no_save_is_ever_due() -> None:
    clock = Clock()
    timer = _timer(clock, 0.0)
    clock.time_s = 1e9
    assert not timer.is_due()


@pytest.mark.parametrize(("shares_cores", "cost_s"), [(False, 0.5), (True, 4.5)])
def test_the_interval_follows_from_the_median_cost_and_on_shared_cores_writing_is_a_cost(
    shares_cores: bool, cost_s: float
) -> None:
    timer = _timer(Clock(), shares_cores=shares_cores)
    assert timer.interval_s == optimal_interval_s(1.0, DAY_S)
    for step, waited_s in ((1, 0.5), (2, 0.4), (3, 60.0), (4, 0.5), (5, 0.45)):
        timer.saved(step, waited_s, 4.0)
    assert timer.interval_s == pytest.approx(optimal_interval_s(cost_s, DAY_S))


def test_the_saves_of_the_members_of_an_ensemble_cost_their_sum() -> None:
    timer = _timer(Clock())
    for _ in range(4):
        timer.saved(10, 0.5, 0.0)
    assert timer.interval_s == optimal_interval_s(2.0, DAY_S)


def test_no_save_is_due_before_the_disk_can_have_finished_the_last_one() -> None:
    timer = _timer(Clock(), mtbf_s=600.0)
    timer.saved(10, 0.01, 400.0)
    assert timer.interval_s == 400.0


def test_the_clock_of_process_0_decides_for_all_processes_and_only_at_reports() -> None:
    late, early = _timer(Clock(), 1e-9), _timer(Clock(), 1e9)
    late._now.time_s = 60.0
    config = get_config().train

    class Process1(ProcessGroup):
        """Process 1 of two; `of_process_0` is the value of the other."""

        of_process_0 = 0.0

        def __init__(self) -> None:
            super().__init__()
            self.is_main = False

        def maximum(self, value: float) -> float:
            return max(value, self.of_process_0)

    assert due_after(10, config, False, late, ProcessGroup()).checkpoint
    process_1 = Process1()
    assert not due_after(10, config, False, late, process_1).checkpoint
    process_1.of_process_0 = 1.0
    assert due_after(10, config, False, early, process_1).checkpoint
    assert not due_after(9, config, False, late, process_1).checkpoint
    assert replace(due_after(10, config, False, late, ProcessGroup()), checkpoint=False) == due_after(
        10, config, False, early, ProcessGroup()
    )


def test_a_run_that_saves_by_the_clock_has_the_history_and_the_bits_of_one_that_does_not(
    small_config, tmp_path: Path
) -> None:
    small_config.train.steps, small_config.train.eval_every, small_config.train.log_every = 5, 5, 2
    small_config.train.checkpoint_every, small_config.train.keep_newest = 1000, 3
    by_clock, by_steps = tmp_path / "clock", tmp_path / "steps"
    small_config.train.checkpoint_minutes = 1e-9
    train(small_config, by_clock)
    small_config.train.checkpoint_minutes = 0.0
    train(small_config, by_steps)
    assert (finished_steps(by_clock), finished_steps(by_steps)) == ([2, 4, 5], [5])
    model = build_model(small_config.model, 3, 0)
    params = [jax.tree.leaves(restore_params(run, model)[0]) for run in (by_clock, by_steps)]
    assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(*params, strict=True))
    losses = [
        [line.get("train/loss") for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())]
        for run in (by_clock, by_steps)
    ]
    assert losses[0] == losses[1]
