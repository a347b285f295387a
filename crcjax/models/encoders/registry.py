"""The table of published tile encoders, and the construction of the encoder that `config.model.encoder` names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Num
from ml_collections import ConfigDict

from crcjax.errors import InputError
from crcjax.models.encoders.compact import CompactEncoder
from crcjax.models.encoders.convnets import BatchNorm, ConvNeXt, ResNet
from crcjax.models.encoders.swin import Swin
from crcjax.models.encoders.vit import ViT, linear_layer
from crcjax.models.feature_scaling import Standardiser

RGB = tuple[float, float, float]
IMAGENET: tuple[RGB, RGB] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF: tuple[RGB, RGB] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
H_OPTIMUS: tuple[RGB, RGB] = (0.707223, 0.578729, 0.703617), (0.211883, 0.230117, 0.177517)
HIBOU: tuple[RGB, RGB] = (0.7068, 0.5755, 0.722), (0.195, 0.2316, 0.1816)
LUNIT: tuple[RGB, RGB] = (0.70322989, 0.53606487, 0.66096631), (0.21716536, 0.26081574, 0.20723464)


@dataclass(frozen=True)
class PretrainedEncoder:
    """A published tile encoder, with the preprocessing of its authors.

    A tile is resized to `resize_px`, cropped to its centre of `size_px`, and each channel is normalised.

    Attributes:
      build: constructs the module from `dtype` and `rngs`.
      features: the number of features.
      mpp: the resolution of its training, or the recommended one, in µm per pixel; None for natural images.
      source: where its weights are published: a name on Hugging Face, or a project page.
      normalisation: the mean and standard deviation of each channel, for intensities from 0 to 1.
      resize_px: the side of the resized tile.
      size_px: the side of the crop.
      resampling: "linear" or "cubic".
    """

    build: Callable[..., nnx.Module]
    features: int
    mpp: float | None
    source: str
    normalisation: tuple[RGB, RGB] = IMAGENET
    resize_px: int = 224
    size_px: int = 224
    resampling: str = "linear"

    def prepare(self, pixels: Num[Array | np.ndarray, "tile y x 3"]) -> Float32[Array, "tile row column 3"]:
        """Preprocesses tiles of 8-bit intensities of any numeric type; resizes as Pillow does."""
        images = jnp.asarray(pixels).astype(jnp.float32)
        side = self.resize_px
        # Pillow resizes rows first and rounds to integer intensities before it resizes columns.
        for shape in ((images.shape[0], images.shape[1], side, 3), (images.shape[0], side, side, 3)):
            if images.shape != shape:
                resized = jax.image.resize(images, shape, self.resampling, antialias=True)
                images = jnp.clip(jnp.floor(resized + 0.5), 0, 255)
        border = (side - self.size_px) // 2
        images = images[:, border : border + self.size_px, border : border + self.size_px]
        mean, std = (jnp.asarray(values, jnp.float32) for values in self.normalisation)
        return (images / 255 - mean) / std


def _vit(patch_px: int, width: int, depth: int, heads: int, **options: Any) -> Callable[..., nnx.Module]:
    defaults: dict[str, Any] = {"grid": 224 // patch_px, "hidden": 4 * width}
    return partial(ViT, patch_px=patch_px, width=width, depth=depth, heads=heads, **defaults | options)


def _small(patch_px: int, **options: Any) -> Callable[..., nnx.Module]:
    return _vit(patch_px, 384, 12, 6, **options)


def _base(patch_px: int, **options: Any) -> Callable[..., nnx.Module]:
    return _vit(patch_px, 768, 12, 12, **options)


def _large(patch_px: int, **options: Any) -> Callable[..., nnx.Module]:
    return _vit(patch_px, 1024, 24, 16, **options)


_huge = partial(_vit, 14, 1280, 32, 16, hidden=6832, swiglu=True, layer_scale=True)
_giant = partial(_vit, width=1536, heads=24, hidden=8192, swiglu=True, layer_scale=True)
_FOUR_REGISTERS: dict[str, Any] = {"layer_scale": True, "registers": 4, "embed_prefix": False}

PRETRAINED: dict[str, PretrainedEncoder] = {
    "uni": PretrainedEncoder(_large(16, layer_scale=True), 1024, 0.5, "MahmoodLab/UNI"),
    "uni2-h": PretrainedEncoder(_giant(14, depth=24, registers=8, embed_prefix=False), 1536, 0.5, "MahmoodLab/UNI2-h"),
    "virchow": PretrainedEncoder(_huge(pool="class_mean"), 2560, 0.5, "paige-ai/Virchow", resampling="cubic"),
    "virchow2": PretrainedEncoder(
        _huge(pool="class_mean", registers=4), 2560, 0.5, "paige-ai/Virchow2", resampling="cubic"
    ),
    "h-optimus-0": PretrainedEncoder(
        _giant(14, depth=40, registers=4, embed_prefix=False), 1536, 0.5, "bioptimus/H-optimus-0", H_OPTIMUS
    ),
    "h-optimus-1": PretrainedEncoder(
        _giant(14, depth=40, registers=4, embed_prefix=False), 1536, 0.5, "bioptimus/H-optimus-1", H_OPTIMUS
    ),
    "prov-gigapath": PretrainedEncoder(
        _giant(16, depth=40), 1536, 0.5, "prov-gigapath/prov-gigapath", resize_px=256, resampling="cubic"
    ),
    "phikon": PretrainedEncoder(_base(16, epsilon=1e-12), 768, 0.5, "owkin/phikon"),
    "phikon-v2": PretrainedEncoder(_large(16, layer_scale=True), 1024, 0.5, "owkin/phikon-v2"),
    "ctranspath": PretrainedEncoder(partial(Swin, conv_stem=True), 768, 1.0, "github.com/Xiyue-Wang/TransPath"),
    "hibou-b": PretrainedEncoder(
        _base(14, swiglu=True, hidden=4096, **_FOUR_REGISTERS), 768, 0.5, "histai/hibou-b", HIBOU, resampling="cubic"
    ),
    "hibou-l": PretrainedEncoder(
        _large(14, swiglu=True, hidden=5472, **_FOUR_REGISTERS), 1024, 0.5, "histai/hibou-L", HIBOU, resampling="cubic"
    ),
    "kaiko-vits8": PretrainedEncoder(
        _small(8), 384, 0.5, "1aurent/vit_small_patch8_224.kaiko_ai_towards_large_pathology_fms", HALF
    ),
    "kaiko-vits16": PretrainedEncoder(
        _small(16), 384, 0.5, "1aurent/vit_small_patch16_224.kaiko_ai_towards_large_pathology_fms", HALF
    ),
    "kaiko-vitb8": PretrainedEncoder(
        _base(8), 768, 0.5, "1aurent/vit_base_patch8_224.kaiko_ai_towards_large_pathology_fms", HALF
    ),
    "kaiko-vitb16": PretrainedEncoder(
        _base(16), 768, 0.5, "1aurent/vit_base_patch16_224.kaiko_ai_towards_large_pathology_fms", HALF
    ),
    "kaiko-vitl14": PretrainedEncoder(
        _large(14, grid=37, **_FOUR_REGISTERS),
        1024,
        0.5,
        "1aurent/vit_large_patch14_reg4_224.kaiko_ai_towards_large_pathology_fms",
        HALF,
    ),
    "lunit-dino-s8": PretrainedEncoder(_small(8), 384, 0.5, "1aurent/vit_small_patch8_224.lunit_dino", LUNIT),
    "lunit-dino-s16": PretrainedEncoder(_small(16), 384, 0.5, "1aurent/vit_small_patch16_224.lunit_dino", LUNIT),
    "imagenet-vit-b16": PretrainedEncoder(
        _base(16), 768, None, "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", HALF, resampling="cubic"
    ),
    "imagenet-swin-t": PretrainedEncoder(
        Swin, 768, None, "timm/swin_tiny_patch4_window7_224.ms_in1k", resampling="cubic"
    ),
    "imagenet-convnext-t": PretrainedEncoder(ConvNeXt, 768, None, "timm/convnext_tiny.fb_in1k", resampling="cubic"),
    "imagenet-resnet50": PretrainedEncoder(ResNet, 2048, None, "timm/resnet50.tv_in1k"),
    "imagenet-resnet50-clam": PretrainedEncoder(partial(ResNet, depths=(3, 4, 6)), 1024, None, "timm/resnet50.tv_in1k"),
}


def pretrained_encoder(name: str) -> PretrainedEncoder:
    """Looks up an encoder by name. Raises InputError for an unknown name."""
    if name not in PRETRAINED:
        raise InputError(f"encoder {name!r}: choose one of {', '.join(PRETRAINED)}")
    return PRETRAINED[name]


def encoder_table() -> str:
    """Returns the Markdown table of docs/encoders.md."""
    rows = ["| encoder | kind | features | µm per px | tile | mean | std | weights |", "|" + "---|" * 8]
    for name, encoder in PRETRAINED.items():
        crop = f", its centre of {encoder.size_px}" if encoder.size_px < encoder.resize_px else ""
        mean, std = ("{:.4g}, {:.4g}, {:.4g}".format(*values) for values in encoder.normalisation)
        tile = f"{encoder.resize_px} px {encoder.resampling}{crop}"
        cells = (name, _architecture(encoder), encoder.features, encoder.mpp or "any", tile, mean, std, encoder.source)
        rows.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _architecture(encoder: PretrainedEncoder) -> str:
    shape = getattr(encoder.build, "keywords", {})
    if "patch_px" not in shape:
        return getattr(encoder.build, "func", encoder.build).__name__
    size = {384: "S", 768: "B", 1024: "L", 1280: "H", 1536: "g"}[shape["width"]]
    properties = [f"ViT-{size}/{shape['patch_px']}, {shape['depth']} blocks"]
    properties += [f"{shape['registers']} registers"] if "registers" in shape else []
    properties += ["SwiGLU"] if shape.get("swiglu") else []
    properties += ["class and mean"] if shape.get("pool") == "class_mean" else []
    return ", ".join(properties)


class PublishedEncoder(nnx.Module):
    """A published encoder within the MIL model: preprocesses tiles, encodes them, and projects the features.

    With `config.frozen`, only the projection is trained.
    """

    def __init__(self, config: ConfigDict, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.name, self.frozen = config.encoder, config.frozen
        encoder = PRETRAINED[config.encoder]
        self.published = encoder.build(dtype=dtype, rngs=rngs)
        self.standardiser = Standardiser(encoder.features, config.standardise) if config.standardise else None
        self.project = linear_layer(encoder.features, config.features, dtype=dtype, rngs=rngs)

    def __call__(self, pixels: Num[Array, "tile y x 3"]) -> Float[Array, "tile feature"]:
        features = self.published(PRETRAINED[self.name].prepare(pixels))  # type: ignore[operator]
        features = jax.lax.stop_gradient(features) if self.frozen else features
        return self.project(self.standardiser(features) if self.standardiser else features)


class ImportedFeatures(nnx.Module):
    """Takes the place of an encoder whose features were imported and whose weights are unknown: projects the features."""

    def __init__(self, config: ConfigDict, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.standardiser = Standardiser(config.imported_features, config.standardise) if config.standardise else None
        self.project = linear_layer(config.imported_features, config.features, dtype=dtype, rngs=rngs)


# The encoders whose features can come from a store.
StoredEncoder = PublishedEncoder | ImportedFeatures


def build_encoder(config: ConfigDict, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    """Builds the tile encoder that `config.encoder` names, with random weights.

    Raises InputError for an unknown encoder, and for `config.batch_norm_momentum` without a trained BatchNorm layer.
    """
    encoder_class: Callable[..., nnx.Module]
    if config.imported_features:
        encoder_class = ImportedFeatures
    elif config.encoder == "compact":
        encoder_class = CompactEncoder
    elif config.encoder in PRETRAINED:
        encoder_class = PublishedEncoder
    else:
        raise InputError(f"config.model.encoder {config.encoder!r}: choose one of compact, {', '.join(PRETRAINED)}")
    encoder = encoder_class(config, dtype=dtype, rngs=rngs)
    if config.batch_norm_momentum:
        _check_batch_norm(config, encoder)
    return encoder


def has_published_encoder(config: ConfigDict) -> bool:
    """Whether a model has a published encoder; `config` is config.model."""
    return config.encoder in PRETRAINED and not config.imported_features


def _check_batch_norm(config: ConfigDict, encoder: nnx.Module) -> None:
    field, momentum = "config.model.batch_norm_momentum", config.batch_norm_momentum
    if not 0 < momentum <= 1:
        raise InputError(f"{field} must be a share from 0 to 1, got {momentum}")
    if not any(isinstance(submodule, BatchNorm) for _, submodule in nnx.iter_modules(encoder)):
        raise InputError(f"{field} must be 0 for {config.encoder}, which has no BatchNorm layers, got {momentum}")
    if config.frozen:
        raise InputError(
            f"{field} must be 0 for a frozen encoder, got {momentum}; set it to 0, or config.model.frozen to False"
        )
