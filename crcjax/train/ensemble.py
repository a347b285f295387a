"""Ensembles: runs that differ in their seed only, trained by one vmapped step on the same bags."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32
from ml_collections import ConfigDict

from crcjax.data.bags import Bag
from crcjax.errors import InputError, StoppedError
from crcjax.models.encoders.registry import PublishedEncoder, StoredEncoder
from crcjax.models.mil import MILModel, Params, build_model
from crcjax.models.random_keys import Purpose, run_key
from crcjax.monitor.goodput import COMPILE, STEPS, Ledger
from crcjax.monitor.heartbeat import COMPUTING, READING
from crcjax.monitor.logs import log
from crcjax.parallel.mesh import replicated
from crcjax.parallel.process_group import ProcessGroup
from crcjax.runs.checkpoint import newest_step
from crcjax.runs.train_state import TrainState
from crcjax.train.cluster_monitoring import cluster_monitor
from crcjax.train.memory_budget import fitting_step, retry_with_smaller_micro_batches, step_memory_errors
from crcjax.train.metrics import IntervalMetrics
from crcjax.train.record import Progress, Record, Validation, checked, due_after, log_plan, start_directory
from crcjax.train.save_interval import save_timer
from crcjax.train.setup import model_of_seed, on_host, plan_run
from crcjax.train.step import abstract_state, step_setup, train_step

EnsembleMetrics = dict[str, Float32[Array, " member"]]


def train_members(
    config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup | None = None, age_s: float = 0.0
) -> None:
    """Trains runs that differ in their seed, as ensembles of config.train.ensemble_size members in one vmapped step.

    All members see the same bags. Each member has an ordinary run directory and matches training it alone with that
    directory's config, up to rounding.

    Args:
      config: the config of all runs.
      runs: the run directories by seed.
      group: this process's place in its process group.
      age_s: the seconds that this process has spent on the runs before, for the goodput ledger.

    Raises:
      InputError: the runs cannot be trained in one step (`check_members`).
      CrcjaxError: like `crcjax.train.loop.train`.
    """
    check_members(config)
    group = group or ProcessGroup()
    key = Path(config.train.signing_key) if config.train.signing_key else None
    for members in ensembles_of_runs(runs, config.train.ensemble_size, partial(newest_step, signing_key=key)):
        first_run = next(iter(members.values()))
        with group.heartbeat, Ledger(age_s) as ledger:
            train_ensemble = partial(_train_ensemble, config, members, group, ledger)
            retry_with_smaller_micro_batches(first_run, train_ensemble)
        # Of several ensembles, the first one was waited for.
        age_s = 0.0


def _train_ensemble(config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup, ledger: Ledger) -> None:
    """Like the loop of a single run, without hard mining and without several processes, which ensembles do not support."""
    seeds = tuple(runs)
    group.report_progress(0, "opening its data")
    plan = plan_run(member_config(config, seeds[0]))
    config = plan.config
    build_member = partial(model_of_seed, config, plan.data)
    classes, factors = len(plan.data.cohort.classes), plan.data.tiling.factors
    build_first = partial(build_model, config.model, classes, seeds[0], factors)
    ensemble = Ensemble(build_first, plan.optimizer, config, plan.mesh)
    shapes, run = plan.data.feed.shapes(), runs[seeds[0]]
    build_step = partial(ensemble.build, seeds)
    group.report_progress(0, "compiling")
    with ledger.account(COMPILE):
        step, budget, micro_batches = fitting_step(
            build_step, config, plan.mesh, ensemble.abstract(len(seeds)), shapes, run
        )
    models = [plan.model, *(on_host(with_encoder_of(plan.model, build_member(seed))) for seed in seeds[1:])]
    for seed, path in runs.items():
        start_directory(path, plan, member_config(config, seed), micro_batches, group)
    validation = Validation(plan, group)
    ledger.open(runs.values())
    group.start_heartbeats(runs.values())
    timer = save_timer(config.train, ledger)
    records = [Record(plan, path, group, ledger, timer, validation, path.name) for path in runs.values()]
    state = ensemble.join(record.restored(model) for record, model in zip(records, models, strict=True))
    start = int(np.max(state.step))
    batches, progress = plan.data.feed.batches(start), Progress(start, config)
    metrics = IntervalMetrics(joined([record.memory.get("metrics", {}) for record in records]))
    monitor = cluster_monitor(config.monitor, run, group, budget)
    with step_memory_errors(micro_batches), ExitStack() as stack:
        stack.enter_context(monitor)
        for record in records:
            stack.enter_context(record.logged())
            stack.enter_context(record.opened(start))
        stack.enter_context(closing(batches))
        log_plan(plan, budget, micro_batches)
        with jax.transfer_guard("disallow"), ledger.account(STEPS):
            group.report_progress(start + 1, READING)
            for number, batch in enumerate(batches, start + 1):
                group.report_progress(number, COMPUTING)
                state, step_metrics = step(state, batch)
                metrics.add(step_metrics)
                batches.follow(step_metrics["loss"])
                stops = group.should_stop(number)
                due = due_after(number, config.train, stops, timer, group)
                ledger.finished_step(number, batches.waited_s, due.checkpoint)
                if due.report:
                    member_metrics = [checked(values, number) for values in unstack(metrics.compute())]
                    speed = progress.speed(number, batches.waited_s)
                    for record, values in zip(records, member_metrics, strict=True):
                        record.write(number, values, speed)
                    log.info(progress.line(number, [values["loss"] for values in member_metrics], speed))
                if due.checkpoint:
                    memory = metrics.memory()
                    for member, (record, member_state) in enumerate(zip(records, ensemble.split(state), strict=True)):
                        record.save(number, member_state, due, {name: sums[member] for name, sums in memory.items()})
                if stops and number < config.train.steps:
                    raise StoppedError(f"{run.parent}: stopped at step {number}; the same command resumes")
                group.report_progress(number + 1, READING)
        for record, model in zip(records, models, strict=True):
            record.finish(model)


def check_members(config: ConfigDict) -> None:
    """Raises InputError for a config that one vmapped step cannot train: it needs stored features and the same bags."""
    field, reason = f"config.train.ensemble_size {config.train.ensemble_size}", ""
    if config.train.ensemble_size < 1:
        raise InputError(f"config.train.ensemble_size must be at least 1, got {config.train.ensemble_size}; try 1")
    if not config.data.features:
        reason = "an ensemble is trained on stored features, not on pixels; set config.data.features"
    elif config.data.mine_slides or config.data.mine_regions:
        reason = "hard mining would give each member other bags; set config.data.mine_slides and mine_regions to 0"
    elif config.tasks.tissue or config.tasks.stain or config.tasks.artefact:
        reason = "an ensemble has no auxiliary tasks; set config.tasks.tissue, stain and artefact to 0"
    elif jax.process_count() > 1:
        reason = "an ensemble is trained by one process, not by several; start one"
    if reason:
        raise InputError(f"{field}: {reason}, or set config.train.ensemble_size to 1")


def member_config(config: ConfigDict, seed: int) -> ConfigDict:
    """The config of one ensemble member. A run trained alone with it sees the same bags."""
    config = config.copy_and_resolve_references()
    if config.data.sampling_seed < 0:
        config.data.sampling_seed = config.seed
    config.seed, config.train.ensemble_size = seed, 1
    return config


def ensembles_of_runs(
    runs: Mapping[int, Path], max_members: int, step_of: Callable[[Path], int]
) -> list[dict[int, Path]]:
    """Divides runs into ensembles of at most `max_members` that are at the same step.

    A kill can leave runs at different steps. Dividing them changes no run, except for rounding.

    Args:
      runs: the run directories by seed.
      max_members: config.train.ensemble_size.
      step_of: the step that a run resumes from.
    """
    seeds_at_step: dict[int, list[int]] = {}
    for seed, run in runs.items():
        seeds_at_step.setdefault(step_of(run), []).append(seed)
    ensembles = [
        seeds[first : first + max_members]
        for seeds in seeds_at_step.values()
        for first in range(0, len(seeds), max_members)
    ]
    return [{seed: runs[seed] for seed in seeds} for seeds in ensembles]


def with_encoder_of(first: MILModel, model: MILModel) -> MILModel:
    """The model with what all members share of the encoder of `first`: the published encoder, and the standardisation."""
    if isinstance(model.encoder, PublishedEncoder):
        assert isinstance(first.encoder, PublishedEncoder)
        model.encoder.published = first.encoder.published
    if isinstance(model.encoder, StoredEncoder):
        assert isinstance(first.encoder, StoredEncoder)
        model.encoder.standardiser = first.encoder.standardiser
    return model


class Ensemble:
    """The states of several runs as one state, with a leading axis of members in every array.

    The joint state has no published encoder: steps read stored features. Its parameters are kept once, and added to the
    state of each run.
    """

    def __init__(
        self, model: Callable[[], MILModel], optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
    ):
        abstract_model = nnx.eval_shape(model)
        # The state of a run, with the published encoder.
        self._run_state = abstract_state(abstract_model, optimizer, config, mesh)
        if isinstance(abstract_model.encoder, PublishedEncoder):
            abstract_model.encoder.published = None  # type: ignore[assignment]
        self._model, self._optimizer, self._mesh = abstract_model, optimizer, mesh
        # A member of the joint state, without it.
        self._member_state = abstract_state(abstract_model, optimizer, config, mesh)
        self._published: Params | None = None

    def abstract(self, members: int) -> TrainState:
        """The shapes, types and shardings of the joint state, for compiling."""
        return with_member_axis(self._member_state, members)

    def build(self, seeds: tuple[int, ...], config: ConfigDict) -> Callable[..., Any]:
        """The jitted step of all members."""
        return build_ensemble_step(self._model, self._optimizer, config, self._mesh, seeds)

    def join(self, states: Iterable[TrainState]) -> TrainState:
        """Joins the states of runs."""
        leaves = []
        for state in states:
            encoder = dict(state.params["encoder"])
            published = encoder.pop("published", None)
            self._published = published if self._published is None else self._published
            leaves.append(jax.tree.leaves(replace(state, params=state.params | {"encoder": encoder})))
        abstract = self.abstract(len(leaves))
        layout = [value.sharding for value in jax.tree.leaves(abstract)]
        stack = jax.jit(
            lambda *members: [jnp.stack(values) for values in zip(*members, strict=True)], out_shardings=layout
        )
        return jax.tree.unflatten(jax.tree.structure(abstract), stack(*leaves))

    def split(self, state: TrainState) -> list[TrainState]:
        """Splits the joint state into the state of each run, with the layout that a run trained alone has."""
        layout = jax.tree.map(lambda value: value.sharding, self._member_state)
        split = jax.jit(unstack, out_shardings=[layout] * len(state.step))
        return [self._with_published_encoder(member) for member in split(state)]

    def _with_published_encoder(self, state: TrainState) -> TrainState:
        params = state.params
        if self._published is not None:
            params = params | {"encoder": params["encoder"] | {"published": self._published}}
        # The optimiser state has no arrays for the frozen encoder, but an empty node for each of its parameters.
        moments = jax.tree.unflatten(jax.tree.structure(self._run_state.moments), jax.tree.leaves(state.moments))
        return replace(state, params=params, moments=moments)


def build_ensemble_step(
    model: MILModel, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh, seeds: Sequence[int]
) -> Callable[[TrainState, Bag], tuple[TrainState, EnsembleMetrics]]:
    """Compiles `train_step`, vmapped over the ensemble members (one per seed), which all see the same bags."""
    # Fused attention kernels cannot be vmapped.
    model.set_attributes(fused=False, raise_if_not_found=False)
    setup = step_setup(model, optimizer, config, mesh)
    abstract = with_member_axis(abstract_state(model, optimizer, config, mesh), len(seeds))
    layout = jax.tree.map(lambda value: value.sharding, abstract)

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    def step(state: TrainState, bag: Bag) -> tuple[TrainState, EnsembleMetrics]:
        keys = jax.vmap(lambda seed: run_key(seed, Purpose.TRAINING_STEP))(jnp.array(seeds))
        return jax.vmap(lambda member, key: train_step(member, bag, key, setup))(state, keys)

    return step


def with_member_axis(state: TrainState, members: int) -> TrainState:
    """The abstract joint state, from a member's: the axis of members is not divided over devices."""

    def with_axis(value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(value.sharding.mesh, PartitionSpec(None, *value.sharding.spec))
        return jax.ShapeDtypeStruct((members, *value.shape), value.dtype, sharding=sharding)

    return jax.tree.map(with_axis, state)


def joined(memories: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The interval metrics of an ensemble from those of its members; empty if they do not have the same ones."""
    if any(memory.keys() != memories[0].keys() for memory in memories):
        return {}
    return {name: [memory[name] for memory in memories] for name in memories[0]}


def unstack(values: Any) -> list[Any]:
    """Splits a tree of arrays along their leading axis into a list of trees."""
    count = len(jax.tree.leaves(values)[0])
    return [jax.tree.map(lambda value, index=index: value[index], values) for index in range(count)]
