"""Logging, validation and checkpoints of a training run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from crcjax.errors import DivergedError, InputError
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import MILModel, Params
from crcjax.monitor.logs import log, log_to_run
from crcjax.monitor.metric_writer import MetricWriter
from crcjax.parallel.mesh import described, local_mesh, on_local_mesh, replicated
from crcjax.parallel.process_group import ProcessGroup
from crcjax.predict.feature_density import fit_density, is_fitted
from crcjax.predict.forward import Forward
from crcjax.predict.stored_bags import Evaluation
from crcjax.runs.checkpoint import Checkpointer, restore_params
from crcjax.runs.run_directory import start_run
from crcjax.runs.train_state import TrainState
from crcjax.train.evaluate import TaskEvaluation
from crcjax.train.memory_budget import Budget, Parts, keep_parts, memory_errors
from crcjax.train.metrics import IntervalMetrics
from crcjax.train.optimizer import learning_rate
from crcjax.train.setup import Plan, batch_norm_note
from crcjax.train.step import init_state

_OUTSIDE = "That was in an evaluation, not in a step: lower config.data.regions_per_bag, of which it encodes as many, or the model's width"


@dataclass(frozen=True)
class Due:
    """What is to be done after a step."""

    report: bool
    checkpoint: bool
    evaluation: bool
    replica_check: bool


def due_after(step: int, config: ConfigDict, stops: bool) -> Due:
    """What `config` (config.train) asks for after a step, of which `stops` says whether the run then stops."""
    evaluation = step == config.steps or step % config.eval_every == 0
    checkpoint = evaluation or stops or step % config.checkpoint_every == 0
    replica_check = bool(config.replica_check_every) and step % config.replica_check_every == 0
    # Before every checkpoint, too: a run resumed from a checkpoint that is not finite would never recover.
    return Due(checkpoint or step % config.log_every == 0, checkpoint, evaluation, replica_check)


def start_directory(run: Path, plan: Plan, config: ConfigDict, parts: Parts, group: ProcessGroup) -> None:
    """The main process writes the run directory, the others then check it."""
    if not group.is_main:
        group.barrier("the run directory")
    start_run(run, config, plan.data.tiling, plan.data.cohort, plan.data.normaliser, group.is_main)
    if group.is_main:
        group.barrier("the run directory")
    keep_parts(run, parts)


class Validation:
    """The evaluation of parameters on the validation slides and their tiles."""

    def __init__(self, plan: Plan, group: ProcessGroup):
        config, data = plan.config, plan.data
        self._plan, self._group = plan, group
        sizes, stored = (config.data.region_buckets, config.data.regions_per_bag), config.data.features
        self._forward = Forward(plan.model, *sizes, local_mesh(), data.normaliser, stored)
        validation = data.slides.split("val")
        self._slides = Evaluation(validation, self._forward, config.data.unit)
        self._tiles = (
            TaskEvaluation(plan.tasks, plan.model, config, validation, data.normaliser) if plan.tasks else None
        )

    def metrics(self, step: int, params: Params, run: Path) -> dict[str, float] | None:
        """The metrics of parameters on the mesh, without the prefix `val/`; None without validation slides."""
        each = partial(self._group.report_progress, step, "evaluating")
        with memory_errors(lambda words: InputError(f"{run}: {words} {_OUTSIDE}")):
            params = on_local_mesh(params, self._plan.mesh, local_mesh())
            slide_metrics = self._slides.metrics(params, each)
            return slide_metrics | self._tiles.metrics(params, each) if slide_metrics and self._tiles else slide_metrics

    def fit_density(self, run: Path, model: MILModel) -> None:
        """Fits the feature density of the training slides, as the best checkpoint encodes them, into the run directory."""
        log.info(f"{run}: encoding all training slides for the feature density, which finds out-of-distribution slides")
        params, _ = restore_params(run, model)
        params = jax.device_put(params, replicated(local_mesh()))
        each = partial(self._group.report_progress, self._plan.config.train.steps, "encoding the training slides")
        training = Evaluation(self._plan.data.slides.split("train"), self._forward, self._plan.config.data.unit)
        with memory_errors(lambda words: InputError(f"{run}: {words} {_OUTSIDE}")):
            of_training, of_validation = (slides.summaries(params, each) for slides in (training, self._slides))
        if self._group.is_main:
            fit_density(of_training, training.labels, of_validation).save(run)


class Record:
    """The log, metrics and checkpoints of one run; `metrics` takes each step's metrics.

    Members of an ensemble pass `name`, with which their lines begin, and share one `validation`.
    """

    def __init__(
        self, plan: Plan, run: Path, group: ProcessGroup, validation: Validation | None = None, name: str = ""
    ):
        self._plan, self._run, self._group, self._name = plan, run, group, name
        self._validation = validation or Validation(plan, group)
        self._checkpoints = Checkpointer(run, plan.config.train.keep_best)
        self.metrics = IntervalMetrics()

    def restored(self, model: MILModel) -> TrainState:
        """The state of the newest checkpoint, or before the first step with the model's parameters."""
        plan = self._plan
        return self._checkpoints.restore(init_state(model, plan.optimizer, plan.config, plan.mesh, plan.mining))

    @contextmanager
    def opened(self, start: int) -> Iterator[None]:
        """Opens the log, metrics.jsonl and TensorBoard for the steps after `start`."""
        with ExitStack() as stack:
            stack.enter_context(log_to_run(self._run, self._group.process_index))
            stack.enter_context(closing(self._checkpoints))
            self._writer = stack.enter_context(MetricWriter(self._run, start, self._group.is_main))
            self._progress = Progress(start, self._plan.config)
            log.info(f"{self._run}: going on from step {start}" if start else f"{self._run}: starting")
            yield

    def report(self, step: int, waited_s: float) -> None:
        """Writes the metrics of the steps since the last report, and the step's line. Raises DivergedError."""
        scalars = checked(self.metrics.compute(), step)
        speed = self._progress.speed(step, waited_s)
        self.write(step, scalars, speed)
        log.info(self._progress.line(step, [scalars["loss"]], speed))

    def write(self, step: int, scalars: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Writes metrics of training, with the learning rate and the speed."""
        named = {f"train/{name}": value for name, value in scalars.items()}
        self._writer.write(step, named | {"train/learning_rate": self._progress.learning_rate(step)} | dict(speed))

    def save(self, step: int, state: TrainState, evaluates: bool) -> None:
        """Saves a checkpoint, with the metrics of the validation slides if the step is evaluated."""
        metrics = self._validation.metrics(step, state.params, self._run) if evaluates else None
        if metrics:
            self._writer.write(step, {f"val/{name}": value for name, value in metrics.items()})
            shown = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            log.info(f"step {step}: validation {f'of {self._name} ' if self._name else ''}{shown}")
        self._group.report_progress(step, "saving")
        self._checkpoints.save(state, metrics)

    def finish(self, model: MILModel) -> None:
        """Waits for the checkpoints, and fits the feature density of the finished run."""
        self._checkpoints.close()
        if self._plan.config.model.head == BY_DENSITY and not is_fitted(self._run):
            self._validation.fit_density(self._run, model)
        log.info(f"{self._run}: trained to step {self._plan.config.train.steps}")


def log_plan(plan: Plan, params: Params, budget: Budget, parts: Parts) -> None:
    """Logs the size of the model, the layout of the devices and the memory of a step; every parameter, to the log file."""
    log.info(f"{parameter_overview.count_parameters(params):,} parameters on {described(plan.mesh)}")
    log.debug("parameters\n" + parameter_overview.get_parameter_overview(params, include_stats=False))
    log.info(f"memory {budget}; bags in {parts.count} of at most {max(parts.possible)} parts")
    if plan.config.model.batch_norm_momentum:
        log.info(batch_norm_note(plan.config, parts.count))


def checked(metrics: Mapping[str, Any], step: int) -> dict[str, float]:
    """Metrics as numbers. Raises DivergedError if one is not finite."""
    scalars = {name: float(value) for name, value in metrics.items()}
    if not all(np.isfinite(value) for value in scalars.values()):
        raise DivergedError(
            f"the loss is not finite at step {step} ({scalars}); lower config.optimizer.learning_rate, or raise "
            "config.optimizer.warmup_steps, and train into a new --workdir"
        )
    return scalars


class Progress:
    """The speed of training since the first report: compilation and the first batches, before it, would falsify it."""

    def __init__(self, start: int, config: ConfigDict):
        self._config = config
        self._rate = jax.jit(learning_rate(config.optimizer, config.train.steps))
        self._began: float | None = None
        self._first_step, self._first_waited_s = start, 0.0

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return float(jax.device_get(self._rate(jax.device_put(np.int32(step - 1)))))

    def speed(self, step: int, waited_s: float) -> dict[str, float]:
        """Steps per second, slides per hour and the share of the time that steps waited for data; empty at first."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._first_step, self._first_waited_s = now, step, waited_s
            return {}
        passed_s = now - self._began
        steps_per_s = (step - self._first_step) / passed_s
        return {
            "train/steps_per_s": steps_per_s,
            "train/slides_per_hour": steps_per_s * self._config.data.batch_size * 3600,
            "train/data_wait": (waited_s - self._first_waited_s) / passed_s,
        }

    def line(self, step: int, losses: Sequence[float], speed: Mapping[str, float]) -> str:
        """The line of a report, with the mean losses of its steps and the time that remains."""
        steps = self._config.train.steps
        line = f"step {step}/{steps}  loss " + " ".join(f"{loss:.3f}" for loss in losses)
        if speed and speed["train/steps_per_s"] > 0:
            left_min = (steps - step) / speed["train/steps_per_s"] / 60
            line += (
                f"  {speed['train/steps_per_s']:.2f} steps/s  {speed['train/slides_per_hour']:,.0f} slides/hour"
                f"  {left_min:.1f} min left"
            )
        return line
