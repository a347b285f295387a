"""Stain normalisation: one estimate a slide from a sample of its tissue, then tiles transformed on the device.

Pure functions; the only file of this room that needs JAX. Pixels are 8-bit RGB. Optical density is natural,
OD = -ln((I + 1) / (I0 + 1)), with the slide's own white I0: another white would tilt the eosin vector by several degrees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Num, UInt8

BETA = 0.15  # mean optical density below which a pixel is background
DENSE = 0.45  # that of nuclei, from which haematoxylin is estimated
_EXTREME = 0.01  # the share of pixels beyond the robust extremes of eosin's angle and of the concentrations
_PUREST = 0.001  # the share of dense pixels beyond haematoxylin's
_LEAST_ANGLE, _MOST_ANGLE = 15.0, 30.0  # degrees: least between the stains; most from each to the reference
# The sparsity of Vahadane's dictionary learning. The usual 0.1 pulls both stains 2 to 9 degrees towards each other.
_SPARSITY = 0.001
_SPARSITY_CODES = 0.01  # for the concentrations, once the stains are known
_NMF_STEPS = 200
_LEAST_DEVIATION = 1e-3


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StainMatrix:
    """Two stains: unit vectors of optical density (haematoxylin, then eosin) and their 99th percentile concentrations.

    `reliable` is False where the sample has no plausible stains; the reference's vectors replace them. The fields
    are arrays of NumPy or JAX, or their shapes for compilation.
    """

    vectors: Float32[Any, "*slide 2 3"]
    concentration: Float32[Any, "*slide 2"]
    white: Float32[Any, "*slide 3"]
    reliable: Bool[Any, "*slide"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ColourMoments:
    """Mean and standard deviation of the tissue in Ruderman's l-alpha-beta (natural logarithms); arrays as in `StainMatrix`."""

    mean: Float32[Any, "*slide 3"]
    deviation: Float32[Any, "*slide 3"]
    white: Float32[Any, "*slide 3"]
    reliable: Bool[Any, "*slide"]


StainEstimate = StainMatrix | ColourMoments
Pixels = UInt8[Array | np.ndarray, "pixel 3"]
Mask = Bool[Array | np.ndarray, " pixel"]
White = Num[Array | np.ndarray, " 3"]

_WHITE = np.full(3, 240.0, np.float32)
_VECTORS = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]], np.float32)
# The vectors and maxima of most implementations of Macenko's method.
STANDARD = StainMatrix(
    _VECTORS / np.linalg.norm(_VECTORS, axis=1, keepdims=True),
    np.array([1.9705, 1.0308], np.float32),
    _WHITE,
    np.array(True),
)
# Mean and deviation of a TCGA breast slide (TCGA-A2-A3XS-DX1), as HistomicsTK documents them.
STANDARD_MOMENTS = ColourMoments(
    np.array([8.74108109, -0.12440419, 0.0444982], np.float32),
    np.array([0.6135447, 0.10989545, 0.0286032], np.float32),
    _WHITE,
    np.array(True),
)


def clipped_optical_density(
    pixels: Num[Array | np.ndarray, "*pixel"], white: Num[Array | np.ndarray, "*channel"]
) -> Float32[Array, "*pixel"]:
    """Optical density of RGB pixels or of one channel on the device, 0 for pixels brighter than the background.

    Otherwise equal to tissue_segmentation.optical_density, which is for NumPy. 8-bit values are widened first, because
    255 + 1 would be 0.
    """
    transmitted = (jnp.asarray(pixels).astype(jnp.float32) + 1.0) / (jnp.asarray(white, jnp.float32) + 1.0)
    return jnp.maximum(-jnp.log(transmitted), 0.0)


@jax.jit
def fit_macenko(pixels: Pixels, mask: Mask, white: White) -> StainMatrix:
    """Macenko et al. 2009: the extreme directions of the plane that holds most of the tissue's optical density."""
    density = clipped_optical_density(pixels, white)
    tissue = jnp.asarray(mask) & (density.mean(axis=1) >= BETA)
    return _checked(_extreme_directions(density, tissue), density, tissue, white)


