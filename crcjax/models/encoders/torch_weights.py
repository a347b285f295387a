"""Tensors of a torch checkpoint into a module whose parts are named as timm names them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from crcjax.errors import InputError

Tensors = Mapping[str, np.ndarray]

_TORCH_NAMES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}  # axes of a kernel, by its number of axes
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
# What checkpoints hold that makes no features: heads, buffers, the mask token of training, CLAM's last stage.
_UNUSED = re.compile(
    r"(num_batches_tracked|relative_position_index|attn_mask|mask_token)$|^(pooler|head|head_dist|fc|classifier|layer4)\."
)
_WRAPPERS = ("module.", "model.", "backbone.", "encoder.", "vit.", "dinov2.", "dinov2_with_registers.")
_OTHER_NAMES = [
    (r"^embeddings\.(cls_token|register_tokens)$", r"\1"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.(weights_in|w12)\.", ".mlp.fc1."),
    (r"\.mlp\.(weights_out|w3)\.", ".mlp.fc2."),
    (r"^layernorm\.", "norm."),
]
_SHOWN = 8


def fill(
    build: Callable[..., nnx.Module],
    tensors: Tensors,
    dtype: DTypeLike,
    origin: str,
    weights_dtype: DTypeLike | None = None,
) -> nnx.Module:
    """The module of `build`, computing in `dtype`, with a checkpoint's weights, under timm's names or Hugging Face's.

    Kernels are `kept` in `dtype` too, by default, all else in float32. Raises InputError, which begins with `origin`,
    listing the keys that are missing, unexpected or of another shape.
    """
    model = nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    wanted = {path: (_torch_name(path), _torch_shape(path, leaf.shape)) for path, leaf in flat}
    renamed = timm_names(tensors)
    _check(dict(wanted.values()), renamed, origin)
    filled = [
        (path, leaf.replace(_as_ours(path, renamed[wanted[path][0]], weights_dtype or dtype))) for path, leaf in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def torch_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """A module's weights under the names and with the axes of torch: what `fill` takes."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {_torch_name(path): np.ascontiguousarray(_as_torch(path, np.asarray(leaf[...]))) for path, leaf in flat}


def timm_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as timm names and joins them today."""
    renamed = dict(tensors)
    while wrapper := next(
        (name for name in _WRAPPERS if renamed and all(key.startswith(name) for key in renamed)), None
    ):
        renamed = {key.removeprefix(wrapper): value for key, value in renamed.items()}
    for pattern, name in _OTHER_NAMES:
        renamed = {re.sub(pattern, name, key): value for key, value in renamed.items()}
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = [renamed.pop(key.replace(".query.", f".{part}.")) for part in ("query", "key", "value")]
        renamed[key.replace(".query.", ".qkv.")] = np.concatenate(parts)
    if "register_tokens" in renamed:
        # DINOv2 gives its registers no positions; timm then keeps that of the class token within the token.
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    if "layers.0.downsample.reduction.weight" in renamed:
        # Before timm 0.9 a stage of Swin ended with the merging with which the next one now begins.
        renamed = {re.sub(r"^layers\.(\d+)\.downsample", _next_layer, key): value for key, value in renamed.items()}
    return renamed


def _next_layer(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _torch_name(path: tuple[Any, ...]) -> str:
    *parts, last = map(str, path)
    return ".".join([*parts, _TORCH_NAMES.get(last, last)])


def _torch_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if path[-1] == "kernel" else tuple(shape)


def _as_torch(path: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    return value.transpose(_TO_TORCH[value.ndim]) if path[-1] == "kernel" else value


def _as_ours(path: tuple[Any, ...], tensor: np.ndarray, dtype: DTypeLike) -> jnp.ndarray:
    if path[-1] == "kernel":
        return jnp.asarray(tensor.transpose(_FROM_TORCH[tensor.ndim]), dtype)
    return jnp.asarray(tensor, jnp.float32)


def _check(wanted: dict[str, tuple[int, ...]], tensors: Tensors, origin: str) -> None:
    missing = [name for name in wanted if name not in tensors]
    unexpected = [name for name in tensors if name not in wanted and not _UNUSED.search(name)]
    reshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    faults = [f"{len(keys)} {kind}: {_first_few(keys)}" for kind, keys in kinds if keys]
    if faults:
        raise InputError(
            f"{origin}: {'; '.join(faults)}; give the encoder's own weights, or name the encoder they are of"
        )


def _first_few(keys: list[str]) -> str:
    return ", ".join(keys[:_SHOWN]) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
