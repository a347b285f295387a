"""Training from the features that `crcjax embed` stored, and prediction from slides with such a run."""

import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from scipy.special import logit

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.models.encoders import registry as encoders
from crcjax.models.encoders.convnets import ResNet
from crcjax.models.encoders.registry import PretrainedEncoder
from crcjax.models.encoders.torch_weights import torch_tensors
from crcjax.predict.embed import embed_store
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor
from crcjax.runs.run_directory import open_run
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.features import read_features, write_features
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.wsi.slide import open_slide
from crcjax.train.loop import train

SMALL = PretrainedEncoder(partial(ResNet, depths=(1,), width=8), 32, 1.0, "", resize_px=64, size_px=48)


@pytest.fixture(scope="module")
def embedded(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A copy of the painted store with features of the encoder `small`, and the file of its weights."""
    folder = tmp_path_factory.mktemp("embedded")
    shutil.copytree(painted / "store", folder / "store")
    weights = folder / "small.safetensors"
    save_file(torch_tensors(SMALL.build(rngs=nnx.Rngs(3))), weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoders.PRETRAINED, "small", SMALL)
        assert {outcome.status for outcome in embed_store(folder / "store", "small", weights)} == {"embedded"}
    return folder / "store", weights


@pytest.fixture
def config(small_config, embedded: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(encoders.PRETRAINED, "small", SMALL)
    small_config.data.store, small_config.model.weights = map(str, embedded)
    small_config.data.features, small_config.model.encoder = True, "small"
    small_config.augment.flips, small_config.augment.stain = False, 0.0
    return small_config


def _losses(run: Path) -> list[float]:
    import json

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_training_from_features_is_training_through_the_frozen_encoder_and_predicts_slides(
    config, painted: Path, tmp_path: Path
) -> None:
    train(config, tmp_path / "features")
    config.data.features = False
    train(config, tmp_path / "pixels")
    one, other = _losses(tmp_path / "features"), _losses(tmp_path / "pixels")
    assert len(one) == config.train.steps
    np.testing.assert_allclose(one, other, rtol=2e-3)  # features are kept in float16
    slide = load_cohort(painted / "cohort.csv", None).rows[0]
    probs = []
    for name in ("features", "pixels"):
        with open_slide(Path(str(slide.path))) as opened:
            probs.append(Predictor(tmp_path / name).predict(opened, 1).probs)
    np.testing.assert_allclose(*probs, rtol=0.02)


def test_features_that_are_absent_not_finite_or_of_other_weights_are_named(
    config, embedded: tuple[Path, Path], tmp_path: Path
) -> None:
    store, weights = embedded
    copy = tmp_path / "store"
    shutil.copytree(store, copy)
    config.data.store = str(copy)
    slide_id = next(row.slide_id for row in load_cohort(config.data.cohort, None).rows if row.split == "train")
    folder = copy / f"{slide_id}.zarr" / "features" / "small"

    values = read_features(copy, slide_id, "small").copy()
    attributes = {
        "encoder": "small",
        "weights_sha256": "0",
        "mpp": [1.0],
        "magnifications": ["10x"],
        "dtype": "float32",
    }
    write_features(copy, slide_id, "small", values, attributes)
    with pytest.raises(InputError, match="weights"):
        train(config, tmp_path / "run")

    shutil.rmtree(folder)
    with pytest.raises(InputError, match=rf"{slide_id}.*crcjax embed"):
        train(config, tmp_path / "run")

    embed_store(copy, "small", weights)
    from crcjax.slides.store.features import feature_attributes

    made = feature_attributes(copy, slide_id, "small")
    assert made
    values[:] = np.nan
    write_features(copy, slide_id, "small", values, made)
    with pytest.raises(InputError, match=rf"{slide_id}.*not finite"):
        train(config, tmp_path / "run")


@pytest.mark.parametrize(("field", "value"), [("encoder", "compact"), ("frozen", False)])
def test_features_without_a_frozen_published_encoder_are_refused(config, field: str, value, tmp_path: Path) -> None:
    config.model[field] = value
    with pytest.raises(InputError, match=r"config\.data\.features needs"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_of_some_magnifications_are_refused(config, embedded: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "store"
    shutil.copytree(embedded[0], copy)
    config.data.store = str(copy)
    from crcjax.slides.store.features import feature_attributes

    for slide in copy.glob("*.zarr"):
        made = feature_attributes(copy, slide.stem, "small")
        assert made
        write_features(
            copy, slide.stem, "small", read_features(copy, slide.stem, "small"), made | {"magnifications": []}
        )
    with pytest.raises(InputError, match=r"has features of no magnification, and the run needs 10x"):
        train(config, tmp_path / "run")


def test_a_store_of_two_magnifications_is_trained_on_and_predicted_by_the_one_that_has_features(
    config, embedded: tuple[Path, Path], painted: Path, tmp_path: Path
) -> None:
    cohort = load_cohort(painted / "cohort.csv", config.data.classes)
    jobs = [TileJob(row.slide_id, row.path) for row in cohort.rows]
    tile_slides(jobs, tmp_path / "store", TilingParams(("5x", "10x"), tile_px=64))
    assert {outcome.status for outcome in embed_store(tmp_path / "store", "small", embedded[1])} == {"embedded"}
    config.data.store = str(tmp_path / "store")
    train(config, tmp_path / "run")
    assert open_run(tmp_path / "run").config.data.magnifications == ("10x",)
    row = cohort.split("test").rows[0]
    with open_slide(Path(str(row.path))) as opened:
        actual = Predictor(tmp_path / "run").predict(opened, 1)
    assert not actual.mask[:, 0].any()
    assert actual.mask[:, 1:].any()
    stored = predict_stored([tmp_path / "run"], tmp_path / "store", replace(cohort, rows=(row,)))
    # The store's tiles are JPEG.
    np.testing.assert_allclose(logit(stored[0].probs), logit(actual.probs), atol=0.02)
    config.data.magnifications = ("5x",)
    with pytest.raises(
        InputError, match=r"has features of 10x, and the run needs 5x; set config\.data\.magnifications to use these"
    ):
        train(config, tmp_path / "other")
    config.data.magnifications = ("40x",)
    with pytest.raises(InputError, match=r"has 5x, 10x, and config\.data\.magnifications 40x"):
        train(config, tmp_path / "other")
