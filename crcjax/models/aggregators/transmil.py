"""TransMIL (Shao et al. 2021): Nyström self-attention over a bag arranged as a square, with a class token."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int
from ml_collections import ConfigDict

from crcjax.models.aggregators.pooling import Instances, Pooled
from crcjax.models.attention import REMAT, Remat, attend, in_blocks
from crcjax.models.linear import Linear
from crcjax.models.maximum import maximum_along

_PINV_ITERATIONS = 6
_RESIDUAL_KERNEL = 33
_POSITION_KERNELS = 7, 5, 3
# The attention weights of a head that are computed at a time, on CPUs and elsewhere. Larger matrices are computed in blocks,
# which the backward pass recomputes.
_PAIRS, _PAIRS_ELSEWHERE = 2**24, 2**26


class TransMIL(nnx.Module):
    """Two Nyström attention layers with a convolutional position encoding between them.

    Instances are sorted by their position in the tissue (row, column) before they fill the square, so that their order in
    the store does not matter. As published, copies of the first instances fill the rest of the square. Padding is masked
    everywhere. The reported attention is that of the class token in the last layer, averaged over heads and computed from
    the matrices of the Nyström approximation; negative values count as zero.
    """

    def __init__(self, config: ConfigDict, classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width = config.features
        self.compress = Linear(width, width, dtype=dtype, rngs=rngs)
        self.token = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (width,)))
        layer = partial(NystromLayer, width, config.heads, REMAT[config.remat], dtype=dtype, rngs=rngs)
        self.layers = nnx.List([layer() for _ in range(2)])
        self.positions = nnx.List(
            [
                nnx.Conv(width, width, (side, side), feature_group_count=width, padding="SAME", dtype=dtype, rngs=rngs)
                for side in _POSITION_KERNELS
            ]
        )
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.classify = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        embedding, attention = jax.vmap(self._pool_bag)(bag.features, bag.mask, bag.position)
        return Pooled(self.classify(embedding), embedding, attention[..., None], jnp.zeros(embedding.shape[0]))

    def _pool_bag(
        self,
        features: Float[Array, "instance feature"],
        mask: Bool[Array, " instance"],
        position: Float32[Array, "instance 2"],
    ) -> tuple[Float32[Array, " feature"], Float32[Array, " instance"]]:
        """The embedding of one bag, and the attention to its instances."""
        total = len(mask)
        # The side of the square if no instance is masked, which fixes the shapes.
        largest = math.isqrt(total - 1) + 1
        order = jnp.lexsort((jnp.arange(total), position[:, 0], position[:, 1], ~mask))
        count = mask.sum()
        side = jnp.ceil(jnp.sqrt(count.astype(jnp.float32))).astype(jnp.int32)
        places = jnp.arange(largest**2)
        valid = places < side**2
        source = order[jnp.where(places < count, places, places - count) % total]
        sequence = jax.nn.relu(self.compress(features))[source] * valid[:, None]
        row, column = places // jnp.maximum(side, 1), places % jnp.maximum(side, 1)
        tokens = jnp.concatenate([self.token[...][None], sequence]).astype(sequence.dtype)
        valid_tokens = jnp.concatenate([jnp.ones(1, bool), valid])
        tokens, _ = self.layers[0](tokens, valid_tokens)
        square = jnp.zeros((largest, largest, tokens.shape[-1]), tokens.dtype)
        # Padding has coordinates outside of the square, where reads and writes have no effect.
        coordinates = jnp.where(valid, row, largest), jnp.where(valid, column, largest)
        square = square.at[coordinates].set(tokens[1:], mode="drop")
        encoded = (square + self._position_encoding(square)).at[coordinates].get(mode="fill", fill_value=0)
        tokens = tokens.at[1:].set(jnp.where(valid[:, None], encoded, 0))
        tokens, attention = self.layers[1](tokens, valid_tokens)
        embedding = self.norm(tokens[0].astype(jnp.float32))
        by_place = jnp.maximum(attention[1:], 0.0) * valid
        by_instance = jnp.zeros(total).at[source].add(by_place)
        return embedding, by_instance / jnp.maximum(by_instance.sum(), jnp.finfo(jnp.float32).tiny)

    def _position_encoding(self, square: Float[Array, "row column feature"]) -> Float[Array, "row column feature"]:
        """The sum of the depthwise convolutions, computed as one convolution with the sum of their kernels."""
        kernel, bias = jnp.zeros(()), jnp.zeros(())
        for convolution in self.positions:
            assert convolution.bias is not None
            pad = (_POSITION_KERNELS[0] - convolution.kernel[...].shape[0]) // 2
            kernel = kernel + jnp.pad(convolution.kernel[...][:, :, 0], ((pad, pad), (pad, pad), (0, 0)))
            bias = bias + convolution.bias[...]
        return (_convolved(square.astype(jnp.float32), kernel) + bias).astype(square.dtype)


class NystromLayer(nnx.Module):
    """Pre-norm Nyström attention (Xiong et al. 2021, equation 14) with a convolution over the values, added to its input."""

    def __init__(self, width: int, heads: int, remat: Remat, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.heads, self.landmarks, self.remat = heads, width // 2, remat
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.project = Linear(width, 3 * width, use_bias=False, dtype=dtype, rngs=rngs)
        self.merge = Linear(width, width, dtype=dtype, rngs=rngs)
        init = nnx.initializers.lecun_normal()
        self.residual = nnx.Param(init(rngs.params(), (_RESIDUAL_KERNEL, 1, heads)))

    def __call__(
        self, tokens: Float[Array, "token feature"], valid: Bool[Array, " token"]
    ) -> tuple[Float[Array, "token feature"], Float32[Array, " token"]]:
        """Returns the new tokens, and the attention of the first token (mean over heads); valid tokens must come first."""
        count, width = tokens.shape
        landmarks = min(self.landmarks, count)
        projections = jnp.where(valid[:, None], self.project(self.norm(tokens)).astype(jnp.float32), 0.0)
        query, key, value = jnp.moveaxis(projections.reshape(count, 3, self.heads, -1), 1, 0)
        # A landmark is the mean of a segment of consecutive valid tokens. All segments have one length, which does not depend
        # on the padding.
        length = jnp.maximum(-(-valid.sum() // landmarks), 1)
        first, offset = jnp.arange(landmarks) * length, jnp.arange(-(-count // landmarks))
        segment = jnp.where(offset < length, first[:, None] + offset, count)
        landmark_of = jnp.where(valid, jnp.arange(count) // length, landmarks)
        sizes = jnp.clip(valid.sum() - first, 0, length)
        has_tokens = sizes > 0
        means = _sums(projections[:, : 2 * width], segment, landmark_of) / jnp.maximum(sizes, 1)[:, None]
        query_means, key_means = jnp.moveaxis(means.reshape(landmarks, 2, self.heads, -1), 1, 0)
        inverse = _pseudo_inverse(_weights(query_means, key_means, has_tokens) * has_tokens[:, None])
        # The values are aggregated to the landmarks first; the product of the weights would be a large matrix to store.
        landmark_values = jnp.swapaxes(_attended(query_means, key, value, valid, self.remat), 0, 1)
        out = _attended(query, key_means, jnp.swapaxes(inverse @ landmark_values, 0, 1), has_tokens, self.remat)
        out = out + self._residual(value)
        first_weights = (_weights(query[:1], key_means, has_tokens) @ inverse)[:, 0]
        attention = jnp.einsum("hl,hlt->t", first_weights, _weights(query_means, key, valid)) / self.heads
        out = self.merge(out.reshape(count, -1).astype(tokens.dtype))
        return tokens + jnp.where(valid[:, None], out, 0), attention

    def _residual(self, value: Float32[Array, "token head channel"]) -> Float32[Array, "token head channel"]:
        """Each head's values convolved along the sequence with the head's own kernel."""
        width = value.shape[-1]
        kernel = jnp.repeat(self.residual[...][:, 0], width, axis=1)
        return _convolved(value.reshape(value.shape[0], -1), kernel).reshape(value.shape)


def _weights(
    query: Float32[Array, "row head channel"], key: Float32[Array, "column head channel"], valid: Bool[Array, " column"]
) -> Float32[Array, "head row column"]:
    """Softmax over the unmasked columns, at least one."""
    scores = jnp.einsum("rhc,khc->hrk", query, key) * query.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(valid, scores, jnp.finfo(jnp.float32).min))


def _attended(
    query: Float32[Array, "row head channel"],
    key: Float32[Array, "column head channel"],
    value: Float32[Array, "column head channel"],
    valid: Bool[Array, " column"],
    remat: Remat,
) -> Float32[Array, "row head channel"]:
    """Attention over the unmasked columns, in blocks of rows if all weights together would take too much memory."""
    key, value = (jnp.swapaxes(array, 0, 1)[None] for array in (key, value))
    largest = max(1, (_PAIRS if jax.default_backend() == "cpu" else _PAIRS_ELSEWHERE) // len(valid))
    return in_blocks(
        lambda query_block: (attend(query_block, key, value, valid[None]),), largest, query[None], remat=remat
    )[0][0]


@jax.custom_vjp
def _sums(
    values: Float32[Array, "token channel"],
    segment: Int[Array, "landmark member"],
    landmark_of: Int[Array, " token"],
) -> Float32[Array, "landmark channel"]:
    """The sum of each landmark's tokens. Its gradient is a gather too, so that it does not depend on an order of summation."""
    return values.at[segment].get(mode="fill", fill_value=0).sum(axis=1)


