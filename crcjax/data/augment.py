"""Augmentation on the device: drawn once for a bag, applied to as many of its regions at a time as fit.

What the config leaves out is None in what is drawn, and nothing in the compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key, Num
from ml_collections import ConfigDict

from crcjax.data.corruptions import Artefacts, blur, draw_artefacts, jpeg, spoil
from crcjax.errors import InputError
from crcjax.slides.stain.methods import Estimate, StainMatrix

EACH = ("slide", "instance")
# Ruifrok and Johnston 2001: haematoxylin and eosin, and what is neither (at right angles to both).
_RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ColourChange:
    """Optical densities below the light `before` times `density`, below the light `after`."""

    density: Float32[Array, "batch some_region some_slot 3 3"]
    before: Float32[Array, "batch 1 1 3"]
    after: Float32[Array, "batch some_region some_slot 3"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Standard deviation (intensities) and the key of each tile's own noise."""

    deviation: Float32[Array, "batch some_region some_slot"]
    key: Key[Array, "batch region slot"]


@dataclass(frozen=True)
class Augmentation:
    """What was drawn: by batch, region and slot; what is a slide's has one region and one slot.

    `turns` says whether a tile is mirrored in x, in y, and transposed; `blur` is in px, `quality` of a JPEG.
    """

    turns: Bool[Array, "batch region slot 3"] | None = None
    colour: ColourChange | None = None
    artefacts: Artefacts | None = None
    blur: Float32[Array, "batch some_region some_slot"] | None = None
    noise: Noise | None = None
    quality: Float32[Array, "batch some_region some_slot"] | None = None
    subsampled: bool = False


jax.tree_util.register_dataclass(
    Augmentation, ["turns", "colour", "artefacts", "blur", "noise", "quality"], ["subsampled"]
)


def draw_augmentation(
    key: Key[Array, ""], shape: tuple[int, int, int], config: ConfigDict, stain: Estimate | None = None
) -> Augmentation:
    """The draw for bags of `shape` (batch, region, slot); `config` is config.augment, `stain` each bag's estimate.

    Raises InputError for an exchange of stains that were not estimated, and for values out of range.
    """
    _check(config, stain)
    turn, colour = jax.random.split(key)
    spoilt, blurred, noise, quality = (jax.random.fold_in(key, purpose) for purpose in range(4))
    some = shape if config.each == "instance" else (shape[0], 1, 1)
    grains = jax.random.split(jax.random.fold_in(noise, 1), shape) if config.noise else None
    return Augmentation(
        jax.random.bernoulli(turn, 0.5, (*shape, 3)) if config.flips else None,
        _draw_colour(colour, some, config, stain) if config.stain or config.hed or config.stain_swap_prob else None,
        draw_artefacts(spoilt, shape, config.artefacts) if config.artefacts else None,
        jax.random.uniform(blurred, some, maxval=config.blur) if config.blur else None,
        Noise(jax.random.uniform(noise, some, maxval=config.noise), grains) if grains is not None else None,
        jax.random.uniform(quality, some, minval=config.jpeg_min_quality, maxval=100.0)
        if config.jpeg_min_quality < 100
        else None,
        bool(config.jpeg_420),
    )


def augment(
    pixels: Num[Array, "batch region slot y x 3"], drawn: Augmentation, first: Int[Array, ""] | int = 0
) -> Num[Array, "batch region slot y x 3"]:
    """Pixels as another scanner, another cut, might have given them; `first` is the bag's region that they begin at."""
    count = pixels.shape[1]

    def of_these(part: Array) -> Array:
        return part if part.shape[1] == 1 else jax.lax.dynamic_slice_in_dim(part, first, count, axis=1)

    drawn = jax.tree.map(of_these, drawn)
    if drawn.turns is not None:
        pixels = _turned(pixels, drawn.turns[:, :, :, None, None, None])
    if drawn.colour is not None:
        pixels = _recoloured(pixels, drawn.colour)
    light = pixels.astype(jnp.float32)
    if drawn.artefacts is not None:
        pixels = light = spoil(light, drawn.artefacts)
    if drawn.blur is not None:
        pixels = light = blur(light, drawn.blur)
    if drawn.noise is not None:
        grain = jnp.vectorize(lambda key: jax.random.normal(key, light.shape[3:]), signature="()->(y,x,c)")
        noise = drawn.noise.deviation[..., None, None, None] * grain(drawn.noise.key)
        pixels = light = jnp.clip(light + noise, 0.0, 255.0)
    if drawn.quality is not None:
        pixels = jpeg(light, drawn.quality, drawn.subsampled)
    return pixels


