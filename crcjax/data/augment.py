"""Augmentation on the device: samples parameters once a step and applies them to a few regions of each bag at a time.

A change that the config disables is None in the sampled parameters and absent from the compiled program.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int, Key, Num
from ml_collections import ConfigDict

from crcjax.data.corruptions import Artefacts, add_artefacts, blur, jpeg, sample_artefacts
from crcjax.slides.stain.methods import StainEstimate, StainMatrix

# The value of jpeg_min_quality that disables JPEG compression.
_NO_JPEG = 100
# Unit vectors of haematoxylin and eosin in optical density (Ruifrok and Johnston 2001).
_RUIFROK = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]], np.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ColourChange:
    """A linear change of optical density.

    Attributes:
      density: the matrix that optical densities are multiplied by.
      before: the background intensities that optical densities are computed with before the change.
      after: the background intensities after the change.
    """

    density: Float32[Array, "batch parameter_region parameter_slot 3 3"]
    before: Float32[Array, "batch 1 1 3"]
    after: Float32[Array, "batch parameter_region parameter_slot 3"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Noise:
    """Gaussian noise: its standard deviation (8-bit intensities) and each tile's random key."""

    deviation: Float32[Array, "batch parameter_region parameter_slot"]
    key: Key[Array, "batch region slot"]


@dataclass(frozen=True)
class Augmentation:
    """The sampled parameters of one step.

    The leading axes are batch, region and slot. A parameter that the tiles of a slide share has one region and one slot.

    Attributes:
      flips: whether each tile is mirrored in x, mirrored in y, and transposed.
      colour: the change of stain and colour.
      artefacts: each tile's simulated artefact.
      blur_px: standard deviation of the Gaussian blur, in px.
      noise: the added noise.
      jpeg_quality: quality of the JPEG compression, from 1 to 100 on libjpeg's scale.
      chroma_subsampled: whether the JPEG stores colours at half the resolution (4:2:0).
    """

    flips: Bool[Array, "batch region slot 3"] | None = None
    colour: ColourChange | None = None
    artefacts: Artefacts | None = None
    blur_px: Float32[Array, "batch parameter_region parameter_slot"] | None = None
    noise: Noise | None = None
    jpeg_quality: Float32[Array, "batch parameter_region parameter_slot"] | None = None
    chroma_subsampled: bool = False


jax.tree_util.register_dataclass(
    Augmentation, ["flips", "colour", "artefacts", "blur_px", "noise", "jpeg_quality"], ["chroma_subsampled"]
)


def sample_augmentation(
    key: Key[Array, ""], bag_shape: tuple[int, int, int], config: ConfigDict, stain: StainEstimate | None = None
) -> Augmentation:
    """Samples the random parameters of one step's augmentation.

    Args:
      key: one key per step; every parameter gets its own key, derived from it.
      bag_shape: (batch, region, slot).
      config: config.augment, already checked (`check_config`).
      stain: each slide's stain estimate; required for stain swapping.

    Returns:
      Parameters with the leading axes of `bag_shape`, or (batch, 1, 1) where a whole slide shares one sample.
    """
    flip_key, colour_key, artefact_key, blur_key, noise_key, jpeg_key = jax.random.split(key, 6)
    parameter_shape = bag_shape if config.each == "instance" else (bag_shape[0], 1, 1)
    changes_colour = config.stain or config.hed or config.stain_swap_prob
    jpeg_min_quality = float(config.jpeg_min_quality)
    return Augmentation(
        flips=jax.random.bernoulli(flip_key, 0.5, (*bag_shape, 3)) if config.flips else None,
        colour=_sample_colour(colour_key, parameter_shape, config, stain) if changes_colour else None,
        artefacts=sample_artefacts(artefact_key, bag_shape, config.artefacts) if config.artefacts else None,
        blur_px=jax.random.uniform(blur_key, parameter_shape, maxval=config.blur) if config.blur else None,
        noise=_sample_noise(noise_key, bag_shape, parameter_shape, config.noise) if config.noise else None,
        jpeg_quality=jax.random.uniform(jpeg_key, parameter_shape, minval=jpeg_min_quality, maxval=100.0)
        if jpeg_min_quality < _NO_JPEG
        else None,
        chroma_subsampled=bool(config.jpeg_420),
    )