@jax.jit
def fit_vahadane(pixels: Pixels, mask: Mask, white: White) -> StainMatrix:
    """Vahadane et al. 2016: sparse non-negative factors of the optical density, starting from Macenko's directions.

    Multiplicative updates (Hoyer 2002) of min |V - WH|^2 / 2 + lambda |H|_1 with unit stains.
    """
    density = clipped_optical_density(pixels, white)
    tissue = jnp.asarray(mask) & (density.mean(axis=1) >= BETA)
    values = jnp.where(tissue[:, None], density, 0.0)

    def step(vectors: Array, codes: Array) -> tuple[Array, Array]:
        codes = codes * (values @ vectors.T) / (codes @ (vectors @ vectors.T) + _SPARSITY)
        gradient = codes.T @ values
        # The part along the stain keeps its length (Eggert and Koerner 2004): without it, scale would evade sparsity.
        overlap = codes.T @ codes @ vectors
        along = (vectors * gradient).sum(axis=1, keepdims=True) * vectors
        against = (vectors * overlap).sum(axis=1, keepdims=True) * vectors
        vectors = vectors * (gradient + against) / jnp.maximum(overlap + along, 1e-9)
        return vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True), codes

    first = jnp.maximum(_extreme_directions(density, tissue), 1e-3)
    codes = jnp.maximum(values @ _unmixing(first).T, 1e-3)
    vectors, _ = jax.lax.fori_loop(0, _NMF_STEPS, lambda _, both: step(*both), (first, codes))
    return _checked(_haematoxylin_first(vectors), density, tissue, white)


@jax.jit
def fit_reinhard(pixels: Pixels, mask: Mask, white: White) -> ColourMoments:
    """Reinhard et al. 2001: mean and deviation of the tissue in l-alpha-beta."""
    density = clipped_optical_density(pixels, white)
    tissue = jnp.asarray(mask) & (density.mean(axis=1) >= BETA)
    values = _to_lab(jnp.asarray(pixels).astype(jnp.float32))
    weight = tissue / jnp.maximum(tissue.sum(), 1)
    mean = weight @ values
    deviation = jnp.sqrt(weight @ (values - mean) ** 2)
    enough = tissue.sum() > 1
    return ColourMoments(
        jnp.where(enough, mean, jnp.asarray(STANDARD_MOMENTS.mean)),
        jnp.where(enough, jnp.maximum(deviation, _LEAST_DEVIATION), jnp.asarray(STANDARD_MOMENTS.deviation)),
        jnp.asarray(white, jnp.float32),
        enough,
    )


METHODS: dict[str, tuple[Callable[[Pixels, Mask, White], StainEstimate], StainEstimate]] = {
    "macenko": (fit_macenko, STANDARD),
    "vahadane": (fit_vahadane, STANDARD),
    "reinhard": (fit_reinhard, STANDARD_MOMENTS),
}


@partial(jax.jit, static_argnames="sparse")
def normalise_stain(
    tiles: UInt8[Array | np.ndarray, "*tile y x 3"], source: StainMatrix, reference: StainMatrix, sparse: bool = False
) -> UInt8[Array, "*tile y x 3"]:
    """Gives tiles of the slide with the estimate `source` the reference's stains, strengths and white.

    Concentrations are least squares, negative ones set to 0 (Macenko), or with `sparse` the non-negative lasso
    (Vahadane).
    """
    tiles, vectors = jnp.asarray(tiles), jnp.asarray(source.vectors)
    # Computed channel by channel: compilers do not fuse matrix products with the logarithm and the exponential.
    density = [clipped_optical_density(tiles[..., i], jnp.asarray(source.white)[i]) for i in range(3)]
    codes = _lasso(density, vectors) if sparse else [jnp.maximum(c, 0.0) for c in _mixed(_unmixing(vectors), density)]
    changed = jnp.asarray(reference.vectors).T * (reference.concentration / source.concentration)
    passed = [jnp.exp(-mixed) for mixed in _mixed(changed, codes)]
    light = [(jnp.asarray(reference.white)[i] + 1.0) * passed[i] - 1.0 for i in range(3)]
    return jnp.stack([jnp.clip(jnp.round(channel), 0, 255).astype(jnp.uint8) for channel in light], axis=-1)


