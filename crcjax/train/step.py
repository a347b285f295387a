"""The training step as a pure function: augment → encode → pool → loss → gradients → update.

`train_step` reads in that order. `build_step` compiles it for a mesh, and states the state's sharding and its donation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Bool, Float32, Key
from ml_collections import ConfigDict

from crcjax.data.augment import Augmentation, sample_augmentation
from crcjax.data.bags import Bag, bag_spec
from crcjax.data.hard_mining import Mining, after_step
from crcjax.errors import InputError
from crcjax.models.mil import MILModel, Params, Statistics, params_of
from crcjax.models.prediction import Prediction
from crcjax.models.random_keys import Purpose, run_key
from crcjax.parallel.mesh import replicated
from crcjax.parallel.sharding import state_shardings
from crcjax.runs.train_state import TrainState
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.train.auxiliary_tasks import Tasks
from crcjax.train.encode_step import Encode, build_encode, update_running_statistics
from crcjax.train.gradient_accumulation import Outputs, accumulate_gradients
from crcjax.train.loss_scale import initial_loss_scale, next_loss_scale, scale_loss, unscale_gradients
from crcjax.train.losses import bag_losses, supervised_contrastive

Metrics = dict[str, Float32[Array, ""]]


@dataclass(frozen=True)
class StepSetup:
    """The constants of a run that `train_step` needs; see `step_setup`."""

    graph: nnx.GraphDef
    encode: Encode
    optimizer: optax.GradientTransformation
    config: ConfigDict
    mesh: Mesh
    normalises_stains: bool
    tasks: Tasks | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepInputs:
    """The bags of a step or a micro-batch, and their random parameters. The leading axis of every array is that of bags."""

    bags: Bag
    augmentation: Augmentation
    dropout_keys: Key[Array, " batch"]
    feature_dropout_keys: Key[Array, " batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BatchTotals:
    """Totals of the whole batch, which each micro-batch divides its losses by.

    Attributes:
      weight: the sum of the bags' weights.
      labelled: the number of labelled instances of each auxiliary task.
    """

    weight: Float32[Array, ""]
    labelled: Metrics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BagResults:
    """Each bag's loss (nats), whether it was misclassified, and the attention to its regions."""

    loss: Array
    misclassified: Array
    region_attention: Array


def train_step(state: TrainState, batch: Bag, key: Key[Array, ""], setup: StepSetup) -> tuple[TrainState, Metrics]:
    """One optimiser step: augment → encode → pool → loss → gradients → update.

    A step is left out, so that it changes nothing except the step number, if its loss or gradient is not finite, if the
    gradient's norm exceeds config.health.max_gradient_norm, or if no bag has a weight.

    With config.train.micro_batches above 1, gradients are accumulated over micro-batches. The update equals the full
    batch's, except for BatchNorm statistics, which with config.model.batch_norm_momentum come from each micro-batch.

    Args:
      state: the state before the step. Its step number is folded into the random keys.
      batch: the bags, divided over the mesh.
      key: the run's key for training steps, the same at every step.
      setup: the constants of the run.

    Returns:
      The state after the step, and the step's metrics: `loss`, `NAME_loss` of each task, `accuracy`, `gradient_norm`,
      `attention_entropy`; `updated`, which is 0 if the step was left out; and `worst_bag`, the bag with the largest loss.
    """
    config = setup.config
    batch = _on_mesh(batch, setup.mesh)
    augment_key, dropout_key, feature_key = jax.random.split(jax.random.fold_in(key, state.step), 3)
    # Normalised tiles no longer have the stain that was estimated.
    stain = None if setup.normalises_stains else batch.stain
    augmentation = sample_augmentation(augment_key, batch.mask.shape, config.augment, stain)
    bags = len(batch.label)
    inputs = StepInputs(batch, augmentation, _key_per_bag(dropout_key, bags), _key_per_bag(feature_key, bags))
    totals = _batch_totals(inputs, setup.tasks)

    def loss_fn(params: Params, inputs: StepInputs) -> tuple[Array, Outputs]:
        model = nnx.merge(setup.graph, params)
        # The encoder augments a few regions at a time, so that memory does not hold all augmented pixels.
        features, batch_statistics = setup.encode(params, inputs.bags, inputs.augmentation, inputs.feature_dropout_keys)
        bags = inputs.bags
        prediction = model.pool(features, bags.mask, bags.position, inputs.dropout_keys, jnp.asarray(bags.label))
        loss, terms, results = _loss(params, model, features, prediction, inputs, totals, state.step, setup)
        return scale_loss(loss, state.scaling), Outputs((terms, batch_statistics), results)

    gradients, outputs = accumulate_gradients(loss_fn, state.params, inputs, config.train.micro_batches)
    (terms, batch_statistics), results = outputs.summed, outputs.per_bag
    task_weights = setup.tasks.learned_weights(state.params) if setup.tasks and setup.tasks.learned else {}
    is_valid = jnp.isfinite(terms["loss"]) & (jnp.asarray(batch.weight).max() > 0)
    state, update_metrics = _update(state, gradients, batch_statistics, is_valid, setup)
    state = _remember_hard_bags(state, batch, results, update_metrics["updated"], config.data.mine_every)
    bag_metrics = {
        "accuracy": (~results.misclassified).mean(),
        "attention_entropy": attention_entropy(results.region_attention, jnp.asarray(batch.mask).any(axis=-1)),
        # A loss that is not a number counts as the largest.
        "worst_bag": results.loss.argmax().astype(jnp.float32),
    }
    return state, {**terms, **task_weights, **bag_metrics, **update_metrics}