def augment(
    pixels: Num[Array, "batch region slot y x 3"], augmentation: Augmentation, first_region: Int[Array, ""] | int = 0
) -> Num[Array, "batch region slot y x 3"]:
    """Augments tiles; intensities are 0 to 255.

    Args:
      pixels: consecutive regions of each bag.
      augmentation: the parameters of all regions of the bags, from `sample_augmentation`.
      first_region: the index within the bag of the first region of `pixels`.
    """
    regions = pixels.shape[1]

    def select_regions(parameter: Array) -> Array:
        is_shared_by_slide = parameter.shape[1] == 1
        return (
            parameter if is_shared_by_slide else jax.lax.dynamic_slice_in_dim(parameter, first_region, regions, axis=1)
        )

    augmentation = jax.tree.map(select_regions, augmentation)
    if augmentation.flips is not None:
        pixels = _flip(pixels, augmentation.flips[:, :, :, None, None, None])
    if augmentation.colour is not None:
        pixels = _change_colour(pixels, augmentation.colour)
    intensities = pixels.astype(jnp.float32)
    if augmentation.artefacts is not None:
        pixels = intensities = add_artefacts(intensities, augmentation.artefacts)
    if augmentation.blur_px is not None:
        pixels = intensities = blur(intensities, augmentation.blur_px)
    if augmentation.noise is not None:
        pixels = intensities = _add_noise(intensities, augmentation.noise)
    if augmentation.jpeg_quality is not None:
        pixels = jpeg(intensities, augmentation.jpeg_quality, augmentation.chroma_subsampled)
    return pixels


def _sample_noise(
    key: Key[Array, ""], bag_shape: tuple[int, int, int], parameter_shape: tuple[int, int, int], max_deviation: float
) -> Noise:
    deviation_key, tile_key = jax.random.split(key)
    deviation = jax.random.uniform(deviation_key, parameter_shape, maxval=max_deviation)
    return Noise(deviation, jax.random.split(tile_key, bag_shape))


def _sample_colour(
    key: Key[Array, ""], parameter_shape: tuple[int, int, int], config: ConfigDict, stain: StainEstimate | None
) -> ColourChange:
    """Samples all changes of colour as one matrix: stain swapping, then a gain per stain, then a gain per colour channel.

    Gains are exp(N(0, strength²)). A channel's log gain is the sum of a sample that all channels share and a sample for this
    channel alone. Stain gains act along the slide's estimated stain vectors; without an estimate, along the vectors of
    Ruifrok and Johnston 2001, which Tellez et al. 2019 use for all slides.
    """
    swap_key, hed_key, channel_key = jax.random.split(key, 3)
    batch = parameter_shape[0]
    if isinstance(stain, StainMatrix):
        vectors, white = jnp.asarray(stain.vectors), jnp.asarray(stain.white)
    else:
        vectors, white = jnp.broadcast_to(_RUIFROK, (batch, 2, 3)), jnp.full((batch, 3), 255.0)
    basis, before = _basis(vectors)[:, None, None], white[:, None, None]
    after = jnp.broadcast_to(before, (*parameter_shape, 3))
    density = jnp.broadcast_to(jnp.eye(3), (*parameter_shape, 3, 3))
    if config.stain_swap_prob:
        if not isinstance(stain, StainMatrix):
            raise TypeError(
                "stain swapping needs each slide's stain matrix; check_config should have refused this config"
            )
        reliable, concentration = jnp.asarray(stain.reliable), jnp.asarray(stain.concentration)
        donor = _sample_donor(swap_key, parameter_shape, config.stain_swap_prob, reliable)
        # The residual, which is no stain, keeps its concentration.
        stain_ratio = concentration[donor] / concentration[:, None, None]
        ratio = jnp.concatenate([stain_ratio, jnp.ones((*parameter_shape, 1))], axis=-1)
        after, donor_basis = white[donor], _basis(vectors)[donor]
        density, basis = jnp.linalg.inv(basis) @ (ratio[..., None] * donor_basis), donor_basis
    if config.hed:
        gain = jnp.exp(config.hed * jax.random.normal(hed_key, (*parameter_shape, 3)))
        density = density @ (jnp.linalg.inv(basis) @ (gain[..., None] * basis))
    if config.stain:
        log_gain = jax.random.normal(channel_key, (*parameter_shape, 4)) * config.stain
        density = density * jnp.exp(log_gain[..., :1] + log_gain[..., 1:])[..., None, :]
    return ColourChange(density, before, after)


