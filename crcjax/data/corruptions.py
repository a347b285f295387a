"""Image corruptions on the device: Gaussian blur, JPEG compression, and simulated artefacts of slide preparation.

Intensities are 0 to 255 in float32. Every function is pure and can be jitted.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

ARTEFACTS = ("none", "pen", "fold", "bubble", "out_of_focus", "dust")
# Number of dust specks on a dusty tile.
_SPECKS = 6
# Intensity of the background that shines through a bubble.
_BACKGROUND = 245.0
# Transmittance of green, blue, black and red ink, by channel.
_INKS = np.array([[0.15, 0.45, 0.40], [0.15, 0.25, 0.65], [0.12, 0.12, 0.14], [0.75, 0.20, 0.25]], np.float32)

# Quantisation tables of luminance (K.1) and chrominance (K.2) in ITU-T T.81, annex K.
_LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMINANCE = "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66" + 38 * " 99"
_TABLES = np.array([text.split() for text in (_LUMINANCE, _CHROMINANCE)], np.float32)
# The conversion from RGB to YCbCr of ITU-T T.871, section 7.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)

Tiles = Float32[Array, "*tile y x 3"]
EachTile = Float[Array, "*#tile"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Artefacts:
    """The simulated artefact of each tile.

    Attributes:
      kind: index in ARTEFACTS.
      geometry: numbers from 0 to 1 that set the artefact's place, angle, size and colour.
      specks: x, y and size of each dust speck, from 0 to 1.
    """

    kind: Int32[Array, "*tile"]
    geometry: Float32[Array, "*tile 6"]
    specks: Float32[Array, "*tile speck 3"]


def blur(tiles: Tiles, sigma_px: EachTile) -> Tiles:
    """Gaussian blur with a standard deviation of `sigma_px` for each tile.

    Weights are renormalised at the border, so that a constant tile stays constant. A standard deviation of 0 changes nothing.
    """
    # Two matrix products: faster on accelerators than a convolution whose kernel differs from tile to tile.
    rows, columns = (_gaussian(side, sigma_px) for side in tiles.shape[-3:-1])
    # A lower precision would add noise, which blur is there to remove.
    exact = jax.lax.Precision.HIGHEST
    blurred_in_y = jnp.einsum("...ab,...bxc->...axc", rows, tiles, precision=exact)
    return jnp.einsum("...ab,...ybc->...yac", columns, blurred_in_y, precision=exact)


def jpeg(tiles: Tiles, quality: EachTile, subsampled: bool) -> Tiles:
    """Compresses tiles as JPEG and decompresses them.

    Args:
      tiles: intensities from 0 to 255.
      quality: each tile's quality, from 1 to 100 on libjpeg's scale.
      subsampled: whether colours are stored at half the resolution (4:2:0).
    """
    height, width = tiles.shape[-3:-1]
    leading_axes = [(0, 0)] * (tiles.ndim - 3)
    padded = jnp.pad(tiles, [*leading_axes, (0, -height % 16), (0, -width % 16), (0, 0)], mode="edge")
    quality = jnp.asarray(quality)
    scale = jnp.where(quality < 50, 5000.0 / quality, 200.0 - 2.0 * quality)[..., None, None]
    tables = jnp.clip(jnp.floor((_TABLES * scale + 50.0) / 100.0), 1.0, 255.0)
    exact = jax.lax.Precision.HIGHEST
    luminance, *chrominance = jnp.moveaxis(jnp.matmul(jnp.round(padded), _YCC.T, precision=exact), -1, 0)
    planes = [_quantise(jnp.round(luminance) - 128.0, tables[..., 0, :]) + 128.0]
    for plane in chrominance:
        if subsampled:
            plane = plane.reshape(*plane.shape[:-2], plane.shape[-2] // 2, 2, plane.shape[-1] // 2, 2).mean((-1, -3))
        plane = _quantise(jnp.round(plane), tables[..., 1, :])
        if subsampled:
            # libjpeg upsamples with a triangle filter too.
            plane = jax.image.resize(plane, (*plane.shape[:-2], *padded.shape[-3:-1]), "linear")
        planes.append(plane)
    rgb = jnp.matmul(jnp.stack(planes, axis=-1), np.linalg.inv(_YCC).T, precision=exact)
    return jnp.clip(jnp.round(rgb), 0.0, 255.0)[..., :height, :width, :]


def sample_artefacts(key: Key[Array, ""], shape: tuple[int, ...], probability: float) -> Artefacts:
    """Samples an artefact for each of the tiles of `shape` with `probability`; all kinds are equally likely."""
    occurrence_key, kind_key, geometry_key, speck_key = jax.random.split(key, 4)
    kind = jax.random.randint(kind_key, shape, 1, len(ARTEFACTS), jnp.int32)
    kind = jnp.where(jax.random.bernoulli(occurrence_key, probability, shape), kind, 0)
    geometry = jax.random.uniform(geometry_key, (*shape, 6))
    return Artefacts(kind, geometry, jax.random.uniform(speck_key, (*shape, _SPECKS, 3)))


def add_artefacts(tiles: Tiles, artefacts: Artefacts) -> Tiles:
    """Adds each tile's artefact; tiles without an artefact are unchanged."""
    side = tiles.shape[-3]
    u = jnp.moveaxis(artefacts.geometry, -1, 0)[..., None, None]
    y, x = (jnp.arange(length, dtype=jnp.float32) / length for length in tiles.shape[-3:-1])
    dx, dy = x - (0.25 + 0.5 * u[0]), y[:, None] - (0.25 + 0.5 * u[1])
    angle = jnp.pi * u[2]
    along, across = dx * jnp.cos(angle) + dy * jnp.sin(angle), dy * jnp.cos(angle) - dx * jnp.sin(angle)
    stroke = _soft_edge(0.08 + 0.14 * u[3] - jnp.abs(across + (u[4] - 0.5) * along**2), 2.0 / side)
    disc = _soft_edge(0.3 + 0.25 * u[3] - jnp.hypot(dx, dy), 0.08)
    kind = artefacts.kind[..., None, None]
    # Out of focus: 3 to 8 px at 256 px a tile. Synthetic slides have 2.5 µm at 20x, which is 5 px.
    sigma = side * jnp.where(kind == 3, 0.008, 0.012 + 0.018 * u[4])
    blurred = blur(tiles, sigma[..., 0, 0])
    ink = jnp.asarray(_INKS)[(u[5] * len(_INKS)).astype(jnp.int32)]
    rim = 1.0 - 0.7 * jnp.clip(1.0 - 4.0 * jnp.abs(disc - 0.5), 0.0, 1.0)
    two_layers = tiles * tiles[..., ::-1, ::-1, :] / 255.0
    # The area and the corrupted tile of each artefact, in the order of ARTEFACTS.
    corruptions = [
        (stroke, tiles * ink),
        (stroke, two_layers),
        (disc, (0.6 * blurred + 0.4 * _BACKGROUND) * rim[..., None]),
        (jnp.ones_like(disc), blurred),
        (_dust(artefacts.specks, x, y, side), 0.2 * tiles),
    ]
    for number, (area, corrupted) in enumerate(corruptions, 1):
        mixed = tiles + (corrupted - tiles) * area[..., None]
        tiles = jnp.where((kind == number)[..., None], mixed, tiles)
    return tiles