@jax.jit
def normalise_colour(
    tiles: UInt8[Array | np.ndarray, "*tile y x 3"], source: ColourMoments, reference: ColourMoments
) -> UInt8[Array, "*tile y x 3"]:
    """Gives tiles the reference's colour mean and deviation; background, which these do not describe, is unchanged."""
    tiles = jnp.asarray(tiles)
    back = np.linalg.inv(_LAB).astype(np.float32)
    gain = jnp.asarray(reference.deviation) / source.deviation
    # All linear steps between the logarithm and the exponential are one matrix.
    change = back @ (gain[:, None] * _LAB)
    offset = back @ (reference.mean - gain * source.mean)
    channels = [tiles[..., i].astype(jnp.float32) + 1.0 for i in range(3)]
    cones = [jnp.log(jnp.maximum(mixed, 1e-3)) for mixed in _mixed(_LMS, channels)]
    changed = [jnp.exp(mixed + offset[i]) for i, mixed in enumerate(_mixed(change, cones))]
    light = [jnp.clip(jnp.round(mixed - 1.0), 0, 255) for mixed in _mixed(np.linalg.inv(_LMS), changed)]
    # The product of the transmitted light: its logarithm is minus the sum of the optical densities.
    passed = [jnp.minimum(channel / (source.white[i] + 1.0), 1.0) for i, channel in enumerate(channels)]
    tissue = passed[0] * passed[1] * passed[2] <= np.exp(-3 * BETA)
    return jnp.where(tissue[..., None], jnp.stack(light, axis=-1).astype(jnp.uint8), tiles)


def normalise(
    method: str, tiles: UInt8[Array | np.ndarray, "*tile y x 3"], source: StainEstimate, reference: StainEstimate
) -> UInt8[Array, "*tile y x 3"]:
    """Normalises tiles by one of METHODS."""
    if isinstance(source, ColourMoments) and isinstance(reference, ColourMoments):
        return normalise_colour(tiles, source, reference)
    assert isinstance(source, StainMatrix)
    assert isinstance(reference, StainMatrix)
    return normalise_stain(tiles, source, reference, sparse=method == "vahadane")


def _extreme_directions(density: Float32[Array, "pixel 3"], tissue: Bool[Array, " pixel"]) -> Float32[Array, "2 3"]:
    """The plane's robust extremes, haematoxylin first. Pixels are weighted, not gathered, so that shapes are static.

    Haematoxylin's is estimated from dense pixels at a more extreme quantile: pure nuclei are few, but their angles are reliable.
    """
    weight = tissue / jnp.maximum(tissue.sum(), 1)
    mean = weight @ density
    centred = density - mean
    _, axes = jnp.linalg.eigh(jnp.einsum("p,pc,pd->cd", weight, centred, centred))
    plane = axes[:, [2, 1]]
    # The sign of an eigenvector depends on the backend; if it pointed away from the tissue, angles would wrap.
    plane = plane * jnp.where(mean @ plane[:, :1] < 0, -1.0, 1.0)
    # Flipped so that haematoxylin, which absorbs more red, has the larger angles.
    plane = plane * jnp.array([1.0, jnp.where(plane[0, 1] < 0, -1.0, 1.0)])
    projected = density @ plane
    angle = jnp.arctan2(projected[:, 1], projected[:, 0])
    dense = tissue & (density.mean(axis=1) >= DENSE)
    extremes = jnp.stack([_quantile(angle, dense, 1 - _PUREST), _quantile(angle, tissue, _EXTREME)])
    return _haematoxylin_first(jnp.stack([jnp.cos(extremes), jnp.sin(extremes)], axis=1) @ plane.T)