def _sums_gradient(landmark_of: Int[Array, " token"], gradient: Array) -> tuple[Array, None, None]:
    return gradient.at[landmark_of].get(mode="fill", fill_value=0), None, None


_sums.defvjp(lambda values, segment, landmark_of: (_sums(values, segment, landmark_of), landmark_of), _sums_gradient)


@jax.custom_vjp
def _convolved(
    values: Float32[Array, "*place channel"], kernel: Float32[Array, "*tap channel"]
) -> Float32[Array, "*place channel"]:
    """Depthwise convolution with kernels of odd sides, and zeros beyond the edge.

    It is a sum of shifted products. XLA partitions that correctly, whereas the gradients of its grouped convolutions were
    wrong on several devices, and it is faster on CPUs. The custom gradient avoids storing every shifted copy.
    """
    padded, total = _padded(values, kernel), jnp.zeros_like(values)
    for tap in np.ndindex(*kernel.shape[:-1]):
        shifted = padded[tuple(slice(i, i + length) for i, length in zip(tap, values.shape[:-1], strict=True))]
        total = total + kernel[tap] * shifted
    return total


def _convolved_gradients(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    values, kernel = residuals
    padded, sides = _padded(values, kernel), kernel.shape[:-1]

    def tap_gradient(tap: Int[Array, " axis"]) -> Float32[Array, " channel"]:
        shifted = jax.lax.dynamic_slice(padded, (*tap, 0), values.shape)
        products = (shifted * gradient).reshape(-1, gradient.shape[-1])
        # A matrix product with ones; for a single bag, XLA's CPU code takes twenty times as long for the sum.
        return jnp.matmul(jnp.ones(len(products)), products, precision=jax.lax.Precision.HIGHEST)

    kernel_gradient = jax.lax.map(tap_gradient, jnp.array(list(np.ndindex(*sides)))).reshape(kernel.shape)
    return _convolved(gradient, jnp.flip(kernel, range(len(sides)))), kernel_gradient


def _padded(values: Array, kernel: Array) -> Array:
    return jnp.pad(values, [(side // 2, side // 2) for side in kernel.shape[:-1]] + [(0, 0)])


_convolved.defvjp(lambda values, kernel: (_convolved(values, kernel), (values, kernel)), _convolved_gradients)


def _pseudo_inverse(matrix: Float32[Array, "head row column"]) -> Float32[Array, "head row column"]:
    """Moore-Penrose inverse by the iteration of Razavi et al. (2014), as in Xiong et al. 2021, equation 11.

    Rows and columns of zeros, which belong to landmarks without tokens, stay zero.
    """
    absolute = jnp.abs(matrix)
    # Each head is scaled separately. The public code scales by the maximum of the batch, so that bags affect each other.
    scale = maximum_along(absolute.sum(axis=-1), -1) * maximum_along(absolute.sum(axis=-2), -1)
    start = jnp.swapaxes(matrix, -1, -2) / jnp.maximum(scale, jnp.finfo(jnp.float32).tiny)[:, None, None]
    identity = jnp.eye(matrix.shape[-1])

    def iterate(inverse: Array, _: None) -> tuple[Array, None]:
        product = matrix @ inverse
        factor = 13 * identity - product @ (15 * identity - product @ (7 * identity - product))
        return 0.25 * inverse @ factor, None

    return jax.lax.scan(iterate, start, length=_PINV_ITERATIONS)[0]
