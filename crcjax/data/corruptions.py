"""What optics, compression and slide preparation do to tiles, on the device: blur, JPEG, and simulated artefacts.

Intensities are 0 to 255 in float32. Every function is pure and has no Python branch on what it is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Key

ARTEFACTS = ("none", "pen", "fold", "bubble", "out_of_focus", "dust")
_SPECKS = 6
_GLASS = 245.0  # of the light within a bubble
# What green, blue, black and red ink let through, by channel.
_INKS = np.array([[0.15, 0.45, 0.40], [0.15, 0.25, 0.65], [0.12, 0.12, 0.14], [0.75, 0.20, 0.25]], np.float32)

# ITU-T T.81, annex K: the quantisation of luminance (K.1) and chrominance (K.2).
_LUMINANCE = """16 11 10 16 24 40 51 61 12 12 14 19 26 58 60 55 14 13 16 24 40 57 69 56 14 17 22 29 51 87 80 62
    18 22 37 56 68 109 103 77 24 35 55 64 81 104 113 92 49 64 78 87 103 121 120 101 72 92 95 98 112 100 103 99"""
_CHROMINANCE = "17 18 24 47 99 99 99 99 18 21 26 66 99 99 99 99 24 26 56 99 99 99 99 99 47 66" + 38 * " 99"
_TABLES = np.array([text.split() for text in (_LUMINANCE, _CHROMINANCE)], np.float32)
# ITU-T T.871, section 7.
_YCC = np.array([[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]], np.float32)

Tiles = Float32[Array, "*tile y x 3"]
EachTile = Float[Array, "*#tile"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Artefacts:
    """For each tile which of ARTEFACTS it gets, and the numbers from 0 to 1 that decide its place, size and colour."""

    kind: Int32[Array, "*tile"]
    shape: Float32[Array, "*tile 6"]
    specks: Float32[Array, "*tile speck 3"]


def blur(tiles: Tiles, sigma_px: EachTile) -> Tiles:
    """Gaussian blur; borders are renormalised, so that a constant stays one; sigma 0 changes nothing.

    As two matrix products, which accelerators do faster than a convolution whose kernel differs from tile to tile.
    """
    rows, columns = (_gaussian(side, sigma_px) for side in tiles.shape[-3:-1])
    exact = jax.lax.Precision.HIGHEST  # what is coarser would add noise where blur takes it away
    down = jnp.einsum("...ab,...bxc->...axc", rows, tiles, precision=exact)
    return jnp.einsum("...ab,...ybc->...yac", columns, down, precision=exact)


def jpeg(tiles: Tiles, quality: EachTile, subsampled: bool) -> Tiles:
    """Tiles as a JPEG of this quality (1 to 100, as libjpeg counts) gives them back; 4:2:0 if `subsampled`."""
    height, width = tiles.shape[-3:-1]
    lead = [(0, 0)] * (tiles.ndim - 3)
    whole = jnp.pad(tiles, [*lead, (0, -height % 16), (0, -width % 16), (0, 0)], mode="edge")
    quality = jnp.asarray(quality)
    scale = jnp.where(quality < 50, 5000.0 / quality, 200.0 - 2.0 * quality)[..., None, None]
    tables = jnp.clip(jnp.floor((_TABLES * scale + 50.0) / 100.0), 1.0, 255.0)
    exact = jax.lax.Precision.HIGHEST
    brightness, *colours = jnp.moveaxis(jnp.matmul(jnp.round(whole), _YCC.T, precision=exact), -1, 0)
    planes = [_quantised(jnp.round(brightness) - 128.0, tables[..., 0, :]) + 128.0]
    for plane in colours:
        if subsampled:
            plane = plane.reshape(*plane.shape[:-2], plane.shape[-2] // 2, 2, plane.shape[-1] // 2, 2).mean((-1, -3))
        plane = _quantised(jnp.round(plane), tables[..., 1, :])
        if subsampled:  # libjpeg, too, lays a triangle over the coarser pixels
            plane = jax.image.resize(plane, (*plane.shape[:-2], *whole.shape[-3:-1]), "linear")
        planes.append(plane)
    light = jnp.matmul(jnp.stack(planes, axis=-1), np.linalg.inv(_YCC).T, precision=exact)
    return jnp.clip(jnp.round(light), 0.0, 255.0)[..., :height, :width, :]


def draw_artefacts(key: Key[Array, ""], shape: tuple[int, ...], share: float) -> Artefacts:
    """For tiles of `shape` an artefact each with probability `share`, all kinds alike."""
    whether, which, where, specks = jax.random.split(key, 4)
    kind = jax.random.randint(which, shape, 1, len(ARTEFACTS), jnp.int32)
    kind = jnp.where(jax.random.bernoulli(whether, share, shape), kind, 0)
    return Artefacts(kind, jax.random.uniform(where, (*shape, 6)), jax.random.uniform(specks, (*shape, _SPECKS, 3)))


def spoil(tiles: Tiles, artefacts: Artefacts) -> Tiles:
    """Tiles with their artefacts; those without are returned as they are."""
    side = tiles.shape[-3]
    u = jnp.moveaxis(artefacts.shape, -1, 0)[..., None, None]
    y, x = (jnp.arange(length, dtype=jnp.float32) / length for length in tiles.shape[-3:-1])
    dx, dy = x - (0.25 + 0.5 * u[0]), y[:, None] - (0.25 + 0.5 * u[1])
    turn = jnp.pi * u[2]
    along, across = dx * jnp.cos(turn) + dy * jnp.sin(turn), dy * jnp.cos(turn) - dx * jnp.sin(turn)
    stroke = _soft(0.08 + 0.14 * u[3] - jnp.abs(across + (u[4] - 0.5) * along**2), 2.0 / side)
    disc = _soft(0.3 + 0.25 * u[3] - jnp.hypot(dx, dy), 0.08)
    kind = artefacts.kind[..., None, None]
    sigma = side * jnp.where(kind == 3, 0.008, 0.012 + 0.018 * u[4])  # 3 to 8 px of 256, the painter's 2.5 µm at 20x
    soft = blur(tiles, sigma[..., 0, 0])
    ink = jnp.asarray(_INKS)[(u[5] * len(_INKS)).astype(jnp.int32)]
    rim = 1.0 - 0.7 * jnp.clip(1.0 - 4.0 * jnp.abs(disc - 0.5), 0.0, 1.0)
    corrupted = [
        (stroke, tiles * ink),
        (stroke, tiles * tiles[..., ::-1, ::-1, :] / 255.0),  # two layers of tissue
        (disc, (0.6 * soft + 0.4 * _GLASS) * rim[..., None]),
        (jnp.ones_like(disc), soft),
        (_specks(artefacts.specks, x, y, side), 0.2 * tiles),
    ]
    for number, (where, changed) in enumerate(corrupted, 1):
        mixed = tiles + (changed - tiles) * where[..., None]
        tiles = jnp.where((kind == number)[..., None], mixed, tiles)
    return tiles


def _gaussian(side: int, sigma: EachTile) -> Float32[Array, "*tile side side"]:
    apart = jnp.square(jnp.arange(side)[:, None] - jnp.arange(side)).astype(jnp.float32)
    weight = jnp.exp(-apart / (2.0 * jnp.maximum(sigma, 1e-3)[..., None, None] ** 2))
    return weight / weight.sum(axis=-1, keepdims=True)


def _quantised(plane: Float32[Array, "*tile y x"], table: Float32[Array, "*#tile 64"]) -> Float32[Array, "*tile y x"]:
    """The discrete cosine transform of every 8 x 8 block, rounded to multiples of the table, and back."""
    height, width = plane.shape[-2:]
    lead = plane.shape[:-2]
    blocks = plane.reshape(*lead, height // 8, 8, width // 8, 8).swapaxes(-3, -2).reshape(*lead, -1, 64)
    table, exact = table[..., None, :], jax.lax.Precision.HIGHEST
    values = jnp.round(jnp.matmul(blocks, _COSINES.T, precision=exact) / table) * table
    blocks = jnp.matmul(values, _COSINES, precision=exact)
    return blocks.reshape(*lead, height // 8, width // 8, 8, 8).swapaxes(-3, -2).reshape(plane.shape)


def _cosines() -> Float32[np.ndarray, "64 64"]:
    """The orthonormal transform of a whole block as one matrix (ITU-T T.81, A.3.3)."""
    k, n = np.mgrid[:8, :8]
    one = np.cos((2 * n + 1) * k * np.pi / 16) * np.where(k == 0, np.sqrt(1 / 8), 0.5)
    return np.kron(one, one).astype(np.float32)


_COSINES = _cosines()


def _soft(inside: Float32[Array, "*tile"], edge: float) -> Float32[Array, "*tile"]:
    return jnp.clip(inside / edge + 0.5, 0.0, 1.0)


def _specks(
    specks: Float32[Array, "*tile speck 3"], x: Float32[Array, " x"], y: Float32[Array, " y"], side: int
) -> Float32[Array, "*tile y x"]:
    """Where dust lies: a few round specks, never all too small to be seen."""
    where = jnp.zeros(())
    for number in range(_SPECKS):
        at = specks[..., number, :, None, None]
        far = jnp.hypot(x - at[..., 0, :, :], y[:, None] - at[..., 1, :, :])
        where = jnp.maximum(where, _soft(0.02 + 0.03 * at[..., 2, :, :] - far, 2.0 / side))
    return where
