"""The training step and the forward passes, as pure functions of the model's split state, compiled once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int, Key
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation, draw_augmentation
from crcjax.data.bags import Bag
from crcjax.data.hard_mining import Mining, after_step
from crcjax.errors import InputError
from crcjax.models.mil import MILModel, Params, Statistics, every, params_of
from crcjax.parallel.mesh import replicated
from crcjax.parallel.sharding import bag_spec, state_shardings
from crcjax.runs.train_state import LossScale, TrainState
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.train.auxiliary_tasks import Tasks
from crcjax.train.encode_step import build_encode, with_running
from crcjax.train.losses import bag_losses, supervised_contrastive

_FIRST_SCALE, _STEPS_TO_GROW = 2.0**15, 2000  # as Micikevicius et al. 2018 and their successors have them


Metrics = dict[str, Float32[Array, ""]]
JointMetrics = dict[str, Float32[Array, " member"]]
Seen = tuple[Array, Array, Array]  # of each bag: its loss, whether it was called rightly, the attention to its regions


def abstract_state(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    mining: Mining | None = None,
) -> TrainState:
    """The shapes and the layout of a state, for compiling without one."""
    state = jax.eval_shape(partial(_first, optimizer, config.model.dtype), params_of(model), mining)
    layout = state_shardings(state, mesh, config.mesh.fsdp_min_size)
    # Every process reads and changes all of what is remembered for mining.
    layout = replace(layout, mining=jax.tree.map(lambda _: replicated(mesh), state.mining))
    return jax.tree.map(lambda value, at: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=at), state, layout)


def init_state(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    mining: Mining | None = None,
) -> TrainState:
    """The state before the first step, each device given its own part. Every process must have the same model."""
    abstract = abstract_state(model, optimizer, config, mesh, mining)
    layout = jax.tree.map(lambda value: value.sharding, abstract)

    def place(value: Array | np.ndarray, at: NamedSharding) -> Array:
        held = np.asarray(value)
        return jax.make_array_from_callback(held.shape, at, lambda index: held[index])

    given = jax.tree.map(place, (params_of(model), mining), (layout.params, layout.mining))
    # The step donates its state, and the model keeps its own arrays: so params are copied.
    return jax.jit(partial(_first, optimizer, config.model.dtype), out_shardings=layout)(*given)


def _first(optimizer: optax.GradientTransformation, dtype: str, params: Params, mining: Mining | None) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    scaling = LossScale(jnp.float32(_FIRST_SCALE), zero) if dtype == "float16" else None
    return TrainState(zero, params, optimizer.init(params), scaling, mining)


def build_step(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    normaliser: StainNormaliser | None = None,
    tasks: Tasks | None = None,
) -> Callable[[TrainState, Bag], tuple[TrainState, Metrics]]:
    """The jitted step: state and bags to the next state and metrics. The state is donated; `tasks` are those that `model` has.

    With `config.train.micro_batches` the bags are computed so many parts at a time and their gradients added up: the same
    step, since every draw and weight is the whole batch's, but for batch norms' statistics, which with
    config.model.batch_norm_momentum are of one part's bags. Raises InputError for a loss that is no sum over bags.
    """
    # The kernels of attention can be divided over bags alone.
    model.set_attributes(fused=mesh.size == mesh.shape["data"], raise_if_not_found=False)
    following = _build_following(model, optimizer, config, mesh, normaliser, tasks)
    layout = jax.tree.map(lambda value: value.sharding, abstract_state(model, optimizer, config, mesh))
    layout = replace(layout, mining=replicated(mesh))  # of any mining

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    def step(state: TrainState, bag: Bag) -> tuple[TrainState, Metrics]:
        return following(jax.random.key(config.seed), state, bag)

    return step


def build_joint_step(
    model: MILModel, optimizer: optax.GradientTransformation, config: ConfigDict, mesh: Mesh, seeds: Sequence[int]
) -> Callable[[TrainState, Bag], tuple[TrainState, JointMetrics]]:
    """As `build_step`, of as many members as `seeds`, all on the same bags: states and metrics have a leading axis of them."""
    model.set_attributes(fused=False, raise_if_not_found=False)  # kernels of attention cannot be mapped over members
    following = _build_following(model, optimizer, config, mesh, None)
    layout = jax.tree.map(
        lambda value: value.sharding, joint(abstract_state(model, optimizer, config, mesh), len(seeds))
    )

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    def step(state: TrainState, bag: Bag) -> tuple[TrainState, JointMetrics]:
        keys = jax.vmap(jax.random.key)(jnp.array(seeds))
        return jax.vmap(following, in_axes=(0, 0, None))(keys, state, bag)

    return step


def joint(state: TrainState, members: int) -> TrainState:
    """The shapes and the layout of so many members' states as one: every device has its part of each member."""

    def of(value: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        at = NamedSharding(value.sharding.mesh, PartitionSpec(None, *value.sharding.spec))
        return jax.ShapeDtypeStruct((members, *value.shape), value.dtype, sharding=at)

    return jax.tree.map(of, state)


def _build_following(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    normaliser: StainNormaliser | None,
    tasks: Tasks | None = None,
) -> Callable[[Key[Array, ""], TrainState, Bag], tuple[TrainState, Metrics]]:
    """The step as a pure function of the run's key, its state and the bags."""
    micro_batches = config.train.micro_batches
    if micro_batches > 1 and config.train.contrastive_weight:
        raise InputError(
            f"config.train.micro_batches {micro_batches}: config.train.contrastive_weight compares all bags of a step with "
            "each other, which needs them at once; set one of the two to 1 or 0"
        )
    graph = nnx.graphdef(model)
    encode = build_encode(graph, config, mesh, normaliser)

    def loss_of(
        params: Params,
        bag: Bag,
        keys: Key[Array, " batch"],
        turns: Augmentation,
        state: TrainState,
        total: Array,
        tiles: Metrics,
    ) -> tuple[Array, tuple[Metrics, Seen, Statistics | None]]:
        """The part of the loss that some bags have, times the loss scale; its parts by name, and what was seen of each bag."""
        label = jnp.asarray(bag.label)
        features, statistics = encode(params, bag, turns)
        whole = nnx.merge(graph, params)
        prediction = whole.pool(features, bag.mask, bag.position, keys, label)
        losses = bag_losses(prediction, label, state.step, config.train)
        loss = (losses * jnp.asarray(bag.weight)).sum() / total
        if config.train.contrastive_weight:
            embedding, temperature = jnp.asarray(prediction.embedding), config.train.contrastive_temperature
            loss += config.train.contrastive_weight * supervised_contrastive(embedding, label, temperature)
        right = prediction.logits.argmax(axis=-1) == label
        seen = losses, right, jnp.asarray(prediction.region_attention)
        objective, parts = loss, {"loss": loss}
        if tasks:
            parts |= tasks.losses(whole.tasks(features), bag, turns, tiles)
            objective = tasks.objective(params, parts, tiles, 1.0 / micro_batches)
        return objective * (state.scaling.scale if state.scaling else 1.0), (parts, seen, statistics)

    def following(seed: Key[Array, ""], state: TrainState, bag: Bag) -> tuple[TrainState, Metrics]:
        bag = jax.tree_util.tree_map_with_path(
            lambda path, part: jax.lax.with_sharding_constraint(part, NamedSharding(mesh, bag_spec(path))), bag
        )
        augment_key, dropout_key = jax.random.split(jax.random.fold_in(seed, state.step))
        batch, regions, slots = bag.mask.shape
        known = None if normaliser else bag.stain  # normalised tiles no longer have the stain that was estimated
        drawn = draw_augmentation(augment_key, (batch, regions, slots), config.augment, known)
        keys = jax.vmap(partial(jax.random.fold_in, dropout_key))(jnp.arange(batch))
        total = jnp.maximum(jnp.asarray(bag.weight).sum(), 1e-9)
        tiles = tasks.counted(bag, drawn) if tasks else {}
        weights = tasks.weights_of(state.params) if tasks and tasks.learned else {}
        gradient_of = jax.grad(loss_of, has_aux=True)

        def add(sums: tuple, number: Int[Array, ""]) -> tuple[tuple, tuple[Seen, Statistics | None]]:
            part = jax.tree.map(lambda value: every(value, number, micro_batches, axis=0), (bag, keys, drawn))
            gradient, (losses, *others) = gradient_of(state.params, *part, state, total, tiles)
            return jax.tree.map(jnp.add, sums, (gradient, losses)), tuple(others)

        if micro_batches == 1:
            gradient, (parts, seen, statistics) = gradient_of(state.params, bag, keys, drawn, state, total, tiles)
        else:
            names = ("loss", *(f"{name}_loss" for name in tiles))
            zeros = jax.tree.map(jnp.zeros_like, state.params), dict.fromkeys(names, jnp.zeros(()))
            (gradient, parts), (by_part, statistics) = jax.lax.scan(add, zeros, jnp.arange(micro_batches))
            statistics = jax.tree.map(lambda value: value.sum(axis=0), statistics)
            seen = jax.tree.map(lambda value: jnp.moveaxis(value, 0, 1).reshape(-1, *value.shape[2:]), by_part)
        losses, right, attention = seen
        running = partial(with_running, statistics=statistics, share=config.model.batch_norm_momentum)
        state, metrics = _updated(optimizer, state, gradient, running)
        if state.mining is not None:
            found = jnp.asarray(bag.slide), jnp.asarray(bag.region), losses, ~right, attention
            state = replace(state, mining=after_step(state.mining, state.step, config.data.mine_every, *found))
        return state, {**parts, **weights, "accuracy": right.mean(), **metrics}

    return following


def _updated(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradient: Params,
    running: Callable[[Params], Params],
) -> tuple[TrainState, Metrics]:
    """The next state and the gradient's norm.

    In float16 a gradient that is not finite changes nothing but the scale, which is halved; it is doubled after
    many good steps. The norm is then 0, but where the scale cannot fall further: what is not finite there is no overflow.
    """
    scaling = state.scaling
    if scaling:
        gradient = jax.tree.map(lambda value: value / scaling.scale, gradient)
    norm = optax.tree.norm(gradient)
    updates, moments = optimizer.update(gradient, state.moments, state.params)
    params = running(optax.apply_updates(state.params, updates))
    if not scaling:
        return replace(state, step=state.step + 1, params=params, moments=moments), {"gradient_norm": norm}
    good = jnp.isfinite(norm)
    params, moments = jax.tree.map(partial(jnp.where, good), (params, moments), (state.params, state.moments))
    grows = scaling.good_steps + 1 >= _STEPS_TO_GROW
    scale = jnp.where(good, scaling.scale * jnp.where(grows, 2.0, 1.0), jnp.maximum(scaling.scale / 2.0, 1.0))
    following = LossScale(scale, jnp.where(good & ~grows, scaling.good_steps + 1, 0))
    norm = jnp.where(good | (scaling.scale <= 1.0), norm, 0.0)
    state = replace(state, step=state.step + 1, params=params, moments=moments, scaling=following)
    return state, {"gradient_norm": norm, "loss_scale": scaling.scale}
