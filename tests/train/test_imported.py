"""Training on features of another tool, whose weights are unknown."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.models.mil import abstract_model
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor
from crcjax.runs.trained_model import model_of_run
from crcjax.slides.interchange.importer import import_files
from crcjax.slides.store.features import FeatureReader, feature_attributes, read_features, write_features
from crcjax.slides.store.tile_store import open_store
from crcjax.train.loop import train


@pytest.fixture
def config(small_config, painted: Path, write_h5: Callable[..., Path], tmp_path: Path):
    """Features of 6 numbers that encode the subtype, for the tiles of the synthetic cohort, as TRIDENT writes them."""
    rng = np.random.default_rng(0)
    about = {"patch_size": 64, "patch_size_level0": 64, "level0_magnification": 10}
    for row in load_cohort(painted / "cohort.csv", None).rows:
        store = open_store(painted / "store", row.slide_id)
        corner = store.origin[store.mask[:, 0]]
        features = rng.normal(size=(len(corner), 6)).astype(np.float32)
        features[:, small_config.data.classes.index(row.label)] += 3
        path = tmp_path / "in" / f"{row.slide_id}.h5"
        write_h5(path, {"coords": corner, "features": features}, coords=about, features={"encoder": "theirs"})
    assert all(outcome.succeeded for outcome in import_files([tmp_path / "in"], tmp_path / "store"))
    small_config.data.store = str(tmp_path / "store")
    small_config.data.features, small_config.model.encoder = True, "theirs"
    small_config.train.steps, small_config.optimizer.learning_rate = 30, 1e-2
    small_config.train.eval_every = small_config.train.checkpoint_every = 15
    return small_config


def test_imported_features_train_and_the_run_states_that_it_cannot_predict_slides(
    config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == 30
    assert losses[-1] < 0.6 * losses[0]
    assert any("val/balanced_accuracy" in line or any(name.startswith("val/") for name in line) for line in lines)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["imported_features"] == 6
    train(config, tmp_path / "run")  # finished: the same config resumes at its end
    with pytest.raises(InputError, match=r"run: was trained on imported features, and the weights of theirs"):
        Predictor(tmp_path / "run")
    cohort = load_cohort(config.data.cohort, config.data.classes)
    rows = predict_stored([tmp_path / "run"], Path(config.data.store), cohort.split("test"))
    assert [row.call for row in rows] == [row.label for row in cohort.split("test").rows]
    opened: list[str] = []
    init = FeatureReader.__init__

    def counted(self, store, slide_id, encoder) -> None:
        opened.append(slide_id)
        init(self, store, slide_id, encoder)

    with monkeypatch.context() as patches:
        patches.setattr(FeatureReader, "__init__", counted)
        predict_stored([tmp_path / "run"], Path(config.data.store), cohort.split("test"), out=tmp_path / "once")
    assert opened == [row.slide_id for row in rows]
    for method in ("attention", "gradient", "region_occlusion"):
        out = tmp_path / method
        again = predict_stored([tmp_path / "run"], Path(config.data.store), cohort, out=out, attribution=method)
        assert [row for row in again if row.slide_id in {one.slide_id for one in rows}] == rows
        assert not (out / "heatmaps").exists()  # nobody saw the slides
        for row in cohort.rows:
            store = open_store(config.data.store, row.slide_id)
            with np.load(out / "attention" / f"{row.slide_id}.npz") as saved:
                np.testing.assert_array_equal(saved["origin"], store.origin)
                assert (saved["region_px"], saved["mpp"]) == (store.region_px, store.info.mpp[0])
                assert saved["attention"].sum() == pytest.approx(1, abs=1e-5)
                assert saved["attribution"].shape == saved["slot_attention"].shape == store.mask.shape
                assert saved["attribution"].any()
    for row in cohort.rows:
        values = np.zeros((len(open_store(config.data.store, row.slide_id).mask), 1, 5), np.float32)
        about = feature_attributes(config.data.store, row.slide_id, "theirs")
        write_features(config.data.store, row.slide_id, "theirs", values, about | {"width": 5})
    with pytest.raises(
        InputError, match=r"its features of theirs have 5 numbers, those of .*run had 6; import the same"
    ):
        predict_stored([tmp_path / "run"], Path(config.data.store), cohort)


def test_features_are_standardised_by_the_training_slides_alone_and_training_keeps_the_statistics(
    config, tmp_path: Path
) -> None:
    cohort = load_cohort(config.data.cohort, config.data.classes)
    scale = np.array([1e3, 1, 1e-3, 10, 1, 0])
    training = []
    for row in cohort.rows:
        features = read_features(config.data.store, row.slide_id, "theirs").astype(np.float32) * scale + 5
        about = feature_attributes(config.data.store, row.slide_id, "theirs")
        write_features(
            config.data.store, row.slide_id, "theirs", features.astype(np.float32), about | {"dtype": "float32"}
        )
        mask = open_store(config.data.store, row.slide_id).mask
        training += [features.astype(np.float32)[mask]] if row.split == "train" else []
    config.model.standardise, config.model.feature_dropout = 3.0, 0.1
    train(config, tmp_path / "run")
    trained = model_of_run(tmp_path / "run")
    saved = trained.restore(abstract_model(trained.config.model, 3))["encoder"]["standardiser"]
    rows = np.concatenate(training).astype(np.float64)
    np.testing.assert_allclose(saved["mean"], rows.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(saved["inverse_deviation"][:5], 1 / rows.std(axis=0)[:5], rtol=1e-3)
    assert saved["inverse_deviation"][5] == 0
    rows = predict_stored([tmp_path / "run"], Path(config.data.store), cohort.split("test"))
    assert [row.call for row in rows] == [row.label for row in cohort.split("test").rows]
    config.data.features = False
    with pytest.raises(InputError, match=r"config\.model\.standardise must be 0 without config\.data\.features"):
        train(config, tmp_path / "pixels")


def test_features_that_contradict_each_other_or_the_config_are_refused(config, tmp_path: Path) -> None:
    refused = partial(pytest.raises, InputError)
    with config.unlocked():
        config.model.weights = "some.safetensors"
    with refused(match=r"whose weights are unknown, got some\.safetensors; leave it empty"):
        train(config, tmp_path / "run")
    config.model.weights, config.model.encoder = "", "others"
    with refused(match="has no imported features others"):
        train(config, tmp_path / "run")
    config.model.encoder, config.stain.method = "theirs", "macenko"
    with refused(match=r"config\.stain\.method must be none with config\.data\.features"):
        train(config, tmp_path / "run")
    config.stain.method = "none"
    slide_id = load_cohort(config.data.cohort, None).rows[1].slide_id
    about = feature_attributes(config.data.store, slide_id, "theirs")
    assert about
    values = read_features(config.data.store, slide_id, "theirs")
    write_features(config.data.store, slide_id, "theirs", values, about | {"stated_encoder": "another"})
    with refused(match="have the stated_encoder another, those of .* a run needs one for all"):
        train(config, tmp_path / "run")
    config.data.features, config.model.encoder = False, "compact"
    with refused(match="imported without its slide"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
