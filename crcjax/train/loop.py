"""Training, from a config to a run directory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from clu import parameter_overview
from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crcjax.data.bags import featured, open_features, open_stores
from crcjax.data.case_bags import rows_by_unit
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.hard_mining import Miner, Mining, start_mining
from crcjax.data.loader import Feed, open_feed
from crcjax.data.splits import divide
from crcjax.errors import DeviceMemoryError, InputError, StoppedError
from crcjax.models.encoders.registry import PRETRAINED
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import MILModel, build_model
from crcjax.monitor.logs import kept_in, say
from crcjax.monitor.metric_writer import MetricWriter
from crcjax.parallel.mesh import described, device_mesh, local_mesh, on_local_mesh, replicated
from crcjax.parallel.process_group import Group
from crcjax.predict.feature_density import check_bags, fit_density, is_fitted
from crcjax.runs.checkpoint import Checkpointer, newest_step, restore_params
from crcjax.runs.pretrained_weights import is_kept, load_published
from crcjax.runs.run_directory import start_run
from crcjax.slides.stain.normalisation import StainNormaliser, stain_normaliser
from crcjax.slides.store.features import FeatureReader, feature_attributes
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.plan import TilingParams
from crcjax.train.auxiliary_tasks import Tasks, add_heads, check_tasks, open_tasks
from crcjax.train.ensemble import Ensemble, apart, check_members, member_config, side_by_side, with_encoder_of
from crcjax.train.evaluate import Evaluation, TaskEvaluation
from crcjax.train.losses import check_loss
from crcjax.train.memory_budget import (
    Budget,
    Parts,
    fitting_step,
    keep_parts,
    memory_errors,
    memory_of_step,
    more_parts,
)
from crcjax.train.optimizer import build_optimizer, learning_rate
from crcjax.train.step import Forward, JointMetrics, Metrics, TrainState, abstract_state, build_step, init_state

_OUTSIDE = "That was in an evaluation, not in a step: lower config.data.regions, of which it encodes as many, or the model's width"


def train(config: ConfigDict, run: Path, group: Group | None = None) -> None:
    """Trains to config.train.steps, going on from the run's newest checkpoint if it has one.

    With config.train.members above 1 it trains as many runs, RUN/seed-S, together (`train_members`).
    Where a device's memory does not suffice after all, the micro-batch is halved, and the run goes on from its last
    checkpoint: a step's own state is donated, and a copy of it would take the memory that lacks.
    Raises InputError before anything is written if the config, the cohort, the store or the run directory is not
    usable, or no step fits the devices; OutputError if the run directory cannot be written; StoppedError once a checkpoint
    is saved, if the group is asked to stop.
    """
    if config.train.members != 1:
        seeds = range(config.seed, config.seed + config.train.members)
        train_members(config, {seed: run / f"seed-{seed}" for seed in seeds}, group)
    else:
        _train_on(config, {config.seed: run}, group or Group())


def train_members(config: ConfigDict, runs: Mapping[int, Path], group: Group | None = None) -> None:
    """Trains runs, by seed, that differ in it alone: config.train.members at a time in one step, on the same bags.

    Each is a run as any other, and as if trained alone with its own config, but for rounding. Raises as `train`, and
    InputError where runs cannot be trained together.
    """
    check_members(config)
    for part in side_by_side(runs, config.train.members, newest_step):
        _train_on(config, part, group or Group())


def _train_on(config: ConfigDict, runs: Mapping[int, Path], group: Group) -> None:
    run = next(iter(runs.values()))
    while True:
        try:
            return _train(config, runs, group)
        except DeviceMemoryError as error:
            # Of the parts that the run was started with, which this process has kept there.
            message = f"{run}: {error} Steps are computed in {more_parts(run, error.parts)} parts from now on"
            if jax.process_count() > 1:  # the others wait within the step: the run starts anew
                raise DeviceMemoryError(f"{message}; give the same command again", error.parts) from error
            say(message)
        gc.collect()  # what the failed step's frames held


def _train(config: ConfigDict, runs: Mapping[int, Path], group: Group) -> None:
    plan, run = _planned(config, runs), next(iter(runs.values()))
    config = plan.config
    _start(plan, runs, group)
    record = _Record(plan, runs, group)
    state = record.restored()
    start = int(np.max(state.step))
    miner = Miner(run, plan.bags_of, config, state.mining, start)
    batches = plan.feed.batches(start, miner.board)
    # The miner is left before the batches are closed: readers that wait for it would never end.
    with memory_of_step(plan.parts), record.from_step(start), closing(batches), miner:
        say(f"{parameter_overview.count_parameters(state.params):,} parameters on {described(plan.mesh)}")
        for path in runs.values():
            say(f"{path}: going on from step {start}" if start else f"{path}: starting")
        say(f"memory {plan.budget}; bags in {plan.parts.count} of at most {max(plan.parts.possible)} parts")
        if config.model.batch_norm:
            say(_statistics(config, plan.parts.count))
        for number, bags in enumerate(batches, start + 1):
            group.at(number, "computing")
            state, metrics = plan.step(state, bags)
            batches.follow(metrics["loss"])
            miner.after(number, state.mining)
            stops, last = group.stops(number), number == config.train.steps
            evaluates = last or number % config.train.eval_every == 0
            saves = evaluates or stops or number % config.train.checkpoint_every == 0
            if config.train.agree_every and number % config.train.agree_every == 0:
                group.compare(number, {"gradient norm": metrics["gradient_norm"], "parameter": state.params})
            if saves or number % config.train.log_every == 0:
                # Before every save, too: a run resumed from a checkpoint that is not finite would never recover.
                record.report(number, metrics, group.largest(batches.waited_s))
            if saves:
                record.save(number, state, evaluates)
            if stops and not last:
                raise StoppedError(
                    f"{run}: stopped as asked, step {number} is saved; the same command goes on from there"
                )
            group.at(number + 1, "reading its bags")
        record.finish()


@dataclass(frozen=True)
class _Plan:
    """What is settled before anything is written; `ensemble` if several runs are trained together."""

    config: ConfigDict
    cohort: Cohort
    tiling: TilingParams
    normaliser: StainNormaliser | None
    mesh: Mesh
    models: tuple[MILModel, ...]  # one a run
    optimizer: optax.GradientTransformation
    feed: Feed
    bags_of: Cohort
    mining: Mining | None
    tasks: Tasks | None
    ensemble: Ensemble | None
    step: jax.stages.Compiled
    budget: Budget
    parts: Parts


def _planned(config: ConfigDict, runs: Mapping[int, Path]) -> _Plan:
    (first, run), together = next(iter(runs.items())), config.train.members > 1
    config = member_config(config, first) if together else config
    cohort = _cohort(config)
    check_loss(config.train.loss, config.model.head)
    check_tasks(config)
    stores = open_stores(config.data.store, cohort, not config.data.features, config.data.magnifications)
    tiling = stores[0].params
    config = _with_seen(_with_imported(config, stores), stores)
    normaliser = stain_normaliser(config.stain.method, config.stain.reference, config.data.store)
    _use_compilation_cache()
    mesh = device_mesh(config)
    of_seed = partial(build_model, config.model, len(cohort.classes), factors=tiling.factors)
    model = of_seed(config.seed)
    kept = _load_published(model, config, stores)
    optimizer = build_optimizer(config.optimizer, config.train.steps, kept)
    training = cohort.split("train")
    bags_of = rows_by_unit(config.data.unit, training)
    if config.model.head == BY_DENSITY:
        check_bags(len(bags_of.rows), len(rows_by_unit(config.data.unit, cohort.split("val")).rows))
    mining = start_mining(config.data, len(bags_of.rows))
    feed = open_feed(training, config, mesh, normaliser)
    tasks = open_tasks(config, feed.reader.tile_labels, feed.reader.stains)
    if tasks:
        add_heads(model, tasks, config.seed)
    build = partial(build_step, model, optimizer, mesh=mesh, normaliser=normaliser, tasks=tasks)
    abstract = abstract_state(model, optimizer, config, mesh, mining)
    ensemble = Ensemble(partial(of_seed, first), optimizer, config, mesh) if together else None
    if ensemble:
        build, abstract = partial(ensemble.build, tuple(runs)), ensemble.abstract(len(runs))
    compiled = fitting_step(build, config, mesh, abstract, feed.shapes(), run)
    models = tuple(_on_host(model if seed == first else with_encoder_of(model, of_seed(seed))) for seed in runs)
    of_data = feed, bags_of, mining, tasks
    return _Plan(config, cohort, tiling, normaliser, mesh, models, optimizer, *of_data, ensemble, *compiled)


def _load_published(model: MILModel, config: ConfigDict, stores: Sequence[TileStore]) -> Callable | None:
    """Reads a published encoder's weights into the model; which parameters then stay as they are."""
    if config.model.encoder not in PRETRAINED or config.model.imported_features:
        return None
    sha256 = load_published(model, config.model)
    say(f"{config.model.weights}: SHA-256 {sha256}")
    if config.data.features:
        _check_features(config, stores, sha256)
    return partial(is_kept, config.model.frozen)


