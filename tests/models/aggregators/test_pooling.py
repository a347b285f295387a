"""Each aggregator against its formula written out in NumPy, and what none of them may do."""

from collections.abc import Callable
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.typing import DTypeLike

from crcjax.config import get_config
from crcjax.models.aggregators.pooling import Instances
from crcjax.models.aggregators.registry import AGGREGATORS
from crcjax.models.aggregators.transmil import _convolved, _pseudo_inverse, _sums
from crcjax.models.attention import attend
from crcjax.models.mil import MILModel, build_model, params_of
from crcjax.models.prediction import Prediction
from crcjax.models.tiled_attention import attend_in_tiles

FACTORS = (1, 2)  # 5 slots a region


def _model(mil: str, classes: int = 3, **fields: object) -> MILModel:
    config = get_config().model
    config.width, config.features, config.attention, config.heads, config.mil = 4, 16, 8, 2, mil
    for name, value in fields.items():
        config[name] = value
    return build_model(config, classes, 0, FACTORS)


def _bag(seed: int, regions: int, batch: int = 2) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((batch, regions, 5, 16)).astype(np.float32)
    mask = rng.random((batch, regions, 5)) < 0.7
    mask[:, 0, 0] = True
    places = np.stack([rng.permutation(64)[:regions] for _ in range(batch)])
    position = np.stack([places % 8, places // 8], axis=-1).astype(np.float32)
    return jnp.asarray(features), jnp.asarray(mask), jnp.asarray(position)


class _Models(dict[str, MILModel]):
    """A model of each aggregator, built when it is first asked for: nine take seconds."""

    def __missing__(self, name: str) -> MILModel:
        self[name] = _model(name)
        return self[name]


MODELS = _Models()
POOLS = {name: nnx.jit(lambda model, *bag: model.pool(*bag)) for name in AGGREGATORS}


def _pool(name: str, *bag: jax.Array):
    return POOLS[name](MODELS[name], *bag)


def _same(one, other, places=slice(None)) -> None:
    np.testing.assert_allclose(one.logits, other.logits, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(one.slot_attention[:, places], other.slot_attention, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", AGGREGATORS)
@settings(deadline=None, max_examples=4, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_padding_never_changes_a_prediction(name: str, seed: int) -> None:
    features, mask, position = _bag(seed, 7)
    noise, _, elsewhere = _bag(seed + 1, 12)
    padded = jnp.concatenate([features, noise[:, 7:]], axis=1), jnp.pad(mask, ((0, 0), (0, 5), (0, 0)))
    there = jnp.concatenate([position, elsewhere[:, 7:]], axis=1)
    wide, narrow = _pool(name, *padded, there), _pool(name, features, mask, position)
    _same(wide, narrow, slice(7))
    assert (np.asarray(wide.slot_attention[:, 7:]) == 0).all()


@pytest.mark.parametrize("name", AGGREGATORS)
@settings(deadline=None, max_examples=4, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_the_order_of_regions_never_changes_a_prediction(name: str, seed: int) -> None:
    features, mask, position = _bag(seed, 7)
    order = np.random.default_rng(seed).permutation(7)
    _same(
        _pool(name, features, mask, position),
        _pool(name, features[:, order], mask[:, order], position[:, order]),
        order,
    )


@pytest.mark.parametrize("name", AGGREGATORS)
@settings(deadline=None, max_examples=4, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_what_a_masked_slot_holds_never_changes_a_prediction(name: str, seed: int) -> None:
    features, mask, position = _bag(seed, 7)
    other = jnp.where(mask[..., None], features, 1e3 * _bag(seed + 1, 7)[0])
    _same(_pool(name, features, mask, position), _pool(name, other, mask, position))


@pytest.mark.parametrize("name", AGGREGATORS)
def test_the_other_bags_of_a_batch_never_change_a_prediction(name: str) -> None:
    """Public code of TransMIL scales its inverse by the largest value of the batch."""
    bag, other = _bag(8, 7), _bag(9, 7)
    mixed = tuple(
        jnp.stack([one[0], 5 * two[1] if two.ndim == 4 else two[1]]) for one, two in zip(bag, other, strict=True)
    )
    found, alone = _pool(name, *mixed), _pool(name, *bag)
    np.testing.assert_allclose(found.logits[0], alone.logits[0], rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(found.slot_attention[0], alone.slot_attention[0], rtol=2e-3, atol=2e-5)


def _relabelled(name: str, order: np.ndarray) -> MILModel:
    """The model with its classes in another order."""
    graph, state = nnx.split(MODELS[name])
    params = nnx.to_pure_dict(state)
    weights = params["aggregator"]

    def last(layer: dict, *lead: int) -> None:
        """The classes stand last, in `lead` blocks before other values if that is given."""
        for key, value in layer.items():
            shape = (*value.shape[:-1], len(order), *lead)
            layer[key] = jnp.take(value.reshape(shape), order, axis=-1 - len(lead)).reshape(value.shape)

    last(weights["classify" if "classify" in weights else "bag"])
    if name == "dsmil":
        kernel = weights["bag"]["kernel"]
        weights["bag"]["kernel"] = kernel.reshape(len(order), 16, -1)[order].reshape(kernel.shape)
        last(weights["instance"])
    if name.startswith("clam"):
        last(weights["judge"], 2)
    if name in ("clam_mb", "hierarchical"):
        last(weights["score" if name == "clam_mb" else "pool_regions"]["score"])
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_no_class_is_special_in_prediction_or_in_instance_losses(name: str) -> None:
    """Public code of DTFD-MIL selects instances by the last class alone."""
    bag, order, label = _bag(10, 7), np.array([2, 0, 1]), np.array([0, 2])
    found = MODELS[name].pool(*bag, None, jnp.asarray(label))
    other = _relabelled(name, order).pool(*bag, None, jnp.asarray(np.argsort(order)[label]))
    assert np.abs(np.diff(found.logits, axis=1)).min() > 1e-3
    np.testing.assert_allclose(other.logits, found.logits[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(other.instance_loss, found.instance_loss, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_bags_of_one_instance_and_of_none_have_finite_gradients(name: str) -> None:
    features, mask, position = _bag(0, 7)
    mask = jnp.zeros_like(mask).at[0, 3, 1].set(True)
    graph, state = nnx.split(MODELS[name])

    def loss(state: nnx.State) -> jax.Array:
        found = nnx.merge(graph, state).pool(features, mask, position, None, jnp.array([1, 2]))
        return (found.probs**2).sum() + found.instance_loss.sum()

    for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(state)):
        assert jnp.isfinite(gradient).all()
    found = _pool(name, features, mask, position)
    assert float(found.slot_attention[0, 3, 1]) == pytest.approx(1, abs=1e-5)
    assert float(jnp.abs(found.slot_attention[1]).sum()) == 0


@pytest.mark.parametrize("name", AGGREGATORS)
def test_attention_sums_to_one_in_every_branch_and_is_zero_where_masked(name: str) -> None:
    features, mask, position = _bag(3, 7)
    found = _pool(name, features, mask, position)
    np.testing.assert_allclose(found.class_attention.sum(axis=(1, 2)), 1, rtol=1e-5)
    assert (np.asarray(found.slot_attention)[~np.asarray(mask)] == 0).all()


@pytest.mark.parametrize("name", ["gated_abmil", "hierarchical"])
@pytest.mark.parametrize(("factors", "absent"), [((1, 2, 4), 1), ((1, 2, 4), 2), ((1, 4), 0)])
def test_a_magnification_that_is_wholly_absent_never_changes_a_prediction(
    name: str, factors: tuple[int, ...], absent: int
) -> None:
    config = get_config().model
    config.width, config.features, config.attention, config.heads, config.mil = 4, 16, 8, 2, name
    model = build_model(config, 3, 0, factors)
    rng, of = np.random.default_rng(15), np.repeat(np.arange(len(factors)), np.square(factors))
    features = rng.standard_normal((1, 6, len(of), 16)).astype(np.float32)
    mask = (rng.random((1, 6, len(of))) < 0.7) & (of != absent)
    mask[:, 2] = False  # a region without any tile
    position = rng.integers(0, 9, (1, 6, 2)).astype(np.float32)

    @jax.jit
    def answer(features: jax.Array, mask: jax.Array) -> tuple:
        def score(features: jax.Array) -> tuple[jax.Array, Prediction]:
            found = model.pool(features, mask, jnp.asarray(position))
            return found.logits[0, 0], found

        (_, found), gradient = jax.value_and_grad(score, has_aux=True)(features)
        return found, gradient

    found, gradient = answer(jnp.asarray(features), jnp.asarray(mask))
    other, _ = answer(jnp.where(jnp.asarray(mask)[..., None], features, 1e3), jnp.asarray(mask))
    _same(found, other)
    assert np.isfinite(gradient).all()
    assert (np.asarray(gradient)[~mask] == 0).all()
    assert (np.asarray(found.slot_attention)[:, :, of == absent] == 0).all()
    np.testing.assert_allclose(found.slot_attention.sum(), 1, rtol=1e-5)
    whole, _ = answer(jnp.asarray(features), jnp.asarray(mask | (of == absent)))
    assert not np.allclose(whole.logits, found.logits, rtol=1e-3)


def _held(bag: tuple[jax.Array, ...], b: int) -> np.ndarray:
    return np.asarray(bag[0][b], np.float64)[np.asarray(bag[1][b])]


def _weights(name: str) -> dict:
    return jax.tree.map(lambda value: np.asarray(value, np.float64), params_of(MODELS[name])["aggregator"])


def _linear(values: np.ndarray, layer: dict) -> np.ndarray:
    return values @ layer["kernel"] + layer.get("bias", 0)


def _softmax(scores: np.ndarray, axis: int = 0) -> np.ndarray:
    powers = np.exp(scores - scores.max(axis=axis, keepdims=True))
    return powers / powers.sum(axis=axis, keepdims=True)


def _attention(h: np.ndarray, weights: dict) -> np.ndarray:
    hidden = _linear(h, weights["hidden"])
    if hidden.shape[-1] > weights["score"]["kernel"].shape[0]:
        content, gate = np.split(hidden, 2, axis=-1)
        hidden = np.tanh(content) / (1 + np.exp(-gate))
    else:
        hidden = np.tanh(hidden)
    return _linear(hidden, weights["score"])


def _mean(h: np.ndarray, w: dict) -> np.ndarray:
    return _linear(h.mean(axis=0), w["classify"])


def _max(h: np.ndarray, w: dict) -> np.ndarray:
    return _linear(h.max(axis=0), w["classify"])


def _abmil(h: np.ndarray, w: dict) -> np.ndarray:
    return _linear(_softmax(_attention(h, w["score"])).T @ h, w["classify"])[0]


def _clam(h: np.ndarray, w: dict) -> np.ndarray:
    h = np.maximum(_linear(h, w["compress"]), 0)
    embeddings = _softmax(_attention(h, w["score"])).T @ h
    if len(embeddings) == 1:
        return _linear(embeddings[0], w["classify"])
    kernel, bias = w["classify"]["kernel"], w["classify"]["bias"]
    return np.array([embeddings[c] @ kernel[:, c] + bias[c] for c in range(len(embeddings))])


def _dsmil(h: np.ndarray, w: dict) -> np.ndarray:
    instance = _linear(h, w["instance"])
    query = np.tanh(_linear(np.maximum(_linear(h, w["query"][0]), 0), w["query"][1]))
    bags = [_softmax(query @ query[c.argmax()] / np.sqrt(query.shape[1])) @ h for c in instance.T]
    return (instance.max(axis=0) + _linear(np.concatenate(bags), w["bag"])) / 2


FORMULAS = {
    "mean": _mean,
    "max": _max,
    "abmil": _abmil,
    "gated_abmil": _abmil,
    "clam_sb": _clam,
    "clam_mb": _clam,
    "dsmil": _dsmil,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_logits_equal_the_published_formula_in_float64(name: str) -> None:
    bag = _bag(11, 7)
    found = _pool(name, *bag)
    for b in range(2):
        np.testing.assert_allclose(found.logits[b], FORMULAS[name](_held(bag, b), _weights(name)), rtol=1e-5, atol=1e-6)


def _layer_norm(values: np.ndarray, w: dict) -> np.ndarray:
    centred = values - values.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * w["scale"] + w["bias"]


def _nystrom(tokens: np.ndarray, w: dict, heads: int) -> np.ndarray:
    count, width = tokens.shape
    landmarks, channels = width // 2, width // heads
    stretch = -(-count // landmarks)
    parts = _linear(_layer_norm(tokens, w["norm"]), w["project"]).reshape(count, 3, heads, channels)
    seen = []
    for head in range(heads):
        q, k, v = parts[:, 0, head] / np.sqrt(channels), parts[:, 1, head], parts[:, 2, head]
        means = [np.stack([x[i : i + stretch].mean(axis=0) for i in range(0, count, stretch)]) for x in (q, k)]
        first, second, third = (
            _softmax(q @ means[1].T, 1),
            _softmax(means[0] @ means[1].T, 1),
            _softmax(means[0] @ k.T, 1),
        )
        inverse = second.T / (np.abs(second).sum(axis=1).max() * np.abs(second).sum(axis=0).max())
        one = np.eye(len(second))
        for _ in range(6):
            x = second @ inverse
            inverse = 0.25 * inverse @ (13 * one - x @ (15 * one - x @ (7 * one - x)))
        padded = np.pad(v, ((16, 16), (0, 0)))
        convolved = np.stack([w["residual"][:, 0, head] @ padded[i : i + 33] for i in range(count)])
        seen.append(first @ inverse @ third @ v + convolved)
    return tokens + _linear(np.stack(seen, axis=1).reshape(count, width), w["merge"])


def _transmil(h: np.ndarray, w: dict) -> np.ndarray:
    h = np.maximum(_linear(h, w["compress"]), 0)
    side = int(np.ceil(np.sqrt(len(h))))
    tokens = np.concatenate([w["token"][None], h, h[: side**2 - len(h)]])
    tokens = _nystrom(tokens, w["layers"][0], heads=2)
    square = tokens[1:].reshape(side, side, -1)
    encoded = square.copy()
    for convolution, size in zip(w["positions"].values(), (7, 5, 3), strict=True):
        padded = np.pad(square, ((size // 2, size // 2), (size // 2, size // 2), (0, 0)))
        for y, x in np.ndindex(side, side):
            encoded[y, x] += (padded[y : y + size, x : x + size] * convolution["kernel"][:, :, 0]).sum(axis=(0, 1))
        encoded += convolution["bias"]
    tokens = _nystrom(np.concatenate([tokens[:1], encoded.reshape(side**2, -1)]), w["layers"][1], heads=2)
    return _linear(_layer_norm(tokens[0], w["norm"]), w["classify"])


def test_dsmils_instance_loss_is_the_cross_entropy_of_its_highest_instances() -> None:
    bag, label = _bag(13, 7), np.array([2, 0])
    found = MODELS["dsmil"].pool(*bag, None, jnp.asarray(label))
    for b in range(2):
        highest = _linear(_held(bag, b), _weights("dsmil")["instance"]).max(axis=0)
        np.testing.assert_allclose(found.instance_loss[b], -np.log(_softmax(highest)[label[b]]), rtol=1e-5)


def test_transmil_equals_its_formula_over_instances_in_the_order_of_the_tissue() -> None:
    features, mask, position = _bag(12, 7)
    found = _pool("transmil", features, mask, position)
    for b in range(2):
        order = np.lexsort(np.asarray(position[b]).T)
        bag = (features[:, order], mask[:, order])
        truth = _transmil(_held(bag, b), _weights("transmil"))
        np.testing.assert_allclose(found.logits[b], truth, atol=1e-5 * float(np.abs(truth).max()))


def test_transmils_convolution_and_its_gradients_are_those_of_a_grouped_convolution() -> None:
    rng = np.random.default_rng(16)
    values, kernel, of = (
        jnp.asarray(rng.standard_normal(shape).astype(np.float32)) for shape in ((9, 8, 3), (7, 5, 3), (9, 8, 3))
    )

    def grouped(values: jax.Array, kernel: jax.Array) -> jax.Array:
        axes = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            values[None], kernel[:, :, None], (1, 1), "SAME", dimension_numbers=axes, feature_group_count=3
        )[0]

    found, gradients = jax.vjp(_convolved, values, kernel)
    truth, true_gradients = jax.vjp(grouped, values, kernel)
    for one, other in zip((found, *gradients(of)), (truth, *true_gradients(of)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lands", [16, 13, 9])
def test_transmils_inverse_and_its_gradient_are_those_of_the_published_iteration(lands: int) -> None:
    rng, held = np.random.default_rng(18), jnp.arange(16) < lands
    within = held & held[:, None]
    scores = jnp.asarray(rng.standard_normal((2, 3, 16, 16)).astype(np.float32))
    matrix = jax.nn.softmax(jnp.where(held, 3 * scores, -jnp.inf)) * held[:, None]

    def plain(matrix: jax.Array) -> jax.Array:
        inverse = matrix.T / (matrix.sum(axis=1).max() * matrix.sum(axis=0).max())
        one = jnp.eye(16)
        for _ in range(6):
            x = matrix @ inverse
            inverse = 0.25 * inverse @ (13 * one - x @ (15 * one - x @ (7 * one - x)))
        return inverse

    of = jnp.asarray(rng.standard_normal(matrix.shape).astype(np.float32)) * within
    found, gradient = jax.vjp(jax.jit(jax.vmap(_pseudo_inverse)), matrix)
    truth, true_gradient = jax.vjp(jax.vmap(jax.vmap(plain)), matrix)
    for one, other in ((found, truth), (gradient(of)[0], true_gradient(of)[0])):
        np.testing.assert_allclose(one * within, other * within, atol=1e-5 * float(jnp.abs(other).max()))


def test_transmils_landmarks_and_their_gradient_are_those_of_a_product_with_the_members() -> None:
    rng, seen = np.random.default_rng(19), np.arange(11) < 9
    values, of = (jnp.asarray(rng.standard_normal((n, 3)).astype(np.float32)) for n in (11, 4))
    values = values * seen[:, None]
    members = np.where(np.arange(4)[:, None] == np.arange(11) // 3, seen, False).astype(np.float32)
    places = np.array([[0, 1, 2], [3, 4, 5], [6, 7, 8], [11, 11, 11]])
    found, gradient = jax.vjp(lambda v: _sums(v, jnp.asarray(places), jnp.where(seen, np.arange(11) // 3, 4)), values)
    np.testing.assert_allclose(found, members @ values, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient(of)[0], members.T @ of, rtol=1e-5)


@pytest.mark.parametrize("name", ["clam_sb", "clam_mb"])
def test_clam_judges_at_most_half_of_a_bag_each_way_and_learns_from_both_ends(name: str) -> None:
    """With k above half of the bag, as the public code has it, one instance would be positive and negative at once."""
    model = _model(name, clam_instances=8)
    features, mask, position = _bag(5, 1)
    mask = jnp.zeros_like(mask).at[:, 0, :3].set(True)
    label = jnp.array([1, 2])
    found = model.pool(features, mask, position, None, label)
    w = jax.tree.map(lambda value: np.asarray(value, np.float64), params_of(model)["aggregator"])
    for b in range(2):
        h = np.maximum(_linear(_held((features, mask), b), w["compress"]), 0)
        ranks = np.broadcast_to(_attention(h, w["score"]), (3, 3)).argsort(axis=0)  # of each class's branch
        judged = _linear(h, w["judge"]).reshape(3, 3, 2)
        total = 0.0
        for c in range(3):
            first, last = judged[ranks[-1, c], c], judged[ranks[0, c], c]
            if c == int(label[b]):
                total += (np.log1p(np.exp(first[0] + 1 - first[1])) + np.log1p(np.exp(last[1] + 1 - last[0]))) / 2
            else:
                total += np.log1p(np.exp(first[1] + 1 - first[0]))
        np.testing.assert_allclose(found.instance_loss[b], total / 3, rtol=1e-5)


def test_attention_between_regions_depends_on_distances_alone() -> None:
    features, mask, position = _bag(7, 7)
    near = _pool("hierarchical", features, mask, position)
    _same(near, _pool("hierarchical", features, mask, position + jnp.array([300.0, 20.0])))
    assert not np.allclose(near.logits, _pool("hierarchical", features, mask, position * 3).logits, rtol=1e-4)


@pytest.mark.parametrize("tile", [(64, 700), (700, 64), (64, 96)])
def test_attention_in_tiles_equals_plain_attention_and_keeps_no_matrix_of_all_pairs(tile: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    bags = [jnp.asarray(rng.standard_normal((2, 700, 2, 8)).astype(np.float32)) for _ in range(3)]
    mask = jnp.asarray(rng.random((2, 700)) < 0.8).at[:, 100:300].set(False)

    def plain(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        scores = jnp.einsum("bqhc,bkhc->bhqk", query, key) / np.sqrt(8)
        return jnp.einsum("bhqk,bkhc->bqhc", jax.nn.softmax(jnp.where(mask[:, None, None], scores, -jnp.inf)), value)

    def tiled(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend_in_tiles(query, key, value, mask, tile)

    np.testing.assert_allclose(tiled(*bags), plain(*bags), rtol=1e-4, atol=1e-5)
    gradients = [jax.jit(jax.grad(lambda *all, f=f: (f(*all) ** 2).sum(), argnums=(0, 1, 2))) for f in (tiled, plain)]
    for one, other in zip(*(gradient(*bags) for gradient in gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    memory = [gradient.lower(*bags).compile().memory_analysis().temp_size_in_bytes for gradient in gradients]
    assert memory[0] < memory[1] / 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_in_tiles_over_nothing_is_zero_and_keeps_large_scores_finite(dtype: str) -> None:
    rng = np.random.default_rng(1)
    query, key, value = (jnp.asarray(rng.standard_normal((2, 40, 1, 4)) * 100, dtype) for _ in range(3))
    mask = jnp.ones((2, 40), bool).at[0].set(False)

    def loss(*parts: jax.Array) -> tuple[jax.Array, jax.Array]:
        seen = attend_in_tiles(*parts, mask, (16, 16))
        return seen.astype(jnp.float32).sum(), seen

    (_, seen), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    assert not seen[0].any()
    assert seen.dtype == query.dtype
    assert all(jnp.isfinite(part).all() and not part[0].any() and part.dtype == query.dtype for part in gradients)
    query, key, value = (part[1:].astype(jnp.float32) for part in (query, key, value))
    truth = attend(query, jnp.swapaxes(key, 1, 2), jnp.swapaxes(value, 1, 2), mask[1:])
    np.testing.assert_allclose(seen[1:].astype(jnp.float32), truth, rtol=0.01, atol=0.1)


def test_a_kernel_of_attention_gives_what_blocks_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the XLA implementation of the function that cuDNN's kernel is called by: it is there on CPUs."""
    (features, mask, position), label = _bag(15, 13), jnp.array([1, 2])
    graph, state = nnx.split(MODELS["hierarchical"])
    called = []

    def found() -> list[jax.Array]:
        def loss(state: nnx.State, features: jax.Array) -> tuple[jax.Array, Prediction]:
            prediction = nnx.merge(graph, state).pool(features, mask.at[0, 3:9].set(False), position)
            return -jax.nn.log_softmax(prediction.logits)[jnp.arange(2), label].sum(), prediction

        return jax.tree.leaves(jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(state, features))

    blocks = found()

    def kernel(dtype: DTypeLike, channels: int) -> str:
        called.append(channels)
        return "xla"

    monkeypatch.setattr("crcjax.models.aggregators.hierarchical.attention_kernel", kernel)
    for part, truth in zip(found(), blocks, strict=True):
        np.testing.assert_allclose(part, truth, rtol=1e-4, atol=1e-5 * max(float(jnp.abs(truth).max()), 1e-3))
    assert called


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mil", ["hierarchical", "transmil"])
def test_blocks_have_the_gradients_of_all_at_once_whatever_is_made_again(
    monkeypatch: pytest.MonkeyPatch, mil: str, dtype: str
) -> None:
    bag, label = _bag(14, 40), jnp.array([1, 2])

    def gradients(remat: str) -> tuple[list[jax.Array], int]:
        """And the matrix products in the program."""
        graph, state = nnx.split(_model(mil, remat=remat, dtype=dtype))

        def loss(state: nnx.State, features: jax.Array) -> jax.Array:
            logits = nnx.merge(graph, state).pool(features, *bag[1:]).logits
            return -jax.nn.log_softmax(logits)[jnp.arange(2), label].sum()

        gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
        return jax.tree.leaves(gradient(state, bag[0])), gradient.lower(state, bag[0]).as_text().count("dot_general")

    whole, _ = gradients("full")
    for name, value in {
        "hierarchical._INSTANCES": 30,
        "hierarchical._PAIRS": 40 * 7,
        "hierarchical._LEAST_QUERIES": 1,
    }.items():
        monkeypatch.setattr(f"crcjax.models.aggregators.{name}", value)
    monkeypatch.setattr("crcjax.models.aggregators.transmil._PAIRS", 7 * 8)
    near = 1e-5 if dtype == "float32" else 2e-2
    products = {}
    for remat in ("full", "dots", "none"):
        found, products[remat] = gradients(remat)
        for part, truth in zip(found, whole, strict=True):
            np.testing.assert_allclose(part, truth, rtol=near, atol=near * float(jnp.abs(truth).max()))
    # Of TransMIL's blocks all products are of pairs, which "dots" makes again.
    assert products["full"] >= products["dots"] > products["none"]
    assert (products["full"] > products["dots"]) == (mil == "hierarchical")


def _torch_weights(params: dict) -> dict[str, np.ndarray]:
    """Of `hierarchical`, as the twin in PyTorch names and lays them out."""
    weights = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        *names, kind = (str(part.key) for part in path)
        name = ".".join(names).replace("across.0", "across").replace("perceptron.1", "perceptron.2")
        value = np.asarray(leaf).T if kind == "kernel" else np.asarray(leaf)
        kind = {"kernel": "weight", "scale": "weight"}.get(kind, kind)
        if name.endswith("hidden"):  # content and gate
            pool = name.removesuffix("hidden")
            weights |= {
                f"{pool}{part}.{kind}": half for part, half in zip(("content", "gate"), np.split(value, 2), strict=True)
            }
        else:
            weights[f"{name}.{kind}" if names else kind] = value
    return weights


@pytest.mark.torch
@pytest.mark.parametrize("factors", [(1,), (1, 2, 4)])
def test_hierarchical_equals_the_twin_in_pytorch_that_its_speed_is_compared_with(
    factors: tuple[int, ...], required: Callable[[str], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "tools")
    try:
        import torch
        import torch_mil
    except ImportError as error:
        if required("torch"):
            raise
        pytest.skip(f"the extra torch is not installed: {error}")
    config = get_config().model
    config.features, config.attention, config.heads = torch_mil.WIDTH, torch_mil.HIDDEN, torch_mil.HEADS
    model = AGGREGATORS["hierarchical"](config, torch_mil.CLASSES, factors, dtype=jnp.float32, rngs=nnx.Rngs(0))
    twin = torch_mil.Hierarchical(factors)
    weights = _torch_weights(nnx.to_pure_dict(nnx.state(model)))
    twin.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in weights.items()}, strict=False)
    assert set(weights) == {name for name, _ in twin.named_parameters()}
    features = np.random.default_rng(17).standard_normal((5 * model.count, torch_mil.WIDTH), np.float32)
    bag = Instances(jnp.asarray(features)[None], jnp.ones((1, len(features)), bool), jnp.zeros((1, len(features), 2)))
    with torch.inference_mode():
        truth = twin(torch.from_numpy(features), None)[0].numpy()
    np.testing.assert_allclose(nnx.jit(lambda model: model(bag).logits)(model), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.real_data
@pytest.mark.parametrize("name", AGGREGATORS)
def test_real_slides_features_go_through_every_model(name: str, real_data: Path) -> None:
    paths = sorted((real_data / "mil" / "wsi_features").glob("*.h5"))
    assert len(paths) == 2
    for path in paths:
        with h5py.File(path) as file:
            features = np.asarray(file["feats" if "feats" in file else "features"], np.float32)
            place = np.asarray(file["coords"], np.float32) if "coords" in file else None
        config = get_config().model
        config.features, config.mil = 512, name
        model = build_model(config, 3, 0)
        position = jnp.asarray(place / 256)[None] if place is not None else None
        found = model.pool(jnp.asarray(features)[None, :, None], jnp.ones((1, len(features), 1), bool), position)
        assert np.isfinite(found.logits).all()
        np.testing.assert_allclose(found.region_attention.sum(), 1, rtol=1e-4)
