import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from crcjax.errors import InputError
from crcjax.models.encoders import registry as encoders
from crcjax.models.encoders.convnets import ResNet
from crcjax.models.encoders.registry import PRETRAINED, PretrainedEncoder
from crcjax.models.encoders.torch_weights import torch_tensors
from crcjax.predict.embed import _is_embedded, choose_view, embed_store
from crcjax.runs.pretrained_weights import load_encoder
from crcjax.slides.store.features import feature_attributes, feature_names, read_features, write_features
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.tiling.plan import TilingParams

# The encoder of the tests: as those of the table, but small. Its features, 32, are no more than a tile's few values.
SMALL = PretrainedEncoder(partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=48)


@pytest.fixture
def encoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The name `small` in the table, and a file of its weights."""
    monkeypatch.setitem(encoders.PRETRAINED, "small", SMALL)
    save_file(torch_tensors(SMALL.build(rngs=nnx.Rngs(3))), tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.fixture
def store(painted: Path, tmp_path: Path) -> Path:
    """Four slides of the painted cohort's store, to write to."""
    for slide_id in tiled_slides(painted / "store")[:4]:
        shutil.copytree(painted / "store" / f"{slide_id}.zarr", tmp_path / "store" / f"{slide_id}.zarr")
    return tmp_path / "store"


def test_the_features_in_the_store_are_those_of_the_encoder(encoder: Path, store: Path) -> None:
    outcomes = embed_store(store, "small", encoder, batch=7)
    module, sha256 = load_encoder("small", encoder)
    assert [outcome.slide_id for outcome in outcomes] == tiled_slides(store)
    for outcome in outcomes:
        opened = open_store(store, outcome.slide_id)
        found = read_features(store, outcome.slide_id, "small")
        pixels = opened.read_pixels(range(len(opened.mask)))[opened.mask]
        truth = np.asarray(module(SMALL.prepare(pixels)))
        assert (outcome.status, outcome.tiles) == ("embedded", len(pixels))
        assert found.dtype == np.float16
        assert truth.std() > 0.01
        np.testing.assert_allclose(found[opened.mask], truth, rtol=2e-3, atol=1e-4)
        assert not found[~opened.mask].any()
        about = feature_attributes(store, outcome.slide_id, "small")
        assert about == {
            "encoder": "small",
            "weights_sha256": sha256,
            "mpp": [1.0],
            "magnifications": ["10x"],
            "dtype": "float32",
        }


def test_started_again_it_does_what_is_missing(encoder: Path, store: Path) -> None:
    embed_store(store, "small", encoder, batch=8)
    lost, *kept = tiled_slides(store)
    before = {path: path.stat().st_mtime_ns for slide in kept for path in (store / f"{slide}.zarr").rglob("*")}
    truth = read_features(store, lost, "small")
    shutil.rmtree(store / f"{lost}.zarr" / "features")
    outcomes = {outcome.slide_id: outcome.status for outcome in embed_store(store, "small", encoder, batch=8)}
    assert outcomes == {lost: "embedded", **dict.fromkeys(kept, "already embedded")}
    np.testing.assert_array_equal(read_features(store, lost, "small"), truth)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_damaged_slide_is_named_and_the_others_are_embedded(encoder: Path, store: Path) -> None:
    first, *others = tiled_slides(store)
    shutil.rmtree(store / f"{first}.zarr" / "pixels" / "streams")
    outcomes = embed_store(store, "small", encoder, batch=8)
    assert [outcome.status for outcome in outcomes] == ["failed", *["embedded"] * len(others)]
    assert "damaged" in outcomes[0].reason
    assert feature_names(store, first) == []


@pytest.mark.parametrize("lost", ["mask", "zarr.json"])
def test_a_slide_that_cannot_be_opened_is_failed_and_the_others_are_embedded(
    encoder: Path, store: Path, lost: str
) -> None:
    first, *others = tiled_slides(store)
    path = store / f"{first}.zarr" / lost
    shutil.rmtree(path) if path.is_dir() else path.write_text("{")
    outcomes = embed_store(store, "small", encoder, batch=8)
    assert [outcome.status for outcome in outcomes] == ["failed", *["embedded"] * len(others)]
    assert first in outcomes[0].reason
    assert all(feature_names(store, slide_id) == ["small"] for slide_id in others)
    for slide_id in others:
        shutil.rmtree(store / f"{slide_id}.zarr")
    with pytest.raises(InputError, match=f"none of its slides can be read; the first: .*{first}"):
        embed_store(store, "small", encoder, batch=8)


def test_other_weights_do_not_mix_with_those_that_the_store_has(encoder: Path, store: Path) -> None:
    embed_store(store, "small", encoder, batch=8)
    save_file(torch_tensors(SMALL.build(rngs=nnx.Rngs(4))), encoder)
    with pytest.raises(
        InputError, match=r"features/small: its features have the weights_sha256 .* give the --weights "
    ):
        embed_store(store, "small", encoder, batch=8)


