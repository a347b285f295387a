"""Logging, validation and checkpoints of a training run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from crcjax.errors import DivergedError, InputError, OutputError
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import MILModel, Params, params_of
from crcjax.monitor.event_log import EVENTS, EventLog
from crcjax.monitor.goodput import EVALUATE, RESTORE, SAVE, Ledger
from crcjax.monitor.logs import log, log_to_run
from crcjax.monitor.metric_writer import MetricWriter
from crcjax.parallel.mesh import described, local_mesh, on_local_mesh, replicated
from crcjax.parallel.process_group import ProcessGroup
from crcjax.predict.feature_density import fit_density, is_fitted
from crcjax.predict.forward import Forward
from crcjax.predict.stored_bags import Evaluation
from crcjax.runs.checkpoint import Checkpointer, restore_params
from crcjax.runs.retention import Retention
from crcjax.runs.run_directory import start_run, training_facts
from crcjax.runs.train_state import TrainState
from crcjax.train.evaluate import TaskEvaluation
from crcjax.train.health import Health, WentWrongError
from crcjax.train.memory_budget import Budget, MicroBatches, memory_errors, record_micro_batches
from crcjax.train.metrics import IntervalMetrics
from crcjax.train.optimizer import learning_rate
from crcjax.train.save_interval import SaveTimer
from crcjax.train.setup import Plan, batch_norm_message
from crcjax.train.step import init_state

# An evaluation encodes as many regions at a time as a training bag has.
_IN_EVALUATION = "That was in an evaluation, not in a step: lower config.data.regions_per_bag, which an evaluation encodes at a time, or the model's width"


@dataclass(frozen=True)
class Due:
    """The actions that are due after a step. `last`: the run ends or stops after it."""

    report: bool
    checkpoint: bool
    evaluation: bool
    replica_check: bool
    health_check: bool
    last: bool


def due_after(step: int, config: ConfigDict, stops: bool, timer: SaveTimer, group: ProcessGroup) -> Due:
    """The actions after a step that `config` (config.train) and the timer ask for; `stops` if the run stops after it.

    All processes call it after the same steps.
    """
    evaluation = step == config.steps or step % config.eval_every == 0
    checkpoint = evaluation or step % config.checkpoint_every == 0
    replica_check = bool(config.replica_check_every) and step % config.replica_check_every == 0
    # A stop causes no report, and neither does a timed save, so that the history of a run does not depend on the clock.
    report = checkpoint or step % config.log_every == 0
    if report and not checkpoint and timer.is_on:
        # The clock of process 0 decides, so that all save after the same step.
        checkpoint = group.maximum(float(group.is_main and timer.is_due())) > 0.0
    # Health is checked before every checkpoint: a run could not recover from one with damaged parameters.
    return Due(report, checkpoint or stops, evaluation, replica_check, report or stops, stops or step == config.steps)


def start_directory(
    run: Path, plan: Plan, config: ConfigDict, micro_batches: MicroBatches, group: ProcessGroup
) -> None:
    """Starts the run directory: the main process writes it, then the others check it."""
    if not group.is_main:
        group.barrier("the run directory")
    stores = plan.data.slides.stores
    start_run(
        run,
        config,
        plan.data.tiling,
        plan.data.cohort,
        plan.data.normaliser,
        group.is_main,
        content_hash={store.slide_id: store.info.content_hash or "" for store in stores},
        encoder_sha256=plan.encoder_sha256,
        synthetic=any(store.info.synthetic for store in stores),
    )
    if group.is_main:
        group.barrier("the run directory")
    record_micro_batches(run, micro_batches)


class Validation:
    """Evaluates parameters on the validation slides, and the auxiliary tasks on their tiles."""

    def __init__(self, plan: Plan, group: ProcessGroup):
        config, data = plan.config, plan.data
        self._plan, self._group = plan, group
        buckets, chunk = config.data.region_buckets, config.data.regions_per_bag
        self._forward = Forward(plan.model, buckets, chunk, local_mesh(), data.normaliser, config.data.features)
        validation_slides = data.slides.split("val")
        self._slides = Evaluation(validation_slides, self._forward, config.data.unit)
        self._tasks = (
            TaskEvaluation(plan.tasks, plan.model, config, validation_slides, data.normaliser) if plan.tasks else None
        )

    def metrics(self, step: int, params: Params, run: Path) -> dict[str, float] | None:
        """The metrics of parameters on the mesh, without the prefix `val/`; None without validation slides."""
        on_bag = partial(self._group.report_progress, step, "evaluating")
        with _evaluation_memory_errors(run):
            params = on_local_mesh(params, self._plan.mesh, local_mesh())
            slide_metrics = self._slides.metrics(params, on_bag)
            if slide_metrics and self._tasks:
                return slide_metrics | self._tasks.metrics(params, on_bag)
            return slide_metrics

    def fit_density(self, run: Path, model: MILModel) -> None:
        """Fits the feature density to the training slides, encoded by the best checkpoint, and saves it in the run."""
        log.info(f"{run}: encoding all training slides for the feature density, which finds out-of-distribution slides")
        params, _ = restore_params(run, model)
        params = jax.device_put(params, replicated(local_mesh()))
        on_bag = partial(self._group.report_progress, self._plan.config.train.steps, "encoding the training slides")
        training = Evaluation(self._plan.data.slides.split("train"), self._forward, self._plan.config.data.unit)
        with _evaluation_memory_errors(run):
            training_summaries = training.summaries(params, on_bag)
            validation_summaries = self._slides.summaries(params, on_bag)
        if self._group.is_main:
            fit_density(training_summaries, training.labels, validation_summaries).save(run)


def _evaluation_memory_errors(run: Path) -> AbstractContextManager[None]:
    return memory_errors(lambda message: InputError(f"{run}: {message} {_IN_EVALUATION}"))


class Record:
    """The log, metrics, goodput and checkpoints of one run; add each step's metrics to `metrics`.

    The members of an ensemble share one `timer` and one `validation`, and their log lines contain their `name`.
    `cluster_scalars` gives the readings of all processes, for TensorBoard.
    """

    def __init__(
        self,
        plan: Plan,
        run: Path,
        group: ProcessGroup,
        ledger: Ledger,
        timer: SaveTimer,
        validation: Validation | None = None,
        name: str = "",
        cluster_scalars: Callable[[], dict[str, float]] = dict,
    ):
        self._plan, self.run, self._group, self.ledger, self._name = plan, run, group, ledger, name
        self.timer, self._cluster_scalars = timer, cluster_scalars
        self.health = Health(run, plan.config, len(plan.data.cohort.classes), self.on_event)
        self._validation = validation or Validation(plan, group)
        config = plan.config
        keep = Retention(
            config.train.keep_newest, config.train.keep_best, config.train.keep_best_by, config.train.keep_every
        )
        self._checkpoints = Checkpointer(
            run,
            keep,
            timeout_s=config.train.save_timeout_s,
            signing_key=Path(config.train.signing_key) if config.train.signing_key else None,
            about=training_facts(config, run),
            on_event=self.on_event,
        )
        self.metrics = IntervalMetrics()

    def restored(self, model: MILModel) -> TrainState:
        """The state of the newest checkpoint; without a checkpoint, the initial state with the model's parameters."""
        plan = self._plan
        self._group.report_progress(0, "restoring")
        with self.ledger.account(RESTORE):
            initial = init_state(model, plan.optimizer, plan.config, plan.mesh, plan.mining)
            state = self._checkpoints.restore(initial)
            self.ledger.restored(int(state.step))
        self.health.resume(self.memory.get("health"))
        self.metrics = IntervalMetrics(self.memory.get("metrics"))
        return state

    @property
    def memory(self) -> dict[str, Any]:
        """What was saved beside the restored state; empty for a new run, and for checkpoints of an earlier version."""
        return self._checkpoints.memory

    @contextmanager
    def logged(self) -> Iterator[None]:
        """Opens the log file, and waits at the end for the last checkpoint."""
        with log_to_run(self.run, self._group.process_index), closing(self._checkpoints):
            yield

    @contextmanager
    def opened(self, start: int) -> Iterator[None]:
        """Opens metrics.jsonl and TensorBoard files for the steps after `start`."""
        with MetricWriter(self.run, start, self._group.is_main) as self._writer:
            self._progress = Progress(start, self._plan.config)
            self.timer.start()
            log.info(f"{self.run}: resuming from step {start}" if start else f"{self.run}: starting")
            yield

    def report(self, step: int, waited_s: float) -> None:
        """Writes the metrics of the steps since the last report, and logs a line. Raises WentWrongError.

        `waited_s` is the time since the start in which steps waited for data.
        """
        scalars = {name: float(value) for name, value in self.metrics.compute().items()}
        # If all steps were left out, there is no mean.
        scalars = {} if np.isnan(scalars["loss"]) else scalars
        self.health.check_report(step, scalars)
        speed = self._progress.speed(step, waited_s)
        self.write(step, scalars, speed)
        log.info(self._progress.line(step, [scalars["loss"]] if scalars else [], speed))

    def write(self, step: int, scalars: Mapping[str, float], speed: Mapping[str, float]) -> None:
        """Writes training metrics, with the learning rate and the speed."""
        prefixed = {f"train/{name}": value for name, value in scalars.items()}
        rate = {"train/learning_rate": self._progress.learning_rate(step)}
        for_tensorboard = self.ledger.goodput().scalars | (self._cluster_scalars() if self._group.is_main else {})
        self._writer.write(step, prefixed | rate | dict(speed), for_tensorboard)

    def save(self, step: int, state: TrainState, due: Due, interval: Mapping[str, Any] | None = None) -> None:
        """Saves a checkpoint, with validation metrics if an evaluation is due.

        `interval` are the metrics since the last report, by default those of this run alone.
        """
        with self.ledger.account(EVALUATE):
            metrics = self._validation.metrics(step, state.params, self.run) if due.evaluation else None
        if metrics:
            self._writer.write(step, {f"val/{name}": value for name, value in metrics.items()})
            values = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
            log.info(f"step {step}: validation {f'of {self._name} ' if self._name else ''}{values}")
            if not self._name:
                # The members of an ensemble cannot go back one by one.
                self.health.check_validation(step, metrics)
        self._group.report_progress(step, "saving")
        memory = {"health": self.health.memory(), "metrics": self.metrics.memory() if interval is None else interval}
        with self.ledger.account(SAVE):
            began_s = time.monotonic()
            self._checkpoints.save(state, metrics, is_last=due.last, memory=memory)
        self.timer.saved(step, time.monotonic() - began_s, self._checkpoints.write_s)

    def go_back(self, error: WentWrongError) -> None:
        """Sets aside the checkpoints that an error makes suspect, and records what the run passes over. Raises DivergedError."""
        self._checkpoints.wait()
        self._checkpoints.set_aside_from(self.health.first_suspect(error, self._checkpoints.steps()))
        self.health.went_back(error, max(self._checkpoints.steps(), default=0))

    def on_event(self, kind: str, **facts: Any) -> None:
        """Adds an event to RUN/events.jsonl; a file that cannot be written is reported, and training goes on."""
        if not self._group.is_main:
            return
        try:
            EventLog(self.run / EVENTS).append(kind, **facts)
        except OutputError as error:
            log.error(f"{self.run}: {error}")

    def finish(self, model: MILModel) -> None:
        """Waits for the last checkpoint; then fits the feature density, if the head needs one."""
        self._group.report_progress(self._plan.config.train.steps, "finishing")
        with self.ledger.account(SAVE):
            self._checkpoints.close()
        if self._plan.config.model.head == BY_DENSITY and not is_fitted(self.run):
            with self.ledger.account(EVALUATE):
                self._validation.fit_density(self.run, model)
        log.info(f"{self.run}: trained to step {self._plan.config.train.steps}")
        log.info(f"{self.run}: {self.ledger.goodput()}")