def _on_host(model: MILModel) -> MILModel:
    """The model, its parameters off the devices: of these the run's state alone has a copy."""
    # Copied: NumPy's view of an array of a CPU would keep it there.
    nnx.update(model, jax.tree.map(np.array, nnx.state(model)))
    return model


def _start(plan: _Plan, runs: Mapping[int, Path], group: Group) -> None:
    """The run directories: the main process writes them, the others then look at them."""
    if not group.main:
        group.wait("the run directory")
    for seed, path in runs.items():
        own_config = member_config(plan.config, seed) if plan.ensemble else plan.config
        start_run(path, own_config, plan.tiling, plan.cohort, plan.normaliser, group.main)
    if group.main:
        group.wait("the run directory")
    for path in runs.values():
        keep_parts(path, plan.parts)


class _Record:
    """What runs that are trained together say of themselves and keep: metrics, evaluations, checkpoints."""

    def __init__(self, plan: _Plan, runs: Mapping[int, Path], group: Group):
        config, validation = plan.config, plan.cohort.split("val")
        self._plan, self._paths, self._group = plan, list(runs.values()), group
        self._rate = learning_rate(config.optimizer, config.train.steps)
        sizes, stored = (config.data.region_buckets, config.data.regions), config.data.features
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
                opened.enter_context(kept_in(path, self._group.process))
                opened.enter_context(closing(saved))
            self._writers = [opened.enter_context(MetricWriter(path, start, self._group.main)) for path in self._paths]
            self._progress = _Progress(start, self._plan.config)
            yield

    def report(self, number: int, metrics: Metrics | JointMetrics, waited_s: float) -> None:
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
                say(f"step {number}: validation {f'of {path.name} ' if self._plan.ensemble else ''}{told}")
            self._group.at(number, "saving")
            saved.save(one, evaluated)

    def _evaluated(self, number: int, state: TrainState) -> dict[str, float] | None:
        each = partial(self._group.at, number, "evaluating")
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
            say(f"{path}: trained to step {self._plan.config.train.steps}")

    def _fit_density(self, path: Path, model: MILModel) -> None:
        """The density of the slides, as the best checkpoint sees them, into the run directory."""
        say(f"{path}: seeing all training slides, to tell how usual others are")
        params, _ = restore_params(path, model)
        params = jax.device_put(params, replicated(local_mesh()))
        each = partial(self._group.at, self._plan.config.train.steps, "seeing the training slides")
        training = self._evaluation("train")
        with memory_errors(lambda words: InputError(f"{path}: {words} {_OUTSIDE}")):
            known, others = (slides.summaries(params, each) for slides in (training, self._slides))
        if self._group.main:
            fit_density(known, training.labels, others).save(path)

    def _evaluation(self, split: str) -> Evaluation:
        config = self._plan.config
        of_run = config.model.encoder, config.data.unit, config.data.magnifications
        return Evaluation(config.data.store, self._plan.cohort.split(split), self._forward, *of_run)


