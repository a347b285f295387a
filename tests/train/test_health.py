"""Decisions about steps that go wrong, and whole runs with planted faults."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.config import get_config
from crcjax.data.cohort import load_cohort
from crcjax.errors import DivergedError, StoppedError
from crcjax.models.mil import build_model
from crcjax.monitor.event_log import EventLog, read_events, verify
from crcjax.monitor.goodput import read_goodput
from crcjax.parallel.process_group import ProcessGroup
from crcjax.runs.checkpoint import restore_params
from crcjax.runs.run_directory import open_run
from crcjax.train.health import (
    DEAD_ATTENTION,
    DIVERGED,
    EVENTS,
    LEFT_OUT,
    LOSS_SPIKE,
    NO_VALIDATION,
    STUCK,
    WENT_BACK,
    Health,
    WentWrongError,
)
from crcjax.train.loop import train
from crcjax.train.recompute import Recomputation


@pytest.fixture
def health(tmp_path: Path) -> Health:
    return _health(tmp_path)


def _health(run: Path, **fields: object) -> Health:
    config = get_config()
    config.data.batch_size = 4
    for name, value in fields.items():
        config.health[name] = value
    watched = Health(run, config, 3, EventLog(run / EVENTS).append)
    watched.name_bags(lambda step: [f"slide-{step}-{bag}" for bag in range(4)])
    return watched


def _watch(health: Health, step: int, updated: bool = True) -> None:
    values = {"updated": float(updated), "loss": 1.0 if updated else np.nan, "gradient_norm": 0.5, "worst_bag": 2.0}
    health.watch(step, {name: jax.device_put(np.float32(value)) for name, value in values.items()})


def _report(health: Health, step: int, loss: float, accuracy: float = 0.9, entropy: float = 0.7) -> None:
    health.check_report(step, {"loss": loss, "accuracy": accuracy, "attention_entropy": entropy})


def _kinds(run: Path) -> list[str]:
    assert verify(run / EVENTS) is None
    return [event.kind for event in read_events(run / EVENTS)]


def test_a_step_that_was_left_out_is_an_event_that_names_its_bags(health: Health, tmp_path: Path) -> None:
    for step in range(1, 6):
        _watch(health, step, updated=step != 4)
    health.check_steps()
    assert health.is_good
    (event,) = read_events(tmp_path / EVENTS)
    assert event.kind == LEFT_OUT
    assert event.facts == {
        "step": 4, "loss": "nan", "gradient_norm": 0.5, "bags": [f"slide-4-{bag}" for bag in range(4)],
        "bag_of_largest_loss": "slide-4-2", "done": "the step was left out",
    }  # fmt: skip


def test_after_several_left_out_steps_in_series_the_run_goes_back_also_across_two_checks(health: Health) -> None:
    for step in range(1, 9):
        _watch(health, step, updated=step < 4)
        if step == 6:
            health.check_steps()
            assert not health.is_good
    with pytest.raises(WentWrongError) as caught:
        health.check_steps()
    assert (caught.value.kind, caught.value.first, caught.value.last) == (LEFT_OUT, 4, 8)


def test_a_run_does_not_end_with_a_step_that_was_left_out(health: Health) -> None:
    _watch(health, 1)
    _watch(health, 2, updated=False)
    with pytest.raises(WentWrongError):
        health.check_steps(is_last=True)


def test_a_loss_spike_makes_the_run_go_back_and_ordinary_scatter_does_not(health: Health, tmp_path: Path) -> None:
    losses = np.random.default_rng(0).normal(0.6, 0.15, 60)
    for number, loss in enumerate(losses, 1):
        _report(health, 10 * number, float(loss))
    with pytest.raises(WentWrongError, match=r"the loss rose from a median of 0.6") as caught:
        _report(health, 610, 3.0)
    assert (caught.value.kind, caught.value.first, caught.value.last) == (LOSS_SPIKE, 601, 610)
    assert _kinds(tmp_path) == [LOSS_SPIKE]


def test_a_small_rise_of_a_loss_that_was_almost_zero_is_no_spike(health: Health) -> None:
    for number in range(1, 60):
        _report(health, 10 * number, 1e-4)
    _report(health, 600, 0.3)


def test_attention_that_dies_makes_the_run_go_back_and_attention_that_never_lived_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "died").mkdir()
    died = _health(tmp_path / "died")
    for number in range(1, 4):
        _report(died, 10 * number, 1.0)
    with pytest.raises(WentWrongError, match="all regions have the same attention") as caught:
        _report(died, 40, 1.0, entropy=1.0)
    assert (caught.value.kind, caught.value.first, caught.value.last) == (DEAD_ATTENTION, 31, 40)
    never = _health(tmp_path)
    for number in range(1, 40):
        _report(never, 10 * number, 1.0, entropy=0.0)
    assert _kinds(tmp_path) == [DEAD_ATTENTION]


def test_a_loss_that_no_longer_moves_with_the_accuracy_of_guessing_is_one_warning(tmp_path: Path) -> None:
    stuck = _health(tmp_path, stuck_reports=30)
    for number in range(1, 45):
        _report(stuck, 10 * number, 1.1, accuracy=1 / 3)
    assert _kinds(tmp_path) == [STUCK]
    for path, loss, accuracy in (("falls", 0.99, 1 / 3), ("converged", 1.0, 0.95)):
        (tmp_path / path).mkdir()
        moves = _health(tmp_path / path, stuck_reports=30)
        for number in range(1, 45):
            _report(moves, 10 * number, 1.1 * loss**number, accuracy=accuracy)
        assert _kinds(tmp_path / path) == []


def test_the_run_goes_back_before_the_first_bad_step_and_further_if_the_next_bags_fail_too(
    health: Health, tmp_path: Path
) -> None:
    first = WentWrongError(LEFT_OUT, 53, 57, "not finite")
    assert health.first_suspect(first, [40, 50]) == 53
    health.went_back(first, to_step=50)
    assert health.passed_over == frozenset(range(53, 58))
    # The same parameters fail with other bags: the checkpoint itself is suspect, and so are the steps before it.
    again = WentWrongError(LEFT_OUT, 58, 62, "not finite")
    assert health.first_suspect(again, [40, 50]) == 50
    with pytest.raises(DivergedError, match=r"after going back 1 time: not finite"):
        health.first_suspect(again, [50])
    health.went_back(again, to_step=40)
    assert health.passed_over == frozenset(range(41, 63))
    assert _health(tmp_path).passed_over == health.passed_over
    assert _kinds(tmp_path) == [WENT_BACK, DIVERGED, WENT_BACK]
    assert "slide-53-0" in read_events(tmp_path / EVENTS)[0].facts["bags"]


def test_a_run_whose_last_steps_all_go_wrong_after_its_last_checkpoint_has_diverged(tmp_path: Path) -> None:
    health = _health(tmp_path)
    assert health.first_suspect(WentWrongError(LEFT_OUT, 300, 300, "not finite"), [299]) == 300
    assert health.first_suspect(WentWrongError(LEFT_OUT, 299, 300, "not finite"), [280]) == 299
    with pytest.raises(DivergedError):
        health.first_suspect(WentWrongError(LEFT_OUT, 299, 300, "not finite"), [298])


def test_a_validation_loss_that_is_not_finite_makes_the_run_go_back(health: Health, tmp_path: Path) -> None:
    health.check_validation(10, {"loss": 1.0})
    with pytest.raises(WentWrongError, match="the validation loss is not finite"):
        health.check_validation(20, {"loss": float("nan")})
    assert _kinds(tmp_path) == [NO_VALIDATION]


@pytest.mark.parametrize("rollbacks", [0, 2])
def test_a_run_goes_back_a_bounded_number_of_times(rollbacks: int, tmp_path: Path) -> None:
    limited = _health(tmp_path, max_rollbacks=rollbacks)
    for number in range(rollbacks):
        error = WentWrongError(LEFT_OUT, 100 * number + 53, 100 * number + 57, "not finite")
        assert limited.first_suspect(error, [50]) == 100 * number + 53
        limited.went_back(error, 100 * number + 50)
    with pytest.raises(DivergedError, match=r"the loss is not finite at step 999.*learning_rate"):
        limited.first_suspect(WentWrongError(LEFT_OUT, 995, 999, "not finite"), [900])
    assert _kinds(tmp_path)[-1] == DIVERGED


def test_what_happens_after_a_checkpoint_was_started_does_not_change_its_memory(health: Health) -> None:
    _watch(health, 1)
    health.check_steps()
    memory = health.memory()
    _watch(health, 2, updated=False)
    health.check_steps()
    assert (memory["left_out"], health.memory()["left_out"]) == ([], [2])


def test_the_memory_of_a_checkpoint_restores_the_decisions(health: Health, tmp_path: Path) -> None:
    for number in range(1, 40):
        _report(health, 10 * number, 0.6)
    for step in range(391, 394):
        _watch(health, step, updated=False)
    health.check_steps()
    memory = json.loads(json.dumps(health.memory()))
    resumed = _health(tmp_path)
    resumed.resume(memory)
    assert not resumed.is_good
    for step in (394, 395):
        _watch(resumed, step, updated=False)
    with pytest.raises(WentWrongError) as caught:
        resumed.check_steps()
    assert (caught.value.first, caught.value.last) == (391, 395)
    with pytest.raises(WentWrongError):
        _report(resumed, 400, 9.0)
    # The steps before the checkpoint are events already, and are not written again.
    assert [event.facts["step"] for event in read_events(tmp_path / EVENTS)] == [391, 392, 393, 394, 395, 400]
    resumed.resume(None)
    _report(resumed, 10, 9.0)


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """planted(change): from now on, steps take `change(step, state, bag)` in place of the state and the bag."""

    def plant(change: Callable) -> None:
        take_step = Recomputation.__call__

        def take(self, number: int, state, bag):
            with jax.transfer_guard("allow"):
                state, bag = change(number, state, bag)
            return take_step(self, number, state, bag)

        monkeypatch.setattr(Recomputation, "__call__", take)

    return plant


@pytest.fixture
def config(small_config):
    """Twelve steps, a checkpoint after every second one, a report after each."""
    small_config.train.steps, small_config.train.eval_every, small_config.train.checkpoint_every = 12, 12, 2
    small_config.health.max_left_out = 2
    return small_config


def _passing_over(run: Path, *steps: int) -> Path:
    """A run directory whose events tell the run to pass over these steps."""
    for step in steps:
        EventLog(run / EVENTS).append(WENT_BACK, step=step, first_step=step, last_step=step)
    return run


def _params(run: Path) -> list[np.ndarray]:
    model = build_model(open_run(run).config.model, 3, 0)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore_params(run, model)[0])]


def _same_bits(one: Path, other: Path) -> bool:
    return all((a == b).all() for a, b in zip(_params(one), _params(other), strict=True))


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


def test_a_bag_that_gives_no_finite_loss_is_left_out_named_and_changes_nothing_else(
    config, planted, tmp_path: Path
) -> None:
    passing = _passing_over(tmp_path / "passing", 5)
    train(config, passing)

    def with_nan(step: int, state, bag):
        return state, replace(bag, weight=bag.weight * np.float32(np.nan)) if step == 5 else bag

    planted(with_nan)
    train(config, tmp_path / "run")
    assert _same_bits(tmp_path / "run", passing)
    assert _losses(tmp_path / "run") == _losses(passing)
    assert sorted(_losses(passing)) == [step for step in range(1, 13) if step != 5]
    (event,) = [event for event in read_events(tmp_path / "run" / EVENTS) if event.kind == LEFT_OUT]
    assert (event.facts["step"], len(event.facts["bags"])) == (5, 4)
    assert set(event.facts["bags"]) <= {row.slide_id for row in load_cohort(Path(config.data.cohort), None).rows}


def test_damaged_parameters_make_the_run_go_back_pass_over_the_bags_and_end_as_if_it_had_passed_over_them_at_once(
    config, planted, tmp_path: Path
) -> None:
    passing = _passing_over(tmp_path / "passing", 7, 8)
    train(config, passing)
    damages = iter([True])

    def damaged(step: int, state, bag):
        if step == 7 and next(damages, False):
            state = replace(state, params=jax.tree.map(lambda leaf: leaf * np.float32(1e30), state.params))
        return state, bag

    run = tmp_path / "run"

    class StopsAfter10(ProcessGroup):
        def should_stop(self, step: int) -> bool:
            # With two unfinished saves, that of step 6 would be skipped.
            while step == 6 and not (run / "checkpoints" / "4").is_dir():
                time.sleep(0.02)
            return step == 10

    planted(damaged)
    with pytest.raises(StoppedError):
        train(config, run, StopsAfter10())
    train(config, run)
    assert _same_bits(run, passing)
    assert _losses(run) == _losses(passing)
    events = [event for event in read_events(run / EVENTS) if event.kind in (LEFT_OUT, WENT_BACK)]
    assert [(event.kind, event.facts["step"]) for event in events] == [(LEFT_OUT, 7), (LEFT_OUT, 8), (WENT_BACK, 8)]
    assert (events[-1].facts["to_step"], events[-1].facts["first_step"]) == (6, 7)
    assert verify(run / EVENTS) is None
    goodput = read_goodput(run)
    assert goodput is not None
    assert (goodput.attempts, goodput.lost_steps) == (3, 2)


def test_without_a_fault_the_watch_over_health_changes_no_bit_and_no_metric(config, tmp_path: Path) -> None:
    train(config, tmp_path / "watched")
    config.health.loss_spike_z, config.health.max_rollbacks, config.health.stuck_reports = 0.0, 0, 0
    config.health.max_gradient_norm = 1e30
    train(config, tmp_path / "unwatched")
    assert _same_bits(tmp_path / "watched", tmp_path / "unwatched")
    assert _losses(tmp_path / "watched") == _losses(tmp_path / "unwatched")
    assert not {LEFT_OUT, WENT_BACK, LOSS_SPIKE} & set(_kinds(tmp_path / "watched"))


def test_a_learning_rate_at_which_no_bags_can_be_computed_ends_the_run_and_not_in_a_loop(
    config, tmp_path: Path
) -> None:
    config.optimizer.learning_rate = 1e30
    with pytest.raises(DivergedError, match=r"the loss is not finite at step .* after going back . times?"):
        train(config, tmp_path)
    assert _kinds(tmp_path)[-1] == DIVERGED