def _sample_donor(
    key: Key[Array, ""], parameter_shape: tuple[int, int, int], probability: float, reliable: Bool[Array, " batch"]
) -> Int[Array, "batch parameter_region parameter_slot"]:
    """Samples the index of the bag whose stains each bag gets.

    With `probability` it is another bag, provided that the stain estimates of both are reliable; else the bag itself.
    """
    swap_key, donor_key = jax.random.split(key)
    batch = parameter_shape[0]
    receiver = jnp.arange(batch)[:, None, None]
    donor = (receiver + jax.random.randint(donor_key, parameter_shape, 1, max(2, batch))) % batch
    swaps = jax.random.bernoulli(swap_key, probability, parameter_shape) & reliable[receiver] & reliable[donor]
    return jnp.where(swaps, donor, receiver)


def _basis(vectors: Float32[Array, "*slide 2 3"]) -> Float32[Array, "*slide 3 3"]:
    """Unit vectors of the two stains and of the residual, which is orthogonal to both."""
    residual = jnp.cross(vectors[..., 0, :], vectors[..., 1, :])
    basis = jnp.concatenate([vectors, residual[..., None, :]], axis=-2)
    return basis / jnp.linalg.norm(basis, axis=-1, keepdims=True)


def _flip(
    pixels: Num[Array, "batch region slot y x 3"], flips: Bool[Array, "batch region slot 1 1 1 3"]
) -> Num[Array, "batch region slot y x 3"]:
    pixels = jnp.where(flips[..., 0], pixels[..., ::-1, :], pixels)
    pixels = jnp.where(flips[..., 1], pixels[..., ::-1, :, :], pixels)
    return jnp.where(flips[..., 2], jnp.swapaxes(pixels, -2, -3), pixels)


def _change_colour(
    pixels: Num[Array, "batch region slot y x 3"], change: ColourChange
) -> Float32[Array, "batch region slot y x 3"]:
    before, after = (background[..., None, None, :] + 1.0 for background in (change.before, change.after))
    # The negative optical density; positive where a pixel is brighter than the background.
    log_ratio = jnp.log((pixels.astype(jnp.float32) + 1.0) / before)
    matrix = change.density[..., None, None, :, :]
    # A sum per channel, not a matrix product: XLA fuses it with the rest into one pass over the pixels.
    channels = [sum(log_ratio[..., i] * matrix[..., i, j] for i in range(3)) for j in range(3)]
    return jnp.clip(after * jnp.exp(jnp.stack(channels, axis=-1)) - 1.0, 0.0, 255.0)


def _add_noise(
    intensities: Float32[Array, "batch region slot y x 3"], noise: Noise
) -> Float32[Array, "batch region slot y x 3"]:
    sample_tile = jnp.vectorize(lambda key: jax.random.normal(key, intensities.shape[3:]), signature="()->(y,x,c)")
    return jnp.clip(intensities + noise.deviation[..., None, None, None] * sample_tile(noise.key), 0.0, 255.0)
