import hashlib
import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from crcjax.config import get_config
from crcjax.errors import InputError
from crcjax.models.encoders.convnets import ResNet
from crcjax.models.encoders.registry import PRETRAINED, PretrainedEncoder
from crcjax.models.mil import build_model
from crcjax.runs.pretrained_weights import build_unloaded, load_encoder, read_weights


@pytest.fixture(scope="module")
def torch(required: Callable[[str], bool]) -> Any:
    try:
        import torch
    except ImportError as error:
        if required("torch"):
            raise
        pytest.skip(f"the extra torch is not installed: {error}")
    return torch


def test_a_safetensors_file_is_read_with_its_hash(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({"a": np.arange(6, dtype=np.float16).reshape(2, 3)}, path)
    weights = read_weights(path)
    assert weights.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    np.testing.assert_array_equal(weights.tensors["a"], [[0, 1, 2], [3, 4, 5]])


def test_a_torch_file_gives_the_tensors_that_torch_gives(torch: Any, tmp_path: Path) -> None:
    whole = torch.randn(4, 6)
    tensors = {"whole": whole, "part": whole[1:3, ::2], "turned": whole.T, "scalar": torch.tensor(3), "none": whole[:0]}
    tensors |= {"half": whole.half(), "brain": whole.bfloat16(), "parameter": torch.nn.Parameter(whole)}
    torch.save({"model": tensors, "epoch": 3, "args": Path("x")}, tmp_path / "w.pth")
    actual = read_weights(tmp_path / "w.pth").tensors
    assert set(actual) == set(tensors)
    for name, value in tensors.items():
        assert actual[name].shape == tuple(value.shape)
        np.testing.assert_array_equal(actual[name].astype(np.float32), value.detach().float().numpy())


def test_bfloat16_tensors_are_read_from_safetensors(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import save_file as save

    tensor = torch.randn(3, 4).bfloat16()
    save({"a": tensor}, tmp_path / "w.safetensors")
    actual = read_weights(tmp_path / "w.safetensors").tensors["a"]
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual.astype(np.float32), tensor.float().numpy())


class _Attack:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple:
        return (open, (str(self.trace), "w"))


def test_a_torch_file_cannot_run_code(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "w.bin", "w") as archive:
        archive.writestr("w/data.pkl", pickle.dumps({"a": _Attack(tmp_path / "trace")}))
    with pytest.raises(InputError, match="no tensors"):
        read_weights(tmp_path / "w.bin")
    assert not (tmp_path / "trace").exists()


def test_a_tensor_that_reaches_beyond_its_storage_is_refused(torch: Any, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(64)}, tmp_path / "w.bin")
    with zipfile.ZipFile(tmp_path / "w.bin") as whole, zipfile.ZipFile(tmp_path / "cut.bin", "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:16] if name.endswith("data/0") else content)
    with pytest.raises(InputError, match="beyond its storage"):
        read_weights(tmp_path / "cut.bin")


@pytest.mark.parametrize("content", [b"", b"no weights", b"\x80\x02}q\x00.", b"\xff" * 100])
def test_a_file_without_weights_is_refused_with_the_remedy(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"w\.bin: is neither a safetensors file nor .* convert it with torch"):
        read_weights(tmp_path / "w.bin")
    with pytest.raises(InputError, match="cannot be read"):
        read_weights(tmp_path / "missing.bin")


def test_weights_of_another_encoder_are_refused_by_name(tmp_path: Path) -> None:
    save_file({"fc.weight": np.zeros((3, 3), np.float32), "extra": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    with pytest.raises(
        InputError, match=r"w\.safetensors does not fit imagenet-resnet50: 265 missing: .*1 unexpected: extra"
    ):
        load_encoder("imagenet-resnet50", tmp_path / "w.safetensors")


@pytest.mark.parametrize("frozen", [True, False])
def test_a_published_encoder_trains_within_the_model_or_is_frozen(
    frozen: bool, small_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from functools import partial

    from flax import nnx

    from crcjax.models.encoders import registry as encoders
    from crcjax.models.encoders.convnets import ResNet
    from crcjax.models.encoders.torch_weights import torch_tensors
    from crcjax.models.mil import build_model
    from crcjax.predict.predictor import Predictor
    from crcjax.runs.checkpoint import restore_params
    from crcjax.train.loop import train

    small = encoders.PretrainedEncoder(partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=32)
    monkeypatch.setitem(encoders.PRETRAINED, "small", small)
    given = torch_tensors(small.build(rngs=nnx.Rngs(3)))
    given["bn1.running_mean"] = np.full_like(given["bn1.running_mean"], 0.5)
    save_file(given, tmp_path / "small.safetensors")
    small_config.model.encoder, small_config.model.frozen = "small", frozen
    with pytest.raises(InputError, match=r"config\.model\.weights is empty"):
        train(small_config, tmp_path / "empty")
    small_config.model.weights = str(tmp_path / "small.safetensors")
    train(small_config, tmp_path / "run")
    Predictor(tmp_path / "run")
    model = build_model(small_config.model, 3, 0)
    trained = model.encoder.published
    params, _ = restore_params(tmp_path / "run", model)
    nnx.update(model, params)
    actual = torch_tensors(trained)
    for name, value in given.items():
        same = np.array_equal(actual[name], value)
        assert same == (frozen or "running" in name), name


def test_a_model_to_be_loaded_has_the_sampled_weights_of_its_own_layers_and_shapes_for_the_published_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = PretrainedEncoder(partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=48)
    monkeypatch.setitem(PRETRAINED, "small", small)
    config = get_config().model
    config.encoder, config.features, config.attention, config.heads = "small", 16, 8, 2
    unloaded = nnx.to_flat_state(nnx.state(build_unloaded(config, 3, 5, (1, 2))))
    whole = nnx.to_flat_state(nnx.state(build_model(config, 3, 5, (1, 2))))
    assert [path for path, _ in unloaded] == [path for path, _ in whole]
    shapes = 0
    for (path, leaf), (_, expected) in zip(unloaded, whole, strict=True):
        if "published" in path:
            shapes += isinstance(leaf.get_raw_value(), jax.ShapeDtypeStruct)
            assert leaf.get_raw_value().shape == expected[...].shape
        else:
            np.testing.assert_allclose(leaf[...], expected[...], rtol=1e-6, atol=1e-7)
    assert 0 < shapes < len(whole)
    assert shapes == sum("published" in path for path, _ in whole)
