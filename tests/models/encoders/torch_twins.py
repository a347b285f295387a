"""The encoders of the table as their model cards make them in timm or transformers, with random weights. Needs torch."""

from __future__ import annotations

import tempfile

import numpy as np
import timm
import torch
from safetensors.numpy import load_file
from timm.layers import SwiGLUPacked
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)


class ConvStem(nn.Module):
    """CTransPath's stem: two strided convolutions and a projection in place of the patches (Wang 2022)."""

    def __init__(self, embed_dim: int, norm_layer: type[nn.Module], **others: object):
        super().__init__()
        thin = embed_dim // 8
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, thin), (thin, 2 * thin)):
            layers += [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.proj = nn.Sequential(*layers, nn.Conv2d(2 * thin, embed_dim, 1))
        self.norm = norm_layer(embed_dim)
        self.grid_size = (56, 56)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.proj(images).permute(0, 2, 3, 1))


_SWIGLU = {"mlp_layer": SwiGLUPacked, "act_layer": nn.SiLU}
_VIRCHOW = {"init_values": 1e-5, "mlp_ratio": 5.3375, "global_pool": "", **_SWIGLU}
_H_OPTIMUS = ("vit_giant_patch14_reg4_dinov2", {"img_size": 224, "init_values": 1e-5})
_UNI2 = {
    "patch_size": 14,
    "depth": 24,
    "num_heads": 24,
    "init_values": 1e-5,
    "embed_dim": 1536,
    "mlp_ratio": 2.66667 * 2,
}
_GIGAPATH = {"patch_size": 16, "embed_dim": 1536, "depth": 40, "num_heads": 24, "mlp_ratio": 5.33334, "img_size": 224}
TIMM = {
    "uni": ("vit_large_patch16_224", {"init_values": 1e-5}),
    "uni2-h": ("vit_giant_patch14_224", {**_UNI2, **_SWIGLU, "no_embed_class": True, "reg_tokens": 8}),
    "virchow": ("vit_huge_patch14_224", _VIRCHOW),
    "virchow2": ("vit_huge_patch14_224", {**_VIRCHOW, "reg_tokens": 4}),
    "h-optimus-0": _H_OPTIMUS,
    "h-optimus-1": _H_OPTIMUS,
    "prov-gigapath": ("vit_giant_patch14_dinov2", _GIGAPATH),
    "ctranspath": ("swin_tiny_patch4_window7_224", {"embed_layer": ConvStem}),
    "kaiko-vits8": ("vit_small_patch8_224", {}),
    "kaiko-vits16": ("vit_small_patch16_224", {}),
    "kaiko-vitb8": ("vit_base_patch8_224", {}),
    "kaiko-vitb16": ("vit_base_patch16_224", {}),
    "kaiko-vitl14": ("vit_large_patch14_reg4_dinov2", {"img_size": 518, "dynamic_img_size": True}),
    "lunit-dino-s8": ("vit_small_patch8_224", {}),
    "lunit-dino-s16": ("vit_small_patch16_224", {}),
    "imagenet-vit-b16": ("vit_base_patch16_224", {}),
    "imagenet-swin-t": ("swin_tiny_patch4_window7_224", {}),
    "imagenet-convnext-t": ("convnext_tiny", {}),
    "imagenet-resnet50": ("resnet50", {}),
    "imagenet-resnet50-clam": ("resnet50", {}),
}
_REGISTERS = {"num_register_tokens": 4, "use_swiglu_ffn": True, "patch_size": 14, "image_size": 224}
_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
TRANSFORMERS = {
    "phikon": (ViTModel, ViTConfig, {}),
    "phikon-v2": (Dinov2Model, Dinov2Config, {**_LARGE, "patch_size": 16, "image_size": 224}),
    "hibou-b": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, _REGISTERS),
    "hibou-l": (Dinov2WithRegistersModel, Dinov2WithRegistersConfig, {**_LARGE, **_REGISTERS}),
}


def twin(name: str, small: bool, **changes: object) -> nn.Module:
    """The torch model of an encoder; a small one has fewer blocks and channels. Those of transformers have one block if not."""
    if name in TRANSFORMERS:
        model, config, shape = TRANSFORMERS[name]
        shape = {**shape, "num_hidden_layers": 1}
        if small:
            shape = {
                **shape,
                "hidden_size": 48,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "intermediate_size": 192,
            }
        options = {"add_pooling_layer": False} if model is ViTModel else {}
        return _randomised(model(config(**shape), **options).eval())
    timm_name, shape = TIMM[name]
    if small and timm_name.startswith("vit"):
        shape = {**shape, "depth": 2, "embed_dim": 48, "num_heads": 3}
    elif small:
        shape = {**shape, **SMALL[timm_name]}
    return _randomised(timm.create_model(timm_name, num_classes=0, **shape, **changes).eval())


SMALL = {
    "swin_tiny_patch4_window7_224": {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    "convnext_tiny": {"depths": (1, 1, 2, 1), "dims": (8, 16, 24, 32)},
    "resnet50": {"layers": (1, 2, 1, 1)},
}


def tensors(model: nn.Module) -> dict[str, np.ndarray]:
    """What a file of the model holds. In memory, transformers gives some parts other names than in its files."""
    if hasattr(model, "save_pretrained"):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return load_file(f"{folder}/model.safetensors")
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


def features(name: str, model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The features that the model card takes."""
    with torch.no_grad():
        if name in TRANSFORMERS:
            return model(pixel_values=images).last_hidden_state[:, 0]
        if name.startswith("virchow"):
            tokens = model(images)
            return torch.cat([tokens[:, 0], tokens[:, model.num_prefix_tokens :].mean(1)], -1)
        if name == "imagenet-resnet50-clam":
            for part in ("conv1", "bn1", "act1", "maxpool", "layer1", "layer2", "layer3"):
                images = getattr(model, part)(images)
            return images.mean((2, 3))
        return model(images)


def _randomised(model: nn.Module) -> nn.Module:
    """Weights at which every part matters: as they are drawn, LayerScale would hide all blocks."""
    draw = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point() or value.is_meta:
            continue
        noise = torch.randn(value.shape, generator=draw)
        if name.endswith("running_var"):
            noise = 1 + noise.abs()
        elif value.ndim == 1 and name.endswith(("weight", "gamma", "lambda1")):
            noise = 1 + 0.2 * noise
        elif name.endswith("weight"):
            noise = noise / value[0].numel() ** 0.5
        else:
            noise = 0.3 * noise
        value.copy_(noise)
    return model