def log_plan(plan: Plan, budget: Budget, micro_batches: MicroBatches) -> None:
    """Logs the model's size, the mesh and the memory budget, and to the log file a table of all parameters."""
    params = params_of(plan.model)
    log.info(f"{parameter_overview.count_parameters(params):,} parameters on {described(plan.mesh)}")
    log.debug("parameters\n" + parameter_overview.get_parameter_overview(params, include_stats=False))
    log.info(f"memory {budget}; {micro_batches.count} of at most {max(micro_batches.possible)} micro-batches")
    if plan.config.model.batch_norm_momentum:
        log.info(batch_norm_message(plan.config, micro_batches.count))


def checked(metrics: Mapping[str, Any], step: int) -> dict[str, float]:
    """Converts metrics to numbers. Raises DivergedError if one is not finite."""
    scalars = {name: float(value) for name, value in metrics.items()}
    if not all(np.isfinite(value) for value in scalars.values()):
        raise DivergedError(
            f"the loss is not finite at step {step} ({scalars}); lower config.optimizer.learning_rate, or raise "
            "config.optimizer.warmup_steps, and train into a new --workdir"
        )
    return scalars


class Progress:
    """The speed of training since the first report. Steps before it include compilation and the first reading."""

    def __init__(self, start: int, config: ConfigDict):
        self._config = config
        self._rate = jax.jit(learning_rate(config.optimizer, config.train.steps))
        self._first_time: float | None = None
        self._first_step, self._first_waited_s = start, 0.0

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, counted from 1."""
        return float(jax.device_get(self._rate(jax.device_put(np.int32(step - 1)))))

    def speed(self, step: int, waited_s: float) -> dict[str, float]:
        """Steps per second, slides per hour, and the fraction of the time in which steps waited for data.

        Empty at the first report. `waited_s` is the total waiting time since the start.
        """
        now = time.monotonic()
        if self._first_time is None:
            self._first_time, self._first_step, self._first_waited_s = now, step, waited_s
            return {}
        elapsed_s = now - self._first_time
        steps_per_s = (step - self._first_step) / elapsed_s
        return {
            "train/steps_per_s": steps_per_s,
            "train/slides_per_hour": steps_per_s * self._config.data.batch_size * 3600,
            "train/data_wait": (waited_s - self._first_waited_s) / elapsed_s,
        }

    def line(self, step: int, losses: Sequence[float], speed: Mapping[str, float]) -> str:
        """The log line of a report: the mean loss of each run, the speed and the remaining time."""
        steps = self._config.train.steps
        line = f"step {step}/{steps}  loss " + (" ".join(f"{loss:.3f}" for loss in losses) or "of no step")
        if speed and speed["train/steps_per_s"] > 0:
            left_min = (steps - step) / speed["train/steps_per_s"] / 60
            line += (
                f"  {speed['train/steps_per_s']:.2f} steps/s  {speed['train/slides_per_hour']:,.0f} slides/hour"
                f"  {left_min:.1f} min left"
            )
        return line
