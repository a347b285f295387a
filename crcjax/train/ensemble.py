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
from crcjax.models.encoders.registry import PublishedEncoder
from crcjax.models.mil import MILModel, Params, build_model
from crcjax.models.random_keys import Purpose, run_key
from crcjax.monitor.logs import log
from crcjax.parallel.mesh import replicated
from crcjax.parallel.process_group import ProcessGroup
from crcjax.runs.checkpoint import newest_step
from crcjax.runs.train_state import TrainState
from crcjax.train.memory_budget import fitting_step, memory_of_step, train_in_smaller_parts
from crcjax.train.metrics import IntervalMetrics
from crcjax.train.record import Progress, Record, Validation, checked, due_after, log_plan, start_directory
from crcjax.train.setup import model_of_seed, on_host, plan_run
from crcjax.train.step import abstract_state, step_setup, train_step

EnsembleMetrics = dict[str, Float32[Array, " member"]]


def train_members(config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup | None = None) -> None:
    """Trains runs that differ in their seed only, config.train.ensemble_size at a time in one step, on the same bags.

    Each member has an ordinary run directory and matches training it alone with that directory's config, up to rounding.

    Args:
      config: the config of all runs.
      runs: the run directories by seed.
      group: this process.

    Raises as `crcjax.train.loop.train`, and InputError for runs that cannot be trained in one step.
    """
    check_members(config)
    for part in side_by_side(runs, config.train.ensemble_size, newest_step):
        first_run = next(iter(part.values()))
        train_in_smaller_parts(first_run, partial(_train_members, config, part, group or ProcessGroup()))


def _train_members(config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup) -> None:
    """As the loop of a single run, without mining and other processes, which ensembles do not have."""
    seeds = tuple(runs)
    plan = plan_run(member_config(config, seeds[0]))
    config = plan.config
    of_seed = partial(model_of_seed, config, plan.data)
    classes, factors = len(plan.data.cohort.classes), plan.data.tiling.factors
    abstract_model = partial(build_model, config.model, classes, seeds[0], factors)
    ensemble = Ensemble(abstract_model, plan.optimizer, config, plan.mesh)
    shapes, run = plan.data.feed.shapes(), runs[seeds[0]]
    build = partial(ensemble.build, seeds)
    step, budget, parts = fitting_step(build, config, plan.mesh, ensemble.abstract(len(seeds)), shapes, run)
    models = [plan.model, *(on_host(with_encoder_of(plan.model, of_seed(seed))) for seed in seeds[1:])]
    for seed, path in runs.items():
        start_directory(path, plan, member_config(config, seed), parts, group)
    validation = Validation(plan, group)
    records = [Record(plan, path, group, validation, path.name) for path in runs.values()]
    state = ensemble.join(record.restored(model) for record, model in zip(records, models, strict=True))
    start = int(np.max(state.step))
    batches, metrics, progress = plan.data.feed.batches(start), IntervalMetrics(), Progress(start, config)
    with memory_of_step(parts), ExitStack() as stack:
        for record in records:
            stack.enter_context(record.opened(start))
        stack.enter_context(closing(batches))
        log_plan(plan, state.params, budget, parts)
        with jax.transfer_guard("disallow"):
            for number, batch in enumerate(batches, start + 1):
                group.report_progress(number, "computing")
                state, step_metrics = step(state, batch)
                metrics.add(step_metrics)
                batches.follow(step_metrics["loss"])
                stops = group.should_stop(number)
                due = due_after(number, config.train, stops)
                if due.report:
                    scalars = [checked(member, number) for member in apart(metrics.compute())]
                    speed = progress.speed(number, batches.waited_s)
                    for record, member in zip(records, scalars, strict=True):
                        record.write(number, member, speed)
                    log.info(progress.line(number, [member["loss"] for member in scalars], speed))
                if due.checkpoint:
                    for record, member_state in zip(records, ensemble.split(state), strict=True):
                        record.save(number, member_state, due.evaluation)
                if stops and number < config.train.steps:
                    raise StoppedError(f"{run.parent}: stopped at step {number}; the same command goes on")
                group.report_progress(number + 1, "reading its bags")
        for record, model in zip(records, models, strict=True):
            record.finish(model)


def check_members(config: ConfigDict) -> None:
    """Raises InputError where runs cannot be trained together: each would see other bags, or an encoder is trained."""
    members, reason = f"config.train.ensemble_size {config.train.ensemble_size}", ""
    if config.train.ensemble_size < 1:
        raise InputError(f"{members}: choose 1 or more")
    if not config.data.features:
        reason = "runs are trained together on stored features alone, not on pixels; set config.data.features"
    elif config.data.mine_slides or config.data.mine_regions:
        reason = "each run mines bags of its own, and those trained together share them; set config.data.mine_slides and mine_regions to 0"
    elif config.tasks.tissue or config.tasks.stain or config.tasks.artefact:
        reason = "runs that are trained together have no tasks; set config.tasks.tissue, stain and artefact to 0"
    elif jax.process_count() > 1:
        reason = "one process trains runs together, not several; start one"
    if reason:
        raise InputError(f"{members}: {reason}, or config.train.ensemble_size to 1")


