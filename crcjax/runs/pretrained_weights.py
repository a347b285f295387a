"""Weights of published encoders, from safetensors files or torch checkpoints, read without torch."""

from __future__ import annotations

import hashlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from crcjax.errors import InputError
from crcjax.models.encoders.registry import PublishedEncoder, pretrained_encoder
from crcjax.models.encoders.torch_weights import fill
from crcjax.models.mil import DTYPES, MILModel, build_model

_CONVERT = "convert it with torch: safetensors.torch.save_file(torch.load(FILE), 'model.safetensors')"
# The NumPy type of each torch storage.
_STORAGES = {
    "FloatStorage": np.float32,
    "HalfStorage": np.float16,
    "BFloat16Storage": jnp.bfloat16,
    "DoubleStorage": np.float64,
    "LongStorage": np.int64,
    "IntStorage": np.int32,
    "BoolStorage": np.bool_,
    "ByteStorage": np.uint8,
}


@dataclass(frozen=True)
class Weights:
    """The tensors of a file, by name, and the SHA-256 of the file."""

    path: Path
    sha256: str
    tensors: dict[str, np.ndarray]


def load_encoder(name: str, path: Path, dtype: DTypeLike = jnp.float32) -> tuple[nnx.Module, str]:
    """Builds the published encoder of this name with the weights of a file.

    Returns:
      The encoder, and the SHA-256 of the file.

    Raises:
      InputError: there is no such encoder, or the file cannot be read or does not fit it.
    """
    encoder = pretrained_encoder(name)
    weights = read_weights(path)
    return fill(encoder.build, weights.tensors, dtype, f"{path} does not fit {name}"), weights.sha256


def build_unloaded(config: ConfigDict, classes: int, seed: int, factors: tuple[int, ...]) -> MILModel:
    """Like `build_model`, but a published encoder has shapes in place of weights until `load_published`.

    `config` is config.model. Sampling weights that are overwritten would take most of a start: 27 s with ResNet-50.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: build_model(config, classes, seed, factors)))

    @jax.jit
    def sampled() -> list[jax.Array]:
        # XLA removes the computation of the weights that are not returned.
        flat = nnx.to_flat_state(nnx.state(build_model(config, classes, seed, factors)))
        return [leaf[...] for path, leaf in flat if "published" not in path]

    values = iter(sampled())
    flat = nnx.to_flat_state(state)
    filled = [(path, leaf if "published" in path else leaf.replace(next(values))) for path, leaf in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def load_published(model: MILModel, config: ConfigDict) -> str:
    """Loads a model's published encoder from the file config.model.weights (`config` is config.model).

    Parameters are float32, whatever the type of the computation.

    Returns:
      The SHA-256 of the file.

    Raises:
      InputError: no file is given, or it cannot be read or does not fit the encoder.
    """
    if not config.weights:
        raise InputError(f"config.model.weights is empty; give the file of {config.encoder}'s weights")
    assert isinstance(model.encoder, PublishedEncoder)
    model.encoder.published, sha256 = published_encoder(config, Path(config.weights))
    return sha256


def published_encoder(config: ConfigDict, path: Path) -> tuple[nnx.Module, str]:
    """Builds a model's published encoder with float32 weights from a file (`config` is config.model).

    Returns:
      The encoder, and the SHA-256 of the file.

    Raises:
      InputError: the file cannot be read or does not fit the encoder.
    """
    weights, mismatch = read_weights(path), f"{path} does not fit {config.encoder}"
    build = pretrained_encoder(config.encoder).build
    return fill(build, weights.tensors, DTYPES[config.dtype], mismatch, weights_dtype=jnp.float32), weights.sha256


def is_frozen(frozen_encoder: bool, path: tuple[str, ...]) -> bool:
    """Whether the optimiser leaves the parameter at `path` unchanged.

    These are all parameters of a frozen encoder; of a fine-tuned encoder, the BatchNorm running statistics; and the statistics
    that features are standardised by.
    """
    return "standardiser" in path or ("published" in path and (frozen_encoder or path[-1] in ("mean", "var")))


def read_weights(path: Path) -> Weights:
    """Reads a safetensors file, or a file of torch.save (torch 1.6 or newer).

    Code in a torch file is not executed, and values other than tensors are ignored. Raises InputError for other files.
    """
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        tensors = _read_torch(path) if zipfile.is_zipfile(path) else load_file(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give a file of weights") from error
    except (
        SafetensorError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        AttributeError,
    ) as error:
        raise InputError(
            f"{path}: is neither a safetensors file nor one of torch.save ({error}); {_CONVERT}"
        ) from error
    if not tensors:
        raise InputError(f"{path}: holds no tensors by name; {_CONVERT}")
    return Weights(path, sha256, tensors)


def _read_torch(path: Path) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        index = next(name for name in [*archive.namelist(), ""] if name.endswith("data.pkl") or not name)
        if not index:
            raise ValueError("a zip file without data.pkl")
        with archive.open(index) as file:
            content = _Unpickler(file, archive, index.removesuffix("data.pkl")).load()
    # Training scripts save the model next to the optimiser state, under one of these names.
    for name in ("model", "state_dict", "teacher", "module"):
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
    items = content.items() if isinstance(content, dict) else ()
    return {name: value for name, value in items if isinstance(value, np.ndarray)}


class _Unpickler(pickle.Unpickler):
    """Rebuilds the tensors of a torch archive and replaces all other objects with placeholders, so that no code runs."""

    def __init__(self, file: Any, archive: zipfile.ZipFile, folder: str):
        super().__init__(file)
        self._archive, self._folder = archive, folder

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            **{("torch", storage): dtype for storage, dtype in _STORAGES.items()},
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
            ("collections", "OrderedDict"): OrderedDict,
        }
        return allowed.get((module, name), _Placeholder)

    def persistent_load(self, pid: tuple) -> np.ndarray:
        _, dtype, key, _, _ = pid
        return np.frombuffer(self._archive.read(f"{self._folder}data/{key}"), dtype)


class _Placeholder:
    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(
    storage: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *rest: Any
) -> np.ndarray:
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((side - 1) * stride for side, stride in zip(shape, strides, strict=True))
    if not 0 <= offset <= last < max(len(storage), 1) or min(strides, default=0) < 0:
        raise ValueError("a tensor reaches beyond its storage")
    steps = [stride * storage.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps, writeable=False)
