"""Training from the features that `crcjax embed` stored, and prediction from slides with such a run."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.infer.embed import embed_store
from crcjax.infer.predictor import Predictor
from crcjax.models import encoders
from crcjax.models.convnets import ResNet
from crcjax.models.encoders import PretrainedEncoder
from crcjax.models.weights import torch_tensors
from crcjax.slides.features import read_features, write_features
from crcjax.slides.reader import open_slide
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
    from crcjax.slides.features import feature_attributes

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
    from crcjax.slides.features import feature_attributes

    for slide in copy.glob("*.zarr"):
        made = feature_attributes(copy, slide.stem, "small")
        assert made
        write_features(
            copy, slide.stem, "small", read_features(copy, slide.stem, "small"), made | {"magnifications": []}
        )
    with pytest.raises(InputError, match="lacks the features of 10x"):
        train(config, tmp_path / "run")