def _gaussian(side: int, sigma: EachTile) -> Float32[Array, "*tile side side"]:
    squared_distance = jnp.square(jnp.arange(side)[:, None] - jnp.arange(side)).astype(jnp.float32)
    weight = jnp.exp(-squared_distance / (2.0 * jnp.maximum(sigma, 1e-3)[..., None, None] ** 2))
    return weight / weight.sum(axis=-1, keepdims=True)


def _quantise(plane: Float32[Array, "*tile y x"], table: Float32[Array, "*#tile 64"]) -> Float32[Array, "*tile y x"]:
    """Rounds the discrete cosine transform of every 8 x 8 block to multiples of the table, and transforms it back."""
    height, width = plane.shape[-2:]
    leading_axes = plane.shape[:-2]
    blocks = plane.reshape(*leading_axes, height // 8, 8, width // 8, 8).swapaxes(-3, -2).reshape(*leading_axes, -1, 64)
    table, exact = table[..., None, :], jax.lax.Precision.HIGHEST
    coefficients = jnp.round(jnp.matmul(blocks, _COSINES.T, precision=exact) / table) * table
    blocks = jnp.matmul(coefficients, _COSINES, precision=exact)
    return blocks.reshape(*leading_axes, height // 8, width // 8, 8, 8).swapaxes(-3, -2).reshape(plane.shape)


def _cosines() -> Float32[np.ndarray, "64 64"]:
    """The orthonormal cosine transform of an 8 x 8 block as one matrix (ITU-T T.81, A.3.3)."""
    k, n = np.mgrid[:8, :8]
    along_one_axis = np.cos((2 * n + 1) * k * np.pi / 16) * np.where(k == 0, np.sqrt(1 / 8), 0.5)
    return np.kron(along_one_axis, along_one_axis).astype(np.float32)


_COSINES = _cosines()


def _soft_edge(depth: Float32[Array, "*tile"], edge: float) -> Float32[Array, "*tile"]:
    """1 inside a shape and 0 outside, with a linear edge; `depth` is the distance from the outline, negative outside."""
    return jnp.clip(depth / edge + 0.5, 0.0, 1.0)


def _dust(
    specks: Float32[Array, "*tile speck 3"], x: Float32[Array, " x"], y: Float32[Array, " y"], side: int
) -> Float32[Array, "*tile y x"]:
    """The area of round dust specks, each of a visible size."""
    area = jnp.zeros(())
    for number in range(_SPECKS):
        speck = specks[..., number, :, None, None]
        distance = jnp.hypot(x - speck[..., 0, :, :], y[:, None] - speck[..., 1, :, :])
        area = jnp.maximum(area, _soft_edge(0.02 + 0.03 * speck[..., 2, :, :] - distance, 2.0 / side))
    return area
