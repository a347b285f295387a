"""The health of a training run: steps that go wrong are left out, or the run goes back and passes over their bags.

The step itself leaves out what is not finite (`crcjax.train.step`). At every report and checkpoint, `Health` reads the results of
the steps since, which stay on the devices until then, and decides. All processes see the same results and decide alike. What
was found and what was done are lines of RUN/events.jsonl; its `went_back` lines tell a restarted run which steps to pass over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from crcjax.errors import DivergedError
from crcjax.monitor.event_log import EVENTS, read_events
from crcjax.monitor.logs import log
from crcjax.monitor.spikes import robust_z

LEFT_OUT, LOSS_SPIKE, DEAD_ATTENTION, STUCK = "step_left_out", "loss_spike", "dead_attention", "loss_stands_still"
NO_VALIDATION, WENT_BACK, DIVERGED = "validation_not_finite", "went_back", "diverged"
# Aggregators whose attention is not learned.
_WITHOUT_ATTENTION = ("mean", "max")
# Attention is dead if its entropy is this close to its maximum (all regions alike) or to 0 (a single region).
_DEAD_ENTROPY = 1e-6
# Reports that a spike is compared with, and the least number of them.
_HISTORY, _MIN_HISTORY = 100, 20
# A mean loss that differs by less from the others, in nats, is no sign of anything.
_LOSS_DEVIATION = 0.05
_REMEDY = "lower config.optimizer.learning_rate, or raise config.optimizer.warmup_steps, and train into a new --workdir"


class WentWrongError(Exception):
    """The run has to go back. `first` and `last` are the steps that went wrong; `kind` is that of an event."""

    def __init__(self, kind: str, first: int, last: int, reason: str):
        super().__init__(reason)
        self.kind, self.first, self.last = kind, first, last


@dataclass(frozen=True)
class Report:
    """The means of the steps up to `step` since the report before, which a decision needs."""

    step: int
    loss: float
    accuracy: float
    attention_entropy: float


@dataclass(frozen=True)
class StepResult:
    """The results of one step, which show whether it was left out and why."""

    step: int
    loss: float
    gradient_norm: float
    worst_bag: int


class Health:
    """Watches the steps of one run, and decides what is done about those that go wrong.

    Args:
      run: the run directory.
      config: the whole config.
      classes: the number of classes.
      on_event: called with the kind and the facts of each event.
    """

    def __init__(self, run: Path, config: ConfigDict, classes: int, on_event: Callable[..., None]):
        self._run, self._config, self._classes, self._on_event = run, config, classes, on_event
        self._bag_names: Callable[[int], list[str]] = lambda step: []
        events = read_events(run / EVENTS)
        self._rollbacks = [event.facts for event in events if event.kind == WENT_BACK]
        # A restarted run computes some steps again; their events are in the log already.
        self._logged = {(event.kind, int(event.facts.get("step", 0))) for event in events}
        self._pending: list[tuple[int, dict[str, Array]]] = []
        self._reports: list[Report] = []
        # The steps that were left out in series, up to the last one.
        self._left_out: list[int] = []

    @property
    def passed_over(self) -> frozenset[int]:
        """The steps, counted from 1, whose bags the run passes over."""
        return frozenset(
            step for facts in self._rollbacks for step in range(facts["first_step"], facts["last_step"] + 1)
        )

    @property
    def is_good(self) -> bool:
        """Whether the last step was an update. If not, the parameters may be damaged, and no checkpoint must be saved."""
        return not self._left_out

    def name_bags(self, bag_names: Callable[[int], list[str]]) -> None:
        """Sets the function that names the bags of a step, counted from 1."""
        self._bag_names = bag_names

    def memory(self) -> dict[str, Any]:
        """What the next decisions depend on, as JSON values; a checkpoint keeps it."""
        # Copies: a thread writes them while training goes on.
        reports = [list(vars(report).values()) for report in self._reports]
        return {"reports": reports, "left_out": list(self._left_out)}

    def resume(self, memory: Mapping[str, Any] | None) -> None:
        """Continues from the `memory` of the checkpoint that was restored; None without one."""
        self._pending = []
        self._reports = [Report(*values) for values in memory["reports"]] if memory else []
        self._left_out = list(memory["left_out"]) if memory else []

    def watch(self, step: int, metrics: Mapping[str, Array]) -> None:
        """Adds the results of a step. They stay on the devices, so that this does not wait for the step."""
        names = ("updated", "loss", "gradient_norm", "worst_bag")
        self._pending.append((step, {name: metrics[name] for name in names}))

    def check_steps(self, is_last: bool = False) -> None:
        """Records the steps that were left out since the last call.

        Raises WentWrongError after config.health.max_left_out such steps in series; with `is_last`, for the last step of the
        run, after one.
        """
        pending, self._pending = self._pending, []
        passed_over = self.passed_over
        for step, values in jax.device_get(pending):
            if step in passed_over:
                continue
            if values["updated"]:
                self._left_out = []
                continue
            self._left_out.append(step)
            self._log_left_out(
                StepResult(step, float(values["loss"]), float(values["gradient_norm"]), int(values["worst_bag"]))
            )
        count = len(self._left_out)
        if count >= self._config.health.max_left_out or (is_last and count):
            reason = (
                f"the last {count} steps had losses or gradients that are not finite, or gradients that are too large"
            )
            raise WentWrongError(LEFT_OUT, self._left_out[0], self._left_out[-1], reason)

    def check_report(self, step: int, scalars: Mapping[str, float]) -> None:
        """Compares the means of the steps since the last report with earlier ones. Raises WentWrongError.

        Without any update since the last report, `scalars` are empty, and nothing is compared.
        """
        if not scalars:
            return
        report = Report(step, scalars["loss"], scalars["accuracy"], scalars["attention_entropy"])
        first = self._reports[-1].step + 1 if self._reports else 1
        self._check_spike(report, first)
        self._check_attention(report, first)
        self._reports = [*self._reports[1 - max(_HISTORY, self._config.health.stuck_reports) :], report]
        self._check_progress(step)

    def check_validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Raises WentWrongError for a validation loss that is not finite: the parameters are damaged."""
        if not np.isfinite(metrics["loss"]):
            self._append(NO_VALIDATION, step=step, done=_SEE)
            raise WentWrongError(NO_VALIDATION, step, step, "the validation loss is not finite")

    def first_suspect(self, error: WentWrongError, checkpoint_steps: Sequence[int]) -> int:
        """The step from which on checkpoints are suspect, so that the run goes back before it.

        If the steps after those that were passed over went wrong too, the parameters and not the bags are to blame, and the
        newest checkpoint is suspect.

        Raises:
          DivergedError: there is no earlier checkpoint; no step is left that could show that the parameters are good; or the
            run went back config.health.max_rollbacks times.
        """
        again, steps = self._fails_again(error), self._config.train.steps
        suspect = max(checkpoint_steps, default=0) if again else error.first
        to_step = max((step for step in checkpoint_steps if step < suspect), default=0)
        without_proof = error.first <= to_step + 1 and error.first < error.last >= steps
        count = len(self._rollbacks)
        if count < self._config.health.max_rollbacks and not without_proof and not (again and to_step == 0):
            return suspect
        tried = f" after going back {count} time{'s' if count > 1 else ''}" if count else ""
        self._append(DIVERGED, step=error.last, reason=str(error), done="the run ended")
        went_wrong = "training went wrong" if error.kind in (LOSS_SPIKE, DEAD_ATTENTION) else "the loss is not finite"
        raise DivergedError(f"{went_wrong} at step {error.last}{tried}: {error}; {_REMEDY}")

    def went_back(self, error: WentWrongError, to_step: int) -> None:
        """Records that the run goes back to `to_step`, and passes over the bags that went wrong."""
        first = min(error.first, to_step + 1) if self._fails_again(error) else error.first
        facts: dict[str, Any] = {
            "step": error.last,
            "reason": str(error),
            "to_step": to_step,
            "first_step": first,
            "last_step": error.last,
            "bags": sorted({name for step in range(error.first, error.last + 1) for name in self._bag_names(step)}),
            "done": f"the run went back to step {to_step} and passes over the bags of steps {first} to {error.last}",
        }
        self._rollbacks.append(facts)
        self._pending, self._left_out = [], []
        self._reports = [report for report in self._reports if report.step <= to_step]
        self._append(WENT_BACK, **facts)
        log.warning(f"{self._run}: {facts['reason']}; {facts['done']} ({EVENTS} names them)")

    def _fails_again(self, error: WentWrongError) -> bool:
        """Whether the steps right after those that were passed over went wrong too."""
        return bool(self._rollbacks) and error.first <= self._rollbacks[-1]["last_step"] + 1

    def _check_spike(self, report: Report, first: int) -> None:
        threshold, losses = self._config.health.loss_spike_z, [earlier.loss for earlier in self._reports[-_HISTORY:]]
        if not threshold or len(losses) < _MIN_HISTORY:
            return
        z = robust_z(report.loss, losses, _LOSS_DEVIATION)
        if z >= threshold:
            reason = (
                f"the loss rose from a median of {np.median(losses):.3f} to {report.loss:.3f} (robust z-score {z:.1f})"
            )
            self._append(LOSS_SPIKE, step=report.step, first_step=first, loss=report.loss, z=round(z, 2), done=_SEE)
            raise WentWrongError(LOSS_SPIKE, first, report.step, reason)

    def _check_attention(self, report: Report, first: int) -> None:
        if self._config.model.mil in _WITHOUT_ATTENTION or not _is_dead(report):
            return
        entropy = report.attention_entropy
        state = "all regions have the same attention" if entropy > 0.5 else "one region of each bag has all attention"
        if any(not _is_dead(earlier) for earlier in self._reports):
            self._append(DEAD_ATTENTION, step=report.step, first_step=first, entropy=entropy, done=_SEE)
            raise WentWrongError(DEAD_ATTENTION, first, report.step, state)
        if len(self._reports) + 1 == _MIN_HISTORY:
            self._append(DEAD_ATTENTION, step=report.step, entropy=entropy, done="the log warns")
            log.warning(
                f"{self._run}: {state} since the first step, so that the aggregator learns nothing; lower "
                "config.optimizer.learning_rate or choose another config.model.mil"
            )

    def _check_progress(self, step: int) -> None:
        """Warns of a loss that no longer moves: it does not fall, and the accuracy is that of guessing."""
        count = self._config.health.stuck_reports
        reports = self._reports[-count:] if count else []
        if not count or len(reports) < count or len(reports) < 3:
            return
        losses, third = [report.loss for report in reports], len(reports) // 3
        chance = 1.0 / self._classes
        bags = (reports[-1].step - reports[0].step) * self._config.data.batch_size
        margin = 3.0 * np.sqrt(chance * (1.0 - chance) / max(bags, 1))
        falls = np.median(losses[-third:]) < 0.99 * np.median(losses[:third])
        recently = any(kind == STUCK and at > reports[0].step for kind, at in self._logged)
        if falls or np.mean([report.accuracy for report in reports]) > chance + margin or recently:
            return
        self._append(STUCK, step=step, loss=losses[-1], since_step=reports[0].step, done="the log warns")
        log.warning(
            f"{self._run}: the loss no longer moves ({losses[-1]:.3f}) and the accuracy is that of guessing since step "
            f"{reports[0].step}; check the labels, or change config.optimizer.learning_rate"
        )

    def _log_left_out(self, result: StepResult) -> None:
        bags = self._bag_names(result.step)
        facts = {
            "loss": result.loss,
            "gradient_norm": result.gradient_norm,
            "bags": bags,
            "bag_of_largest_loss": bags[result.worst_bag],
            "done": "the step was left out",
        }
        self._append(LEFT_OUT, step=result.step, **facts)
        log.warning(
            f"{self._run}: step {result.step} was left out: loss {result.loss:.3g}, norm of the gradient "
            f"{result.gradient_norm:.3g}, largest loss in {bags[result.worst_bag]}"
        )

    def _append(self, kind: str, *, step: int, **facts: Any) -> None:
        if (kind, step) not in self._logged:
            self._on_event(kind, step=step, **facts)
        self._logged.add((kind, step))


# What was done about an event that makes the run go back is in the line after it.
_SEE = f"see the next line, {WENT_BACK} or {DIVERGED}"


def _is_dead(report: Report) -> bool:
    return not _DEAD_ENTROPY < report.attention_entropy < 1.0 - _DEAD_ENTROPY