def step_setup(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    normaliser: StainNormaliser | None = None,
    tasks: Tasks | None = None,
) -> StepSetup:
    """The constants of `train_step`. Raises InputError for the contrastive loss with micro-batches."""
    micro_batches = config.train.micro_batches
    if micro_batches > 1 and config.train.contrastive_weight:
        raise InputError(
            f"config.train.micro_batches must be 1 with config.train.contrastive_weight, which compares all bags of a step, got "
            f"{micro_batches}; set one of the two to 1 or 0"
        )
    graph = nnx.graphdef(model)
    encode = build_encode(graph, config, mesh, normaliser)
    return StepSetup(graph, encode, optimizer, config, mesh, normaliser is not None, tasks)


def build_step(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    normaliser: StainNormaliser | None = None,
    tasks: Tasks | None = None,
) -> Callable[[TrainState, Bag], tuple[TrainState, Metrics]]:
    """Compiles `train_step` for a mesh.

    Args:
      model: the model, with heads for `tasks`.
      optimizer: the optimiser.
      config: the whole config.
      mesh: the devices.
      normaliser: normalises the stains of tiles before they are augmented.
      tasks: the auxiliary tasks.

    Returns:
      A function from a state and bags to the next state and metrics. It donates the state.

    Raises:
      InputError: the contrastive loss with micro-batches.
    """
    # Fused attention kernels can be divided over bags alone.
    model.set_attributes(fused=mesh.size == mesh.shape["data"], raise_if_not_found=False)
    setup = step_setup(model, optimizer, config, mesh, normaliser, tasks)
    layout = jax.tree.map(lambda value: value.sharding, abstract_state(model, optimizer, config, mesh))
    # One sharding for every array of the mining memory, whose shapes are not known here.
    layout = replace(layout, mining=replicated(mesh))

    @partial(jax.jit, donate_argnums=0, out_shardings=(layout, replicated(mesh)))
    def step(state: TrainState, bag: Bag) -> tuple[TrainState, Metrics]:
        return train_step(state, bag, run_key(config.seed, Purpose.TRAINING_STEP), setup)

    return step


def abstract_state(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh | AbstractMesh,
    mining: Mining | None = None,
) -> TrainState:
    """The shapes, types and shardings of a training state, for compiling and restoring without allocating a state."""
    state = jax.eval_shape(partial(_initial_state, optimizer, config.model.dtype), params_of(model), mining)
    layout = state_shardings(state, mesh, config.mesh.fsdp_min_size)
    # Every process reads and changes the whole mining memory.
    layout = replace(layout, mining=jax.tree.map(lambda _: replicated(mesh), state.mining))
    return jax.tree.map(
        lambda value, sharding: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding), state, layout
    )


def init_state(
    model: MILModel,
    optimizer: optax.GradientTransformation,
    config: ConfigDict,
    mesh: Mesh,
    mining: Mining | None = None,
) -> TrainState:
    """The state before the first step, divided over the mesh. All processes must pass equal models."""
    abstract = abstract_state(model, optimizer, config, mesh, mining)
    layout = jax.tree.map(lambda value: value.sharding, abstract)

    def place(value: Array | np.ndarray, sharding: NamedSharding) -> Array:
        host_value = np.asarray(value)
        return jax.make_array_from_callback(host_value.shape, sharding, lambda index: host_value[index])

    params, mining = jax.tree.map(place, (params_of(model), mining), (layout.params, layout.mining))
    # Jitted, so that parameters are copied: the step donates its state, and the model keeps its own arrays.
    return jax.jit(partial(_initial_state, optimizer, config.model.dtype), out_shardings=layout)(params, mining)


def _initial_state(
    optimizer: optax.GradientTransformation, dtype: str, params: Params, mining: Mining | None
) -> TrainState:
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), initial_loss_scale(dtype), mining)


def _on_mesh(batch: Bag, mesh: Mesh) -> Bag:
    return jax.tree_util.tree_map_with_path(
        lambda path, field: jax.lax.with_sharding_constraint(field, NamedSharding(mesh, bag_spec(path))), batch
    )


def _key_per_bag(key: Key[Array, ""], bags: int) -> Key[Array, " batch"]:
    return jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(bags))


