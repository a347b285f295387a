"""Converted encoders against their torch originals with random weights."""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from crcjax.errors import InputError
from crcjax.models.encoders.convnets import Batch, BatchNorm, use_batch_statistics
from crcjax.models.encoders.registry import PRETRAINED, encoder_table, pretrained_encoder
from crcjax.models.encoders.torch_weights import fill, torch_tensors

SMALL_VIT = {"width": 48, "depth": 2, "heads": 3}
SMALL = {
    "Swin": {"width": 24, "depths": (2, 2), "heads": (2, 4)},
    "ConvNeXt": {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32)},
    "ResNet": {"depths": (1, 2, 1, 1)},
}


@pytest.fixture(scope="module")
def twins(required: Callable[[str], bool]) -> Any:
    """The torch side; torch, timm and transformers are the extra `torch`, for tests only."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import torch_twins
    except ImportError as error:
        if required("torch"):
            raise
        pytest.skip(f"the extra torch is not installed: {error}")
    finally:
        sys.path.pop(0)
    return torch_twins


def _small(name: str) -> Callable[..., nnx.Module]:
    build = PRETRAINED[name].build
    shape = getattr(build, "keywords", {})
    if "patch_px" not in shape:
        changes = SMALL[getattr(build, "func", build).__name__]
        return partial(build, **changes if "clam" not in name else {"depths": (1, 2, 1)})
    if name.startswith("hibou"):
        return partial(build, **SMALL_VIT, hidden=256)
    return partial(build, **SMALL_VIT, hidden=int(48 * shape["hidden"] / shape["width"] + 1e-3))


def _images(side: tuple[int, int] = (224, 224)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, *side, 3)).astype(np.float32)


def _ours(module: nnx.Module, images: np.ndarray) -> np.ndarray:
    graph, state = nnx.split(module)
    return np.asarray(jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, images), np.float32)


def _torch_images(images: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(images).permute(0, 3, 1, 2)


def _error(found: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize("name", PRETRAINED)
def test_an_encoder_has_the_features_of_its_original(name: str, twins: Any) -> None:
    model = twins.twin(name, small=True)
    images = _images()
    truth = twins.features(name, model, _torch_images(images)).numpy()
    found = _ours(fill(_small(name), twins.tensors(model), jnp.float32, name), images)
    assert found.shape == truth.shape
    assert truth.std() > 0.1
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


def test_a_kernel_of_attention_gives_the_same_features(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the XLA implementation of the function that cuDNN's kernel is called by: it is there on CPUs."""
    module = _small("uni")(dtype=jnp.float32, rngs=nnx.Rngs(0))
    plain = _ours(module, _images())
    monkeypatch.setattr("crcjax.models.encoders.vit.attention_kernel", lambda dtype, channels: "xla")
    np.testing.assert_allclose(_ours(module, _images()), plain, rtol=1e-4, atol=1e-5)
    module.set_attributes(fused=False)
    monkeypatch.setattr(
        "crcjax.models.encoders.vit.attention_kernel", lambda dtype, channels: pytest.fail("asked for a kernel")
    )
    _ours(module, _images())


@pytest.mark.parametrize("name", ["imagenet-resnet50", "ctranspath"])
def test_batch_norms_of_a_batch_are_torchs_in_training_on_the_valid_tiles_alone(name: str, twins: Any) -> None:
    model, valid = twins.twin(name, small=True), np.array([True, False, True, True, False])
    module = fill(_small(name), twins.tensors(model), jnp.float32, name)
    images = (np.random.default_rng(1).normal(size=(5, 224, 224, 3)) * np.arange(1, 6)[:, None, None, None]).astype("f")
    for part in model.modules():
        if type(part).__name__.startswith("BatchNorm"):
            part.train().momentum = 1.0
    truth = twins.features(name, model, _torch_images(images[valid])).numpy()
    graph, params = nnx.graphdef(module), nnx.to_pure_dict(nnx.state(module))

    @jax.jit
    def of_batch(params: Any, images: Any) -> tuple[Any, Any]:
        ours = nnx.merge(graph, params)
        use_batch_statistics(ours, Batch(jnp.asarray(valid), jnp.float32(valid.sum()), ()))
        return ours(images), nnx.to_pure_dict(nnx.state(ours))

    found, held = of_batch(params, images)
    assert np.abs(found[valid] - truth).max() <= 1e-4 * np.abs(truth).max()
    nnx.update(module, held)
    ours, theirs = torch_tensors(module), twins.tensors(model)
    running = [key for key in ours if "running" in key]
    assert running
    for key in running:
        np.testing.assert_allclose(ours[key], theirs[key], rtol=1e-4, atol=1e-5 * np.abs(theirs[key]).max())


