"""Metrics, validation and checkpoints of a training run."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from crcjax.errors import InputError
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import MILModel
from crcjax.monitor.logs import log, log_to_run
from crcjax.monitor.metric_writer import MetricWriter
from crcjax.parallel.mesh import local_mesh, on_local_mesh, replicated
from crcjax.parallel.process_group import ProcessGroup
from crcjax.predict.feature_density import fit_density, is_fitted
from crcjax.predict.forward import Forward
from crcjax.predict.stored_bags import Evaluation
from crcjax.runs.checkpoint import Checkpointer, restore_params
from crcjax.runs.train_state import TrainState
from crcjax.train.ensemble import EnsembleMetrics, apart
from crcjax.train.evaluate import TaskEvaluation
from crcjax.train.memory_budget import (
    memory_errors,
)
from crcjax.train.optimizer import learning_rate
from crcjax.train.setup import Plan
from crcjax.train.step import Metrics, init_state

_OUTSIDE = "That was in an evaluation, not in a step: lower config.data.regions_per_bag, of which it encodes as many, or the model's width"


class Record:
    """What runs that are trained together say of themselves and keep: metrics, evaluations, checkpoints."""

    def __init__(self, plan: Plan, runs: Mapping[int, Path], group: ProcessGroup):
        config, validation = plan.config, plan.cohort.split("val")
        self._plan, self._paths, self._group = plan, list(runs.values()), group
        self._rate = learning_rate(config.optimizer, config.train.steps)
        sizes, stored = (config.data.region_buckets, config.data.regions_per_bag), config.data.features
        self._forward = Forward(plan.models[0], *sizes, local_mesh(), plan.normaliser, stored)
        self._slides = self._evaluation("val")
        others = plan.models[0], config, validation, plan.normaliser
        self._tiles = TaskEvaluation(plan.tasks, *others) if plan.tasks else None
        self._checkpoints = [Checkpointer(path, config.train.keep_best) for path in self._paths]

    def restored(self) -> TrainState:
        """The state of the newest checkpoints, or before the first step."""
        plan = self._plan
        states = (
            saved.restore(init_state(model, plan.optimizer, plan.config, plan.mesh, plan.mining))
            for model, saved in zip(plan.models, self._checkpoints, strict=True)
        )
        return plan.ensemble.join(states) if plan.ensemble else next(states)

    @contextmanager
    def from_step(self, start: int) -> Iterator[None]:
        """Open for reports."""
        with ExitStack() as opened:
            for path, saved in zip(self._paths, self._checkpoints, strict=True):
                opened.enter_context(log_to_run(path, self._group.process_index))
                opened.enter_context(closing(saved))
            self._writers = [
                opened.enter_context(MetricWriter(path, start, self._group.is_main)) for path in self._paths
            ]
            self._progress = _Progress(start, self._plan.config)
            yield

    def report(self, number: int, metrics: Metrics | EnsembleMetrics, waited_s: float) -> None:
        """A step's metrics. Raises InputError if one is not finite."""
        scalars = [_checked(one, number) for one in (apart(metrics) if self._plan.ensemble else [metrics])]
        shared = {"train/learning_rate": float(self._rate(number - 1)), **self._progress.speed(number, waited_s)}
        for writer, found in zip(self._writers, scalars, strict=True):
            writer.write(number, {f"train/{name}": value for name, value in found.items()} | shared)
        self._progress.show(number, [found["loss"] for found in scalars], waited_s)

    def save(self, number: int, state: TrainState, evaluates: bool) -> None:
        """Checkpoints, with the metrics of the validation slides if they are evaluated."""
        own = self._plan.ensemble.split(state) if self._plan.ensemble else [state]
        for path, writer, saved, one in zip(self._paths, self._writers, self._checkpoints, own, strict=True):
            evaluated = self._evaluated(number, one) if evaluates else None
            if evaluated:
                writer.write(number, {f"val/{name}": value for name, value in evaluated.items()})
                told = ", ".join(f"{name} {value:.3f}" for name, value in evaluated.items())
                log.info(f"step {number}: validation {f'of {path.name} ' if self._plan.ensemble else ''}{told}")
            self._group.report_progress(number, "saving")
            saved.save(one, evaluated)

    def _evaluated(self, number: int, state: TrainState) -> dict[str, float] | None:
        each = partial(self._group.report_progress, number, "evaluating")
        with memory_errors(lambda words: InputError(f"{self._paths[0]}: {words} {_OUTSIDE}")):
            params = on_local_mesh(state.params, self._plan.mesh, local_mesh())
            found = self._slides.metrics(params, each)
            return found | self._tiles.metrics(params, each) if found and self._tiles else found

    def finish(self) -> None:
        """Waits for the checkpoints, and fits what is of the finished run alone."""
        for path, model, saved in zip(self._paths, self._plan.models, self._checkpoints, strict=True):
            saved.close()
            if self._plan.config.model.head == BY_DENSITY and not is_fitted(path):
                self._fit_density(path, model)
            log.info(f"{path}: trained to step {self._plan.config.train.steps}")

    def _fit_density(self, path: Path, model: MILModel) -> None:
        """The density of the slides, as the best checkpoint sees them, into the run directory."""
        log.info(f"{path}: seeing all training slides, to tell how usual others are")
        params, _ = restore_params(path, model)
        params = jax.device_put(params, replicated(local_mesh()))
        each = partial(self._group.report_progress, self._plan.config.train.steps, "seeing the training slides")
        training = self._evaluation("train")
        with memory_errors(lambda words: InputError(f"{path}: {words} {_OUTSIDE}")):
            known, others = (slides.summaries(params, each) for slides in (training, self._slides))
        if self._group.is_main:
            fit_density(known, training.labels, others).save(path)

    def _evaluation(self, split: str) -> Evaluation:
        config = self._plan.config
        of_run = config.model.encoder, config.data.unit, config.data.magnifications
        return Evaluation(config.data.store, self._plan.cohort.split(split), self._forward, *of_run)


def _checked(metrics: Metrics, number: int) -> dict[str, float]:
    scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(value == value and abs(value) != float("inf") for value in scalars.values()):
        raise InputError(f"the loss is not finite at step {number} ({scalars}); lower config.optimizer.learning_rate")
    return scalars


class _Progress:
    def __init__(self, start: int, config: ConfigDict):
        self._start, self._config = start, config
        self._began: float | None = None
        self._from, self._waited_s = start, 0.0

    def speed(self, number: int, waited_s: float) -> dict[str, float]:
        """Steps per second, slides per hour and the part of the time in which steps waited for data, since the first report.

        What came before it would falsify them: compilation, and the first batches.
        """
        now = time.monotonic()
        if self._began is None:
            self._began, self._from, self._waited_s = now, number, waited_s
            return {}
        passed_s = now - self._began
        steps_per_s = (number - self._from) / passed_s
        return {
            "train/steps_per_s": steps_per_s,
            "train/slides_per_hour": steps_per_s * self._config.data.batch_size * 3600,
            "train/data_wait": (waited_s - self._waited_s) / passed_s,
        }

    def show(self, number: int, losses: Sequence[float], waited_s: float) -> None:
        speed = self.speed(number, waited_s)
        line = f"step {number}/{self._config.train.steps}  loss " + " ".join(f"{loss:.3f}" for loss in losses)
        if speed and speed["train/steps_per_s"] > 0:
            left = (self._config.train.steps - number) / speed["train/steps_per_s"]
            line += (
                f"  {speed['train/steps_per_s']:.2f} steps/s  {speed['train/slides_per_hour']:,.0f} slides/hour"
                f"  {left / 60:.1f} min left"
            )
        log.info(line)