def _batch_totals(inputs: StepInputs, tasks: Tasks | None) -> BatchTotals:
    weight = jnp.maximum(jnp.asarray(inputs.bags.weight).sum(), 1e-9)
    return BatchTotals(weight, tasks.labelled_instances(inputs.bags, inputs.augmentation) if tasks else {})


def _loss(
    params: Params,
    model: MILModel,
    features: Float32[Array, "batch region slot feature"],
    prediction: Prediction,
    inputs: StepInputs,
    totals: BatchTotals,
    step: Array,
    setup: StepSetup,
) -> tuple[Array, Metrics, BagResults]:
    """A micro-batch's part of the training objective, of each loss by name, and the results of each bag."""
    config, bags = setup.config.train, inputs.bags
    label = jnp.asarray(bags.label)
    losses = bag_losses(prediction, label, step, config)
    loss = (losses * jnp.asarray(bags.weight)).sum() / totals.weight
    if config.contrastive_weight:
        embedding = jnp.asarray(prediction.embedding)
        loss += config.contrastive_weight * supervised_contrastive(embedding, label, config.contrastive_temperature)
    terms, objective = {"loss": loss}, loss
    if setup.tasks:
        terms |= setup.tasks.losses(model.tasks(features), bags, inputs.augmentation, totals.labelled)
        objective = setup.tasks.objective(params, terms, totals.labelled, 1.0 / config.micro_batches)
    misclassified = prediction.logits.argmax(axis=-1) != label
    return objective, terms, BagResults(losses, misclassified, jnp.asarray(prediction.region_attention))


def attention_entropy(
    attention: Float32[Array, "batch region"], is_valid: Bool[Array, "batch region"]
) -> Float32[Array, ""]:
    """The entropy of the attention to regions as a fraction of its maximum, from 0 (one region) to 1 (all alike).

    The mean over the bags with at least two valid regions; 0.5 without such a bag.
    """
    count = is_valid.sum(axis=1)
    entropy = jax.scipy.special.entr(jnp.where(is_valid, attention, 0.0)).sum(axis=1)
    fraction = entropy / jnp.log(jnp.maximum(count, 2))
    has_choice = count >= 2
    return jnp.where(
        has_choice.any(), jnp.where(has_choice, fraction, 0.0).sum() / jnp.maximum(has_choice.sum(), 1), 0.5
    )


def _update(
    state: TrainState,
    gradients: Params,
    batch_statistics: Statistics | None,
    is_valid: Bool[Array, ""],
    setup: StepSetup,
) -> tuple[TrainState, Metrics]:
    """Applies the gradients; returns the next state, the norm of the gradients, and whether they were applied, as metrics.

    If they are not applied (`is_valid` is False, or see `train_step`), only the step number changes. In float16, gradients
    that are not finite also lower the loss scale. Where the scale is above its minimum this is an ordinary overflow: the step
    counts as applied, with the norm 0.
    """
    loss_scale = state.scaling
    gradients = unscale_gradients(gradients, loss_scale)
    norm = optax.tree.norm(gradients)
    updates, optimizer_state = setup.optimizer.update(gradients, state.moments, state.params)
    params = optax.apply_updates(state.params, updates)
    params = update_running_statistics(params, batch_statistics, setup.config.model.batch_norm_momentum)
    updated = is_valid & jnp.isfinite(norm) & (norm <= setup.config.health.max_gradient_norm)
    params, optimizer_state = jax.tree.map(
        partial(jnp.where, updated), (params, optimizer_state), (state.params, state.moments)
    )
    state_after = replace(state, step=state.step + 1, params=params, moments=optimizer_state)
    if not loss_scale:
        return state_after, {"gradient_norm": norm, "updated": updated.astype(jnp.float32)}
    overflows = is_valid & ~jnp.isfinite(norm) & (loss_scale.scale > 1.0)
    next_scale = next_loss_scale(loss_scale, jnp.isfinite(norm))
    scaling = jax.tree.map(partial(jnp.where, is_valid), next_scale, loss_scale)
    metrics = {
        "gradient_norm": jnp.where(overflows, 0.0, norm),
        "updated": (updated | overflows).astype(jnp.float32),
        "loss_scale": loss_scale.scale,
    }
    return replace(state_after, scaling=scaling), metrics


def _remember_hard_bags(
    state: TrainState, batch: Bag, results: BagResults, updated: Float32[Array, ""], mine_every: int
) -> TrainState:
    if state.mining is None:
        return state
    # No slide has the index -1: nothing is remembered of a step that was left out.
    slide, region = jnp.where(updated > 0, jnp.asarray(batch.slide), -1), jnp.asarray(batch.region)
    bag_results = slide, region, results.loss, results.misclassified, results.region_attention
    return replace(state, mining=after_step(state.mining, state.step, mine_every, *bag_results))