def test_the_gradient_through_a_batchs_statistics_is_torchs(twins: Any) -> None:
    import torch

    rng, valid = np.random.default_rng(2), np.array([True, True, False, True])
    maps, weights = (rng.normal(3.0, 2.0, (4, 5, 6, 7)).astype(np.float32) for _ in range(2))
    theirs, given = torch.nn.BatchNorm2d(7), _torch_images(maps[valid]).requires_grad_()
    (theirs(given) * _torch_images(weights[valid])).sum().backward()
    graph, params = nnx.split(BatchNorm(7, rngs=nnx.Rngs(0)))

    def objective(params: Any, maps: Any) -> Any:
        ours = nnx.merge(graph, params)
        use_batch_statistics(ours, Batch(jnp.asarray(valid), jnp.float32(3), ()))
        return (ours(maps) * weights)[valid].sum()

    of_params, of_maps = jax.grad(objective, argnums=(0, 1))(nnx.to_pure_dict(params), maps)
    np.testing.assert_allclose(of_maps[valid], given.grad.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(of_maps[~valid], 0)
    np.testing.assert_allclose(of_params["scale"], theirs.weight.grad, rtol=1e-4, atol=1e-4)
    assert not of_params["mean"].any()
    assert not of_params["var"].any()


@pytest.mark.parametrize(
    "name",
    [
        *("uni", "uni2-h", "virchow", "virchow2", "h-optimus-0", "prov-gigapath", "phikon", "phikon-v2", "hibou-b"),
        *("kaiko-vits8", "kaiko-vitl14", "ctranspath", "imagenet-swin-t", "imagenet-convnext-t", "imagenet-resnet50"),
    ],
)
def test_bfloat16_is_as_near_to_float32_as_torchs_own(name: str, twins: Any) -> None:
    import torch

    model = twins.twin(name, small=True)
    images, tensors = _images(), twins.tensors(model)
    truth = twins.features(name, model, _torch_images(images)).numpy()
    theirs = twins.features(name, model.to(torch.bfloat16), _torch_images(images).bfloat16()).float().numpy()
    found = _ours(fill(_small(name), tensors, jnp.bfloat16, name), images)
    assert _error(found, truth) <= _error(theirs, truth)


@pytest.mark.parametrize("name", PRETRAINED)
def test_an_encoder_of_full_size_has_the_keys_and_shapes_of_its_original(name: str, twins: Any) -> None:
    import torch

    encoder, build = PRETRAINED[name], PRETRAINED[name].build
    if name in twins.TRANSFORMERS:
        tensors = twins.tensors(twins.twin(name, small=False))
    else:
        with torch.device("meta"):
            model = twins.twin(name, small=False)
        # Of the file only the shapes are needed: arrays of one element seen as large ones.
        tensors = {key: np.broadcast_to(np.float32(0), value.shape) for key, value in model.state_dict().items()}
    if "patch_px" in getattr(build, "keywords", {}):
        # All blocks have one shape.
        depth = (
            twins.TRANSFORMERS[name][2].get("num_hidden_layers", 12)
            if name in twins.TRANSFORMERS
            else len(model.blocks)
        )
        assert build.keywords["depth"] == depth
        build = partial(build, depth=1)
        tensors = {key: value for key, value in tensors.items() if not re.match(r"blocks\.[1-9]", key)}
    module = nnx.eval_shape(lambda: fill(build, tensors, jnp.float32, name))
    images = jax.ShapeDtypeStruct((1, encoder.size_px, encoder.size_px, 3), jnp.float32)
    assert nnx.eval_shape(lambda module, x: module(x), module, images).shape == (1, encoder.features)


@pytest.mark.slow
def test_an_encoder_of_full_size_has_the_features_of_its_original(twins: Any) -> None:
    model = twins.twin("uni", small=False)
    images = _images()
    truth = twins.features("uni", model, _torch_images(images)).numpy()
    found = _ours(fill(PRETRAINED["uni"].build, twins.tensors(model), jnp.float32, "uni"), images)
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("name", ["uni", "uni2-h", "virchow2"])
@pytest.mark.parametrize("patches", [(10, 10), (16, 24)])
def test_positions_for_images_of_another_size_are_those_of_timm(
    name: str, patches: tuple[int, int], twins: Any
) -> None:
    model = twins.twin(name, small=True, dynamic_img_size=True)
    side = PRETRAINED[name].build.keywords["patch_px"]
    images = _images((patches[0] * side, patches[1] * side))
    truth = twins.features(name, model, _torch_images(images)).numpy()
    found = _ours(fill(_small(name), twins.tensors(model), jnp.float32, name), images)
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


@pytest.mark.parametrize("class_token", [True, False])
def test_the_mean_of_the_patches_is_pooled_as_timm_does(class_token: bool, twins: Any) -> None:
    changes = {"global_pool": "avg", "class_token": class_token, "no_embed_class": not class_token}
    model = twins.twin("lunit-dino-s16", small=True, **changes)
    images = _images()
    build = partial(_small("lunit-dino-s16"), pool="mean", class_token=class_token)
    found = _ours(fill(build, twins.tensors(model), jnp.float32, ""), images)
    truth = twins.features("", model, _torch_images(images)).numpy()
    assert np.abs(found - truth).max() <= 1e-4 * np.abs(truth).max()


def test_older_files_of_swin_and_wrapped_names_are_read_as_well(twins: Any) -> None:
    tensors = twins.tensors(twins.twin("ctranspath", small=True))
    older = {
        "module." + re.sub(r"layers\.(\d)\.downsample", lambda at: f"layers.{int(at[1]) - 1}.downsample", key): value
        for key, value in tensors.items()
    }
    assert set(older) != {f"module.{key}" for key in tensors}
    older["module.head.weight"] = np.zeros((1000, 48), np.float32)
    both = [_ours(fill(_small("ctranspath"), found, jnp.float32, ""), _images()) for found in (tensors, older)]
    np.testing.assert_array_equal(*both)


def test_weights_that_do_not_fit_are_refused_with_the_keys_at_odds(twins: Any) -> None:
    tensors = twins.tensors(twins.twin("uni", small=True))
    del tensors["norm.bias"]
    tensors["reg_token"] = np.zeros((1, 4, 48), np.float32)
    tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    with pytest.raises(InputError) as refusal:
        fill(_small("uni"), tensors, jnp.float32, "w.bin does not fit uni")
    message = str(refusal.value)
    assert message.startswith("w.bin does not fit uni: 1 missing: norm.bias; 1 unexpected: reg_token; ")
    assert "1 of another shape: pos_embed [1, 196, 48] instead of [1, 197, 48]" in message


@pytest.mark.parametrize(
    ("name", "method"), [("uni", Image.Resampling.BILINEAR), ("virchow", Image.Resampling.BICUBIC)]
)
def test_tiles_are_resized_as_pillow_does_and_normalised(name: str, method: Image.Resampling) -> None:
    encoder = PRETRAINED[name]
    tile = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    truth = np.asarray(Image.fromarray(tile).resize((224, 224), method), np.float32)
    mean, std = np.array(encoder.normalisation, np.float32)
    found = np.asarray(encoder.prepare(tile[None]))[0] * std + mean
    apart = np.abs(found * 255 - truth)
    # What lies between two intensities may be rounded to either, in each of the two passes.
    assert apart.max() <= 2.01
    assert apart.mean() < 0.1


def test_gigapath_sees_the_centre_of_a_tile_as_it_is() -> None:
    tile = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    encoder = PRETRAINED["prov-gigapath"]
    mean, std = np.array(encoder.normalisation, np.float32)
    truth = (tile[16:240, 16:240].astype(np.float32) / 255 - mean) / std
    np.testing.assert_allclose(encoder.prepare(tile[None])[0], truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in PRETRAINED if PRETRAINED[name].source.startswith("timm/")])
def test_tiles_are_prepared_with_the_constants_that_timm_holds_for_its_weights(name: str, twins: Any) -> None:
    import timm

    encoder = PRETRAINED[name]
    known = timm.get_pretrained_cfg(encoder.source.removeprefix("timm/"))
    assert known is not None
    resampling = {"linear": "bilinear", "cubic": "bicubic"}[encoder.resampling]
    assert (known.mean, known.std, known.interpolation) == (*encoder.normalisation, resampling)
    assert known.input_size == (3, encoder.size_px, encoder.size_px)


def test_an_unknown_encoder_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"uni3.*uni2-h"):
        pretrained_encoder("uni3")


def test_the_page_of_encoders_holds_the_table() -> None:
    page = (Path(__file__).parents[3] / "docs" / "encoders.md").read_text()
    assert encoder_table() in page