def test_features_of_other_settings_are_kept_and_the_message_names_the_choice(store: Path) -> None:
    made = {"encoder": "small", "weights_sha256": "0", "mpp": [0.5], "magnifications": ["20x"], "dtype": "float32"}
    slide_id = tiled_slides(store)[0]
    features = np.ones((*open_store(store, slide_id).mask.shape, 3), np.float16)
    write_features(store, slide_id, "small", features, made)
    assert _is_embedded(store, slide_id, made)
    for name, value, option in (("magnifications", ["10x"], "--mag"), ("dtype", "bfloat16", "--dtype")):
        with pytest.raises(InputError) as caught:
            _is_embedded(store, slide_id, made | {name: value})
        assert str(caught.value) == (
            f"{store}/{slide_id}.zarr/features/small: its features have the {name} {made[name]}, and this command would compute "
            f"{value}; give the {option} that they were made with to keep them, or delete the folder to replace them"
        )
    write_features(store, slide_id, "small", features, made | {"imported": {}, "dtype": None})
    with pytest.raises(InputError, match="compute float32; train on them to keep them, or delete the folder"):
        _is_embedded(store, slide_id, made)


def test_weights_that_do_not_fit_are_refused_before_anything_is_written(encoder: Path, store: Path) -> None:
    tensors = torch_tensors(SMALL.build(rngs=nnx.Rngs(3)))
    tensors["extra"] = tensors.pop("conv1.weight")
    save_file(tensors, encoder)
    with pytest.raises(InputError, match=r"does not fit small: 1 missing: conv1\.weight; 1 unexpected: extra"):
        embed_store(store, "small", encoder)
    assert feature_names(store, tiled_slides(store)[0]) == []


def test_the_batch_fits_the_memory_that_is_measured(
    encoder: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def batch_with(free: int) -> int:
        batches = []
        memory = type("Memory", (), {"available": free})
        monkeypatch.setattr("crcjax.predict.embed.psutil.virtual_memory", lambda: memory)
        for slide_id in tiled_slides(store):
            shutil.rmtree(store / f"{slide_id}.zarr" / "features", ignore_errors=True)
        embed_store(store, "small", encoder, on_start=lambda view, slides, batch: batches.append(batch))
        return batches[0]

    forward = jax.jit(lambda state, pixels: nnx.merge(graph, state)(SMALL.prepare(pixels)))
    graph, state = nnx.split(load_encoder("small", encoder)[0])
    needs = {
        count: forward.lower(state, jax.ShapeDtypeStruct((count, 64, 64, 3), jnp.uint8)).compile().memory_analysis()
        for count in (4, 8)
    }
    used = {count: found.temp_size_in_bytes + found.argument_size_in_bytes for count, found in needs.items()}
    assert batch_with(1 << 40) == 16
    assert batch_with(int(used[4] / 0.75)) == 4
    assert batch_with(int(used[8] / 0.75)) == 8
    assert batch_with(1) == 1


@pytest.mark.parametrize(
    ("name", "mag", "warns"), [("uni", "20x", False), ("ctranspath", "10x", False), ("imagenet-resnet50", "20x", False)]
)
def test_the_magnification_nearest_to_the_encoders_resolution_is_embedded(name: str, mag: str, warns: bool) -> None:
    view = choose_view(TilingParams(("10x", "20x", "40x")), PRETRAINED[name])
    assert view.magnifications == (mag,)
    assert bool(view.warning) == warns
    assert view.slots(TilingParams(("10x", "20x", "40x"))).sum() == {"10x": 1, "20x": 4}[mag]


def test_a_store_without_the_encoders_resolution_is_embedded_with_a_warning_in_words() -> None:
    view = choose_view(TilingParams(("10x",), tile_px=224), PRETRAINED["uni"])
    assert view.magnifications == ("10x",)
    assert view.warning == (
        "10x as 1 µm per px; the encoder was trained at 0.5 µm per px; crcjax tile --mag 20x makes tiles nearest to that"
    )
    with pytest.raises(InputError, match="the store has 10x"):
        choose_view(TilingParams(("10x",)), PRETRAINED["uni"], ["20x"])


PROGRAM = """
import sys
from functools import partial
from pathlib import Path
import jax
from crcjax.predict.embed import embed_store
from crcjax.models.encoders import registry as encoders
from crcjax.models.encoders.convnets import ResNet
encoders.PRETRAINED["small"] = encoders.PretrainedEncoder(
    partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=48
)
embed_store(Path(sys.argv[1]), "small", Path(sys.argv[2]), on_start=lambda view, slides, batch: print(jax.device_count(), batch))
"""


@pytest.mark.multiprocess
def test_several_devices_give_the_features_of_one(encoder: Path, store: Path) -> None:
    embed_store(store, "small", encoder)
    truth = {slide_id: read_features(store, slide_id, "small") for slide_id in tiled_slides(store)}
    for slide_id in truth:
        shutil.rmtree(store / f"{slide_id}.zarr" / "features")
    settings = {"XLA_FLAGS": "--xla_force_host_platform_device_count=3", "PJRT_NPROC": "16", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROGRAM, str(store), str(encoder)]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    devices, batch = map(int, done.stdout.split())
    assert devices == 3
    assert batch % 3 == 0
    for slide_id, features in truth.items():
        np.testing.assert_allclose(read_features(store, slide_id, "small"), features, rtol=2e-3, atol=1e-4)