def member_config(config: ConfigDict, seed: int) -> ConfigDict:
    """The config of one run of an ensemble: trained alone with it, the run sees the same bags."""
    config = config.copy_and_resolve_references()
    if config.data.sampling_seed < 0:
        config.data.sampling_seed = config.seed
    config.seed, config.train.ensemble_size = seed, 1
    return config


def side_by_side(runs: Mapping[int, Path], most: int, step_of: Callable[[Path], int]) -> list[dict[int, Path]]:
    """The runs (by seed) in groups that train together: at most `most`, all at the same step.

    Runs that a kill left at different steps train in groups of their own: to each it makes no difference but rounding.
    """
    at: dict[int, list[int]] = {}
    for seed, run in runs.items():
        at.setdefault(step_of(run), []).append(seed)
    parts = [seeds[first : first + most] for seeds in at.values() for first in range(0, len(seeds), most)]
    return [{seed: runs[seed] for seed in seeds} for seeds in parts]


def with_encoder_of(first: MILModel, model: MILModel) -> MILModel:
    """The model with the published encoder, if there is one, of the first, whose weights were read."""
    if isinstance(model.encoder, PublishedEncoder):
        assert isinstance(first.encoder, PublishedEncoder)
        model.encoder.published = first.encoder.published
    return model


class Ensemble:
    """The states of runs as one, with a leading axis of members in every array.

    A published encoder is in none of it: features are stored, so that no step reads its parameters. They are kept once,
    and every run's own state has them.
    """

    def __init__(
        self, model: Callable[[], MILModel], optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh
    ):
        whole = nnx.eval_shape(model)
        self._whole = abstract_state(whole, optimizer, config, mesh)
        if isinstance(whole.encoder, PublishedEncoder):
            whole.encoder.published = None  # type: ignore[assignment]
        self._model, self._optimizer, self._mesh = whole, optimizer, mesh
        self._member = abstract_state(whole, optimizer, config, mesh)
        self._published: Params | None = None

    def abstract(self, members: int) -> TrainState:
        """The shapes and the layout of the state, for compiling without one."""
        return with_member_axis(self._member, members)

    def build(self, seeds: tuple[int, ...], config: ConfigDict) -> Callable[..., Any]:
        """The step of all members."""
        return build_ensemble_step(self._model, self._optimizer, config, self._mesh, seeds)

    def join(self, states: Iterable[TrainState]) -> TrainState:
        """The states of runs as one."""
        leaves = []
        for state in states:
            encoder = dict(state.params["encoder"])
            published = encoder.pop("published", None)
            self._published = published if self._published is None else self._published
            leaves.append(jax.tree.leaves(replace(state, params=state.params | {"encoder": encoder})))
        abstract = self.abstract(len(leaves))
        layout = [value.sharding for value in jax.tree.leaves(abstract)]
        stack = jax.jit(
            lambda *members: [jnp.stack(parts) for parts in zip(*members, strict=True)], out_shardings=layout
        )
        return jax.tree.unflatten(jax.tree.structure(abstract), stack(*leaves))

    def split(self, state: TrainState) -> list[TrainState]:
        """Each run's own state, as it is when trained alone."""
        layout = jax.tree.map(lambda value: value.sharding, self._member)
        split = jax.jit(apart, out_shardings=[layout] * len(state.step))
        return [self._completed(member) for member in split(state)]

    def _completed(self, state: TrainState) -> TrainState:
        params = state.params
        if self._published is not None:
            params = params | {"encoder": params["encoder"] | {"published": self._published}}
        # The optimiser has no moments of the encoder, but a place for each of its parameters.
        moments = jax.tree.unflatten(jax.tree.structure(self._whole.moments), jax.tree.leaves(state.moments))
        return replace(state, params=params, moments=moments)


def build_ensemble_step(
    model: MILModel, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh, seeds: Sequence[int]
) -> Callable[[TrainState, Bag], tuple[TrainState, EnsembleMetrics]]:
    """`train_step`, jitted and vmapped over ensemble members, one a seed, which all see the same bags."""
    model.set_attributes(fused=False, raise_if_not_found=False)  # fused attention kernels cannot be vmapped
    setup = step_setup(model, optimizer, config, mesh)
    abstract = with_member_axis(abstract_state(model, optimizer, config, mesh), len(seeds))
    layout = jax.tree.map(lambda value: value.sharding, abstract)

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    def step(state: TrainState, bag: Bag) -> tuple[TrainState, EnsembleMetrics]:
        keys = jax.vmap(lambda seed: run_key(seed, Purpose.TRAINING_STEP))(jnp.array(seeds))
        return jax.vmap(lambda member, key: train_step(member, bag, key, setup))(state, keys)

    return step


def with_member_axis(state: TrainState, members: int) -> TrainState:
    """The abstract state of an ensemble from that of a member: every device holds its part of each member."""

    def with_axis(value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(value.sharding.mesh, PartitionSpec(None, *value.sharding.spec))
        return jax.ShapeDtypeStruct((members, *value.shape), value.dtype, sharding=sharding)

    return jax.tree.map(with_axis, state)


def apart(values: Any) -> list[Any]:
    """What stands along the leading axis of every array, one by one."""
    count = len(jax.tree.leaves(values)[0])
    return [jax.tree.map(lambda value, at=at: value[at], values) for at in range(count)]