def _cohort(config: ConfigDict) -> Cohort:
    """The labelled slides of the training and validation cases."""
    for name in ("store", "cohort"):
        if not config.data[name]:
            raise InputError(f"config.data.{name} is empty; give --config.data.{name}=PATH")
    if config.data.unit == "case" and (config.stain.method != "none" or config.augment.exchange):
        raise InputError(
            "config.data.unit case: the slides of a case have several stains, the device is told one a bag; tile them "
            "with crcjax tile --stain, and set config.stain.method to none and config.augment.exchange to 0"
        )
    cohort = load_cohort(config.data.cohort, config.data.classes)
    cohort = divide(cohort, config.data)
    rows = tuple(row for row in cohort.rows if row.subtype and row.split in ("train", "val"))
    if not rows:
        raise InputError(f"{config.data.cohort}: has no labelled slide to train on; fill in the column subtype")
    return Cohort(rows, cohort.classes)


def _with_imported(config: ConfigDict, stores: Sequence[TileStore]) -> ConfigDict:
    """The config with the width of imported features, if it trains on such: nobody knows the weights that made them."""
    config = config.copy_and_resolve_references()
    config.model.imported_features = 0
    if not config.data.features:
        return config
    if config.stain.method != "none":
        raise InputError("config.data.features were made of tiles as they are; set config.stain.method to none")
    name = config.model.encoder
    if "imported" not in (feature_attributes(config.data.store, stores[0].slide_id, name) or {}):
        if name not in PRETRAINED or not config.model.frozen:
            raise InputError(
                "config.data.features needs config.model.encoder of docs/encoders.md, with config.model.frozen, or the name of "
                f"imported features, which {stores[0].path} has none of"
            )
        return config
    if config.model.weights:
        raise InputError(
            f"config.model.weights: the features of {name} were imported, and nothing says that {config.model.weights} "
            "made them; leave it empty, or embed the slides with it"
        )
    config.model.imported_features = FeatureReader(config.data.store, stores[0].slide_id, name).width
    return config