def _haematoxylin_first(vectors: Float32[Array, "2 3"]) -> Float32[Array, "2 3"]:
    """Orders the stains: haematoxylin has the larger share of red in optical density, because it absorbs red."""
    unit = vectors / jnp.linalg.norm(vectors, axis=1, keepdims=True)
    return jnp.where(unit[0, 0] >= unit[1, 0], unit, unit[::-1])


def _checked(
    vectors: Float32[Array, "2 3"], density: Float32[Array, "pixel 3"], tissue: Bool[Array, " pixel"], white: White
) -> StainMatrix:
    """The stains with their strengths; the reference's if the two stains are too similar, or are not H&E."""
    reference = jnp.asarray(STANDARD.vectors)
    apart = _degrees(vectors[0], vectors[1])
    away = jnp.maximum(_degrees(vectors[0], reference[0]), _degrees(vectors[1], reference[1]))
    reliable = (apart >= _LEAST_ANGLE) & (away <= _MOST_ANGLE) & (tissue.sum() >= 100)
    used = jnp.where(reliable, vectors, reference)
    codes = jnp.maximum(density @ _unmixing(used).T, 0.0)
    strength = jnp.stack([_quantile(codes[:, i], tissue, 1 - _EXTREME) for i in range(2)])
    strength = jnp.where(tissue.any(), jnp.maximum(strength, 1e-3), jnp.asarray(STANDARD.concentration))
    return StainMatrix(used, strength, jnp.asarray(white, jnp.float32), reliable)


def _degrees(one: Float32[Array, " 3"], other: Float32[Array, " 3"]) -> Float32[Array, ""]:
    return jnp.degrees(jnp.arccos(jnp.clip(one @ other, -1.0, 1.0)))


def _unmixing(vectors: Float32[Array, "2 3"]) -> Float32[Array, "2 3"]:
    """The matrix from optical density to least squares concentrations."""
    return jnp.linalg.inv(vectors @ vectors.T) @ vectors


def _lasso(density: Sequence[Array], vectors: Float32[Array, "2 3"]) -> list[Array]:
    """min |v - Wc|^2 / 2 + lambda |c|_1 with c not negative: in closed form for two unit stains."""
    cosine = vectors[0] @ vectors[1]
    along = [projected - _SPARSITY_CODES for projected in _mixed(vectors, density)]
    both = [(along[i] - cosine * along[1 - i]) / (1.0 - cosine**2) for i in range(2)]
    alone = [jnp.where(along[i] > along[1 - i], jnp.maximum(along[i], 0.0), 0.0) for i in range(2)]
    within = (both[0] >= 0) & (both[1] >= 0)
    return [jnp.where(within, both[i], alone[i]) for i in range(2)]


def _quantile(values: Float32[Array, " pixel"], mask: Bool[Array, " pixel"], q: float) -> Float32[Array, ""]:
    """NumPy's linear quantile of the unmasked values."""
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf))
    place = q * jnp.maximum(mask.sum() - 1, 0)
    low = jnp.floor(place).astype(jnp.int32)
    high = jnp.minimum(low + 1, jnp.maximum(mask.sum() - 1, 0))
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


# Reinhard et al. 2001, equations 4 to 6.
_LMS = np.array([[0.3811, 0.5783, 0.0402], [0.1967, 0.7244, 0.0782], [0.0241, 0.1288, 0.8444]], np.float32)
_LAB = np.array([[1, 1, 1], [1, 1, -2], [1, -1, 0]], np.float32) / np.sqrt(np.array([[3], [6], [2]], np.float32))


def _to_lab(pixels: Float32[Array, "*pixel 3"]) -> Float32[Array, "*pixel 3"]:
    return jnp.log(jnp.maximum((pixels + 1.0) @ _LMS.T, 1e-3)) @ _LAB.T


def _mixed(matrix: Float[Array | np.ndarray, "out in"], channels: Sequence[Array]) -> list[Array]:
    """A matrix times channels, in a form that compilers fuse with the operations before and after."""
    return [sum((row[j] * channels[j] for j in range(1, len(channels))), row[0] * channels[0]) for row in matrix]
