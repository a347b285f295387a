"""Loads the tensors of a torch checkpoint into a module whose submodules have the names of timm."""

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
# The order of a kernel's axes, by their number.
_TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}
_FROM_TORCH = {2: (1, 0), 4: (2, 3, 1, 0)}
# Tensors of checkpoints that do not contribute to features: heads, buffers, the mask token of training, CLAM's last stage.
_UNUSED = re.compile(
    r"(num_batches_tracked|relative_position_index|attn_mask|mask_token)$|^(pooler|head|head_dist|fc|classifier|layer4)\."
)
_WRAPPERS = ("module.", "model.", "backbone.", "encoder.", "vit.", "dinov2.", "dinov2_with_registers.")
# Names of Hugging Face's and DINOv2's implementations, and the names of timm.
_TIMM_NAMES = [
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
# Keys that an error lists.
_LISTED_KEYS = 8


def fill(
    build: Callable[..., nnx.Module],
    tensors: Tensors,
    dtype: DTypeLike,
    origin: str,
    weights_dtype: DTypeLike | None = None,
) -> nnx.Module:
    """Builds a module with the weights of a checkpoint.

    Args:
      build: constructs the module from `dtype` and `rngs`.
      tensors: the checkpoint, with the names of timm or Hugging Face.
      dtype: the type of the computation.
      origin: the beginning of error messages.
      weights_dtype: the type of the stored kernels, by default `dtype`; all other parameters are stored in float32.

    Raises:
      InputError: keys are missing, unexpected or of another shape; the message lists them.
    """
    model = nnx.eval_shape(lambda: build(dtype=dtype, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    expected = {path: (_torch_name(path), _torch_shape(path, leaf.shape)) for path, leaf in flat}
    renamed = timm_names(tensors)
    _check(dict(expected.values()), renamed, origin)
    filled = [
        (path, leaf.replace(_from_torch(path, renamed[expected[path][0]], weights_dtype or dtype)))
        for path, leaf in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def torch_tensors(module: nnx.Module) -> dict[str, np.ndarray]:
    """Returns a module's weights with torch's names and axes, as `fill` reads them."""
    flat = nnx.to_flat_state(nnx.state(module))
    return {_torch_name(path): np.ascontiguousarray(_as_torch(path, np.asarray(leaf[...]))) for path, leaf in flat}


def timm_names(tensors: Tensors) -> dict[str, np.ndarray]:
    """Renames and joins the tensors of a checkpoint as current timm does."""
    renamed = dict(tensors)
    while wrapper := next(
        (name for name in _WRAPPERS if renamed and all(key.startswith(name) for key in renamed)), None
    ):
        renamed = {key.removeprefix(wrapper): value for key, value in renamed.items()}
    for pattern, name in _TIMM_NAMES:
        renamed = {re.sub(pattern, name, key): value for key, value in renamed.items()}
    for key in [key for key in renamed if ".attn.query." in key]:
        projections = [renamed.pop(key.replace(".query.", f".{name}.")) for name in ("query", "key", "value")]
        renamed[key.replace(".query.", ".qkv.")] = np.concatenate(projections)
    if "register_tokens" in renamed:
        # DINOv2's registers have no positions; timm then adds the position of the class token to the token.
        renamed["reg_token"] = renamed.pop("register_tokens")
        renamed["cls_token"] = renamed["cls_token"] + renamed["pos_embed"][:, :1]
        renamed["pos_embed"] = renamed["pos_embed"][:, 1:]
    if "layers.0.downsample.reduction.weight" in renamed:
        # Before timm 0.9, patch merging belonged to the end of a Swin stage; now it is the beginning of the next stage.
        renamed = {re.sub(r"^layers\.(\d+)\.downsample", _next_layer, key): value for key, value in renamed.items()}
    return renamed


def _next_layer(match: re.Match[str]) -> str:
    return f"layers.{int(match[1]) + 1}.downsample"


def _torch_name(path: tuple[Any, ...]) -> str:
    *modules, parameter = map(str, path)
    return ".".join([*modules, _TORCH_NAMES.get(parameter, parameter)])


def _torch_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in _TO_TORCH[len(shape)]) if path[-1] == "kernel" else tuple(shape)


def _as_torch(path: tuple[Any, ...], value: np.ndarray) -> np.ndarray:
    return value.transpose(_TO_TORCH[value.ndim]) if path[-1] == "kernel" else value


def _from_torch(path: tuple[Any, ...], tensor: np.ndarray, dtype: DTypeLike) -> jnp.ndarray:
    if path[-1] == "kernel":
        return jnp.asarray(tensor.transpose(_FROM_TORCH[tensor.ndim]), dtype)
    return jnp.asarray(tensor, jnp.float32)


def _check(expected: dict[str, tuple[int, ...]], tensors: Tensors, origin: str) -> None:
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected and not _UNUSED.search(name)]
    reshaped = [
        f"{name} {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    kinds = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
    mismatches = [f"{len(keys)} {kind}: {_first_few(keys)}" for kind, keys in kinds if keys]
    if mismatches:
        raise InputError(
            f"{origin}: {'; '.join(mismatches)}; give the weights of this encoder, or name the encoder of these weights"
        )


def _first_few(keys: list[str]) -> str:
    return ", ".join(keys[:_LISTED_KEYS]) + (
        f" and {len(keys) - _LISTED_KEYS} more" if len(keys) > _LISTED_KEYS else ""
    )