def _check(config: ConfigDict, stain: Estimate | None) -> None:
    if config.each not in EACH:
        raise InputError(f"config.augment.each {config.each!r}: choose {' or '.join(EACH)}")
    for name, least, most in (("stain_swap_prob", 0, 1), ("artefacts", 0, 1), ("jpeg_min_quality", 1, 100)):
        if not least <= config[name] <= most:
            raise InputError(f"config.augment.{name} {config[name]} is outside {least} to {most}; set it within")
    if config.stain_swap_prob and not isinstance(stain, StainMatrix):
        raise InputError("config.augment.stain_swap_prob needs the stains as they are; set config.stain.method to none")


def _draw_colour(
    key: Key[Array, ""], some: tuple[int, int, int], config: ConfigDict, stain: Estimate | None
) -> ColourChange:
    """All changes of colour as one matrix: the stains of another bag, then gains of each stain, then of each channel.

    Gains are exp(N(0, strength^2)); of the channels one draw for all times one for each. Stains are gained along the
    bag's own directions if they are known (Tellez et al. 2019 use Ruifrok's for all).
    """
    exchange, hed, channel = jax.random.fold_in(key, 1), jax.random.fold_in(key, 2), key
    batch = some[0]
    if isinstance(stain, StainMatrix):
        vectors, white = jnp.asarray(stain.vectors), jnp.asarray(stain.white)
    else:
        vectors, white = jnp.broadcast_to(_RUIFROK, (batch, 2, 3)), jnp.full((batch, 3), 255.0)
    basis, before = _basis(vectors)[:, None, None], white[:, None, None]
    after = jnp.broadcast_to(before, (*some, 3))
    density = jnp.broadcast_to(jnp.eye(3), (*some, 3, 3))
    if config.stain_swap_prob:
        assert isinstance(stain, StainMatrix)
        other, strength = (
            _other(exchange, some, config.stain_swap_prob, jnp.asarray(stain.reliable)),
            stain.concentration,
        )
        ratio = jnp.asarray(strength)[other] / jnp.asarray(strength)[:, None, None]
        ratio = jnp.concatenate([ratio, jnp.ones((*some, 1))], axis=-1)
        after, theirs = white[other], _basis(vectors)[other]
        density, basis = jnp.linalg.inv(basis) @ (ratio[..., None] * theirs), theirs
    if config.hed:
        gain = jnp.exp(config.hed * jax.random.normal(hed, (*some, 3)))
        density = density @ (jnp.linalg.inv(basis) @ (gain[..., None] * basis))
    if config.stain:
        draw = jax.random.normal(channel, (*some, 4)) * config.stain
        density = density * jnp.exp(draw[..., :1] + draw[..., 1:])[..., None, :]
    return ColourChange(density, before, after)


def _other(
    key: Key[Array, ""], some: tuple[int, int, int], share: float, reliable: Bool[Array, " batch"]
) -> Int[Array, "batch some_region some_slot"]:
    """For each bag the number of another one with probability `share`, if the stains of both are known, else its own."""
    whether, which = jax.random.split(key)
    own = jnp.arange(some[0])[:, None, None]
    other = (own + jax.random.randint(which, some, 1, max(2, some[0]))) % some[0]
    swapped = jax.random.bernoulli(whether, share, some) & reliable[own] & reliable[other]
    return jnp.where(swapped, other, own)


def _basis(vectors: Float32[Array, "*slide 2 3"]) -> Float32[Array, "*slide 3 3"]:
    """Unit vectors of two stains and of what is at right angles to both."""
    rest = jnp.cross(vectors[..., 0, :], vectors[..., 1, :])
    whole = jnp.concatenate([vectors, rest[..., None, :]], axis=-2)
    return whole / jnp.linalg.norm(whole, axis=-1, keepdims=True)


def _turned(
    pixels: Num[Array, "batch region slot y x 3"], turns: Bool[Array, "batch region slot 1 1 1 3"]
) -> Num[Array, "batch region slot y x 3"]:
    pixels = jnp.where(turns[..., 0], pixels[..., ::-1, :], pixels)
    pixels = jnp.where(turns[..., 1], pixels[..., ::-1, :, :], pixels)
    return jnp.where(turns[..., 2], jnp.swapaxes(pixels, -2, -3), pixels)


def _recoloured(
    pixels: Num[Array, "batch region slot y x 3"], change: ColourChange
) -> Float32[Array, "batch region slot y x 3"]:
    """Channel by channel, a form that compilers fuse; light above `before` is a negative density."""
    before, after = (light[..., None, None, :] + 1.0 for light in (change.before, change.after))
    log = jnp.log((pixels.astype(jnp.float32) + 1.0) / before)
    matrix = change.density[..., None, None, :, :]
    mixed = [sum(log[..., i] * matrix[..., i, j] for i in range(3)) for j in range(3)]
    return jnp.clip(after * jnp.exp(jnp.stack(mixed, axis=-1)) - 1.0, 0.0, 255.0)