def _with_seen(config: ConfigDict, stores: Sequence[TileStore]) -> ConfigDict:
    """The config with the magnifications that have features, if not all have: prediction sees no others either."""
    if config.data.features and not config.data.magnifications:
        config.data.magnifications = featured(stores, config.model.encoder)
    return config


def _check_features(config: ConfigDict, stores: Sequence[TileStore], sha256: str) -> None:
    """Prediction computes features with the run's weights: those that it was trained on must be the same."""
    found = open_features(stores, config.model.encoder, config.data.magnifications)[0]
    if found.attributes.get("weights_sha256") != sha256:
        raise InputError(f"{found.path}: was made with other weights than {config.model.weights}; embed with these")


def _statistics(config: ConfigDict, parts: int) -> str:
    """What batch norms take their statistics of, in words."""
    regions = config.data.regions // -(-config.data.regions // config.model.encode_regions)
    words = f"batch norms take statistics of {config.data.bags // parts} bags x {regions} regions at a time"
    if parts > config.train.micro_batches:
        words += (
            f": memory does not suffice for config.train.micro_batches {config.train.micro_batches}, and in {parts} parts the run "
            "learns otherwise, not only rounded otherwise"
        )
    return words


def _checked(metrics: Metrics, number: int) -> dict[str, float]:
    scalars = {name: float(value) for name, value in jax.device_get(metrics).items()}
    if not all(value == value and abs(value) != float("inf") for value in scalars.values()):
        raise InputError(f"the loss is not finite at step {number} ({scalars}); lower config.optimizer.learning_rate")
    return scalars


def _use_compilation_cache() -> None:
    """XLA's programs are kept between runs, unless the user has set where."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crcjax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


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
            "train/slides_per_hour": steps_per_s * self._config.data.bags * 3600,
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
        say(line)
