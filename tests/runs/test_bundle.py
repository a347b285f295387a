"""Bundles predict bit for bit what their runs predict, and nothing in them is believed unread."""

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError, OutputError
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor
from crcjax.runs.bundle import Bundle, open_bundle
from crcjax.runs.bundle_export import export_bundle
from crcjax.runs.checkpoint import best_metrics, metrics_of_steps
from crcjax.runs.trained_model import DENSITY_FILE, TrainedModel
from crcjax.slides.stain.methods import METHODS
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.train.loop import train
from crcjax.validation.calibration import Calibration, load_calibration

CLASSES = ("canonical", "immune", "stromal")


def _keys(folder: Path, name: str) -> tuple[Path, Path]:
    key, public = folder / f"{name}.pem", folder / f"{name}.pub"
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    return key, public


def _calibration(file: Path, model_id: str) -> Path:
    thresholds = {"": "0.7", "site-0": "0.4"}
    values = {"model": model_id, "classes": CLASSES, "temperature": 1.7, "method": "aps", "error": 0.2}
    file.write_text(json.dumps({**values, "thresholds": thresholds, "cases": dict.fromkeys(thresholds, 9)}))
    return file


@pytest.fixture(scope="module")
def other_run(small_config_of: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of another seed, which keeps two checkpoints."""
    config, path = small_config_of(), tmp_path_factory.mktemp("other") / "run"
    config.seed, config.train.keep_best = 1, 2
    train(config, path)
    return path


@pytest.fixture(scope="module")
def ensemble(run: Path, other_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of different seeds, with a feature density each and Macenko normalisation."""
    folder, runs = tmp_path_factory.mktemp("ensemble"), []
    for number, trained in enumerate((run, other_run)):
        copy = folder / f"member-{number}"
        shutil.copytree(trained, copy)
        config = json.loads((copy / "config.json").read_text())
        config["model"]["head"], config["stain"]["method"] = "evidential_density", "macenko"
        (copy / "config.json").write_text(json.dumps(config))
        facts = json.loads((copy / "run.json").read_text())
        facts["stain"] = StainNormaliser("macenko", METHODS["macenko"][1]).to_json()
        (copy / "run.json").write_text(json.dumps(facts))
        rng = np.random.default_rng(number)
        precision = np.stack([np.eye(16)] * 2)
        density = {"centres": rng.normal(size=(2, 3, 16)), "precision": precision}
        np.savez(copy / DENSITY_FILE, **density, usual=np.ones(2), spread=np.full(2, 50.0))
        runs.append(copy)
    return runs


@pytest.fixture
def bundle(run: Path, tmp_path: Path) -> Path:
    return export_bundle([run], tmp_path / "bundle").path


def _same_predictions(
    sources: tuple[list, list], calibrations: tuple, painted: Path, out: Path, dropout_samples: int = 0
) -> None:
    """Asserts that slides and stores have the same rows and the same attention by both sources."""
    cohort = load_cohort(painted / "cohort.csv", CLASSES)
    rows = cohort.rows[::6]
    jobs = [PredictJob(row.slide_id, row.case_id, Path(str(row.path)), site=row.site) for row in rows]
    tables, attention = [], []
    for name, models, calibration in zip(("run", "bundle"), sources, calibrations, strict=True):
        predictor = Predictor(*models, dropout_samples=dropout_samples, attribution="gradient")
        fitted = calibration and load_calibration(calibration, predictor.model_id, CLASSES)
        by_slide = predict_slides(predictor, jobs, out / name, calibration=fitted)
        stored = type(cohort)(tuple(rows), CLASSES)
        store = painted / "store"
        by_store = predict_stored(models, store, stored, calibration, dropout_samples=dropout_samples)
        assert {row.bundle_id for row in (*by_slide, *by_store)} == {getattr(models[0], "bundle_id", "")}
        comparable = (replace(row, seconds={}, bundle_id="") for row in (*by_slide, *by_store))
        tables.append([row.to_csv(CLASSES) for row in comparable])
        with np.load(out / name / "attention" / f"{rows[0].slide_id}.npz") as saved:
            # The key of the result differs, since it names the bundle.
            attention.append({name: values for name, values in saved.items() if name != "made_from"})
    assert tables[0] == tables[1]
    assert {row["status"] for row in tables[0]} == {"ok"}
    assert {row["split"] for row in tables[0]} == {"train", "val", ""}
    for name, values in attention[0].items():
        np.testing.assert_array_equal(values, attention[1][name], err_msg=name)


def test_a_bundle_predicts_the_bits_of_its_run_with_its_calibration(run: Path, painted: Path, tmp_path: Path) -> None:
    calibration = _calibration(tmp_path / "calibration.json", Predictor(run).model_id)
    bundle = export_bundle([run], tmp_path / "bundle", calibration=calibration)
    assert bundle.model_id == Predictor(run).model_id
    assert isinstance(bundle.calibration, Calibration)
    assert (bundle.target.name, bundle.target.classes, bundle.target.cancer_type) == ("subtype", CLASSES, "colorectal")
    _same_predictions(([run], list(bundle.models)), (calibration, bundle.calibration), painted, tmp_path)
    cohort = load_cohort(painted / "cohort.csv", CLASSES)
    with pytest.raises(InputError, match=r"the calibration: is of model .*, not .* dropout 2"):
        predict_stored(bundle.models, painted / "store", cohort, bundle.calibration, dropout_samples=2)
    other = _calibration(tmp_path / "others.json", "another model")
    with pytest.raises(InputError, match=r"others\.json: is of model another model, not "):
        export_bundle([run], tmp_path / "third", calibration=other)


def test_an_ensemble_with_feature_density_stain_normalisation_and_dropout_predicts_the_bits_of_its_runs(
    ensemble: list[Path], painted: Path, tmp_path: Path
) -> None:
    bundle = export_bundle(ensemble, tmp_path / "bundle")
    assert len(bundle.members) == 2
    assert bundle.members[0].model_id != bundle.members[1].model_id
    _same_predictions((ensemble, list(bundle.models)), (None, None), painted, tmp_path, dropout_samples=2)
    best, _ = best_metrics(ensemble[1])
    other = min(set(metrics_of_steps(ensemble[1])) - {best})
    with pytest.raises(InputError, match=f"its feature density is that of step {best}, .*not of step {other}"):
        export_bundle(ensemble[1:], tmp_path / "other", step=other)
    with pytest.raises(InputError, match=r"another config\.model than"):
        export_bundle([ensemble[0], _with_aggregator(ensemble[1], tmp_path / "mean")], tmp_path / "other")
    assert not (tmp_path / "other").exists()


def _with_aggregator(run: Path, copy: Path) -> Path:
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["mil"] = "mean"
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def test_exporting_again_gives_the_same_id_and_overwrites_nothing(run: Path, tmp_path: Path) -> None:
    first, second = (export_bundle([run], tmp_path / name) for name in ("a", "b"))
    assert first.id == second.id == hashlib.sha256((first.path / "bundle.json").read_bytes()).hexdigest()
    assert export_bundle([run], tmp_path / "a").id == first.id
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="mine: exists; choose another --out"):
        export_bundle([run], tmp_path / "mine")
    assert [file.name for file in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        export_bundle([run], tmp_path / "file" / "bundle")


def test_a_step_is_exported_and_a_step_that_is_not_there_is_refused_with_the_choices(
    other_run: Path, tmp_path: Path
) -> None:
    best, metrics = best_metrics(other_run)
    steps = metrics_of_steps(other_run)
    other = min(set(steps) - {best})
    default, chosen = export_bundle([other_run], tmp_path / "a"), export_bundle([other_run], tmp_path / "b", step=other)
    assert (default.members[0].step, default.members[0].metrics) == (best, metrics)
    assert (chosen.members[0].step, chosen.members[0].metrics) == (other, steps[other])
    assert chosen.model_id != default.model_id
    with pytest.raises(InputError, match=f"has no checkpoint of step 77; choose one of {', '.join(map(str, steps))}"):
        export_bundle([other_run], tmp_path / "c", step=77)


def test_a_bundle_names_no_slide_case_or_path_of_its_training_and_knows_them_nevertheless(
    run: Path, painted: Path, bundle: Path
) -> None:
    text = b"\n".join(file.read_bytes() for file in bundle.iterdir())
    rows = load_cohort(painted / "cohort.csv", None).rows
    for name in {row.slide_id for row in rows} | {row.case_id for row in rows} | {str(painted), str(run)}:
        assert name.encode() not in text
    (model,) = open_bundle(bundle).models
    for row in rows:
        expected = row.split if row.split in ("train", "val") else ""
        assert model.split_of(row.slide_id) == model.split_of(row.case_id) == expected
    assert model.split_of("another") == ""


def test_the_card_states_what_a_reader_needs_and_that_the_slides_are_synthetic(bundle: Path) -> None:
    card = (bundle / "model_card.md").read_text()
    opened = open_bundle(bundle)
    (member,) = opened.members
    assert len(member.data_sha256 or "") == len(member.config_sha256) == 64
    for words in (*CLASSES, "Trained on synthetic slides", "Research use only", member.model_id, member.data_sha256):
        assert str(words) in card
    assert "Open: to be filled in by a person" in card


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _damages(bundle: Path) -> list[tuple[Callable[[Path], object], str]]:
    return [
        (_flip, "is changed"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is changed"),
        (lambda file: file.write_bytes(b""), "is changed"),
        (lambda file: file.write_bytes((bundle / "settings.json").read_bytes() + b" "), "is changed"),
        (lambda file: file.unlink(), "is missing"),
    ]


def test_a_changed_byte_in_any_file_a_missing_and_an_extra_file_are_named(ensemble: list[Path], tmp_path: Path) -> None:
    intact = export_bundle(ensemble, tmp_path / "whole").path
    names = sorted(file.name for file in intact.iterdir() if file.name != "bundle.json")
    assert {"weights-0.safetensors", "weights-1.safetensors", "density-1.safetensors", "model_card.md"} < set(names)
    for name in names:
        for damage, words in _damages(intact):
            shutil.rmtree(tmp_path / "copy", ignore_errors=True)
            shutil.copytree(intact, tmp_path / "copy")
            damage(tmp_path / "copy" / name)
            with pytest.raises(InputError, match=rf"copy: {re.escape(name)} {words}; copy the bundle again"):
                open_bundle(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy")
    shutil.copytree(intact, tmp_path / "copy")
    (tmp_path / "copy" / "more").mkdir()
    (tmp_path / "copy" / "more" / "notes.txt").touch()
    (tmp_path / "copy" / "settings.json").unlink()
    with pytest.raises(InputError, match=r"settings\.json is missing; more/notes\.txt does not belong to it"):
        open_bundle(tmp_path / "copy")


def test_a_file_that_changes_after_the_bundle_was_opened_is_refused_when_it_is_read(bundle: Path) -> None:
    (model,) = open_bundle(bundle).models
    _flip(bundle / "weights-0.safetensors")
    with pytest.raises(InputError, match=r"weights-0\.safetensors is changed"):
        Predictor(model)


def _edited(bundle: Path, **values: object) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(manifest | values))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not a bundle's"),
        (b"[]", "is not a bundle's"),
        (b"{}", r"is not a bundle's \(KeyError\('format'\)\)"),
        (b'{"format": "crcjax bundle", "version": 1, "files": 3}', "is not a bundle's"),
        (b'{"format": "crcjax bundle", "version": 1, "files": {"../x": ""}}', r"file name '\.\./x'"),
        (b'{"format": "crcjax bundle", "version": 2}', "has format version 2, and this crcjax reads 1; update it"),
    ],
)
def test_a_manifest_that_cannot_be_understood_is_named(text: bytes, words: str, bundle: Path) -> None:
    (bundle / "bundle.json").write_bytes(text)
    with pytest.raises(InputError, match=words):
        open_bundle(bundle)
    shutil.rmtree(bundle)
    with pytest.raises(InputError, match="bundle: is not a bundle"):
        open_bundle(bundle)


def test_an_unknown_part_is_passed_over_if_it_is_optional_and_refused_otherwise(bundle: Path) -> None:
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "limits.json").write_text("{}")
    files = manifest["files"] | {"limits.json": hashlib.sha256(b"{}").hexdigest()}
    for optional in (True, False):
        part = {"limits": {"files": ["limits.json"], "optional": optional}}
        _edited(bundle, files=files, parts=manifest["parts"] | part)
        if optional:
            assert open_bundle(bundle).models
        else:
            with pytest.raises(InputError, match="has the part 'limits', which this crcjax cannot read; update it"):
                open_bundle(bundle)
    without = {name: part for name, part in manifest["parts"].items() if name != "weights"}
    _edited(bundle, files=files, parts=without)
    with pytest.raises(InputError, match="no part 'weights'"):
        open_bundle(bundle)


def test_weights_under_the_hash_of_other_weights_are_refused_by_their_model_id(
    ensemble: list[Path], tmp_path: Path
) -> None:
    """A manifest that was edited with matching hashes."""
    bundle = export_bundle(ensemble, tmp_path / "bundle").path
    manifest = json.loads((bundle / "bundle.json").read_text())
    parts = manifest["parts"]
    parts["weights"]["files"].reverse()
    _edited(bundle, parts=parts)
    with pytest.raises(InputError, match="its parameters are of model"):
        Predictor(*open_bundle(bundle).models)


def test_with_trusted_keys_a_bundle_that_is_unsigned_signed_by_others_or_edited_is_refused(
    run: Path, bundle: Path, tmp_path: Path
) -> None:
    (key, public), (_, other) = _keys(tmp_path, "ours"), _keys(tmp_path, "theirs")
    with pytest.raises(InputError, match="bundle: is not signed; export it with --key"):
        open_bundle(bundle, [public])
    signed = export_bundle([run], tmp_path / "signed", key=key)
    assert signed.is_signed
    assert signed.id == open_bundle(bundle).id
    assert open_bundle(signed.path, [public]).id == open_bundle(signed.path, [other, public]).id == signed.id
    verify = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", public, "-rawin", "-in", signed.path / "bundle.json"]
    assert subprocess.run([*verify, "-sigfile", signed.path / "signature"], capture_output=True).returncode == 0
    with pytest.raises(InputError, match=r"its signature is not by .*theirs\.pub"):
        open_bundle(signed.path, [other])
    for damaged in ("signature", "bundle.json"):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        shutil.copytree(signed.path, tmp_path / "copy")
        _flip(tmp_path / "copy" / damaged)
        with pytest.raises(InputError, match="its signature is not by"):
            open_bundle(tmp_path / "copy", [public])


@pytest.fixture
def published(
    small_config, painted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[object, Path, Path]:
    """A config that trains on the stored features of a small published encoder, the store and the encoder's weights."""
    from flax import nnx
    from safetensors.numpy import save_file

    from crcjax.models.encoders import registry
    from crcjax.models.encoders.convnets import ResNet
    from crcjax.models.encoders.torch_weights import torch_tensors
    from crcjax.predict.embed import embed_store

    build = partial(ResNet, depths=(1,), width=8)
    encoder = registry.PretrainedEncoder(build, 32, 1.0, "hub/small", resize_px=64, size_px=48)
    monkeypatch.setitem(registry.PRETRAINED, "small", encoder)
    weights, store = tmp_path / "small.safetensors", tmp_path / "store"
    save_file(torch_tensors(encoder.build(rngs=nnx.Rngs(3))), weights)
    save_file(torch_tensors(encoder.build(rngs=nnx.Rngs(4))), tmp_path / "other.safetensors")
    shutil.copytree(painted / "store", store)
    embed_store(store, "small", weights)
    small_config.model.encoder, small_config.model.weights = "small", str(weights)
    small_config.data.store, small_config.data.features = str(store), True
    return small_config, store, weights


def _probs(models: list[Path] | tuple[TrainedModel, ...], store: Path, painted: Path) -> list[tuple[float, ...]]:
    cohort = load_cohort(painted / "cohort.csv", CLASSES).split("val")
    return [row.probs for row in predict_stored(models, store, cohort)]


def test_a_published_encoder_is_named_by_its_hash_and_needed_for_pixels_alone(
    published: tuple, painted: Path, tmp_path: Path
) -> None:
    config, store, weights = published
    run, other_weights = tmp_path / "run", tmp_path / "other.safetensors"
    train(config, run)
    bundle = export_bundle([run], tmp_path / "bundle")
    assert bundle.encoder
    assert bundle.encoder.sha256 == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert "hub/small" in (bundle.path / "model_card.md").read_text()
    assert (bundle.path / "weights-0.safetensors").stat().st_size < weights.stat().st_size / 2
    # Stored features need no encoder, in this store or another.
    assert _probs(bundle.models, store, painted) == _probs([run], store, painted)
    moved = store.rename(tmp_path / "moved")
    assert _probs(bundle.models, moved, painted) == _probs([run], moved, painted)
    # Pixels do.
    for models in (bundle.models, open_bundle(bundle.path).models):
        with pytest.raises(
            InputError, match=r"names the weights of small by their SHA-256 .* give the file with --encoder"
        ):
            Predictor(*models)
    with_encoder = open_bundle(bundle.path, encoder_weights=weights)
    assert _probs(with_encoder.models, painted / "store", painted) == _probs([run], painted / "store", painted)
    with pytest.raises(InputError, match=r"other\.safetensors: must be the weights of small that .*; try hub/small"):
        Predictor(*open_bundle(bundle.path, encoder_weights=other_weights).models)
    # An older run does not record the hash.
    facts = json.loads((run / "run.json").read_text())
    del facts["encoder_sha256"]
    (run / "run.json").write_text(json.dumps(facts))
    assert export_bundle([run], tmp_path / "older").encoder == bundle.encoder
    with pytest.raises(InputError, match=r"other\.safetensors: holds other weights than .*run was trained with"):
        export_bundle([run], tmp_path / "none", encoder_weights=other_weights)
    weights.unlink()
    with pytest.raises(
        InputError, match=r"does not record the SHA-256 of the weights of small, .* with --encoder-weights"
    ):
        export_bundle([run], tmp_path / "none")


def test_a_fine_tuned_encoder_is_in_the_bundle(published: tuple, painted: Path, tmp_path: Path) -> None:
    config, _, weights = published
    config.data.features, config.model.frozen, config.data.store = False, False, str(painted / "store")
    train(config, tmp_path / "run")
    bundle = export_bundle([tmp_path / "run"], tmp_path / "bundle")
    weights.unlink()
    assert bundle.encoder is None
    assert "were fine-tuned and are in the bundle" in (bundle.path / "model_card.md").read_text()
    store = painted / "store"
    assert _probs(bundle.models, store, painted) == _probs([tmp_path / "run"], store, painted)
    with pytest.raises(InputError, match="needs no weights of a published encoder"):
        open_bundle(bundle.path, encoder_weights=weights)


def test_a_run_of_an_older_version_is_exported(tmp_path: Path) -> None:
    with tarfile.open(Path(__file__).parent / "old_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    bundle = export_bundle([tmp_path / "run"], tmp_path / "bundle")
    assert bundle.members[0].data_sha256 is None
    cohort = load_cohort(tmp_path / "cohort.csv", None)
    rows = [predict_stored(models, tmp_path / "store", cohort) for models in ([tmp_path / "run"], bundle.models)]
    assert {row.bundle_id for row in rows[1]} == {bundle.id}
    assert rows[0] == [replace(row, bundle_id="") for row in rows[1]]
    assert isinstance(bundle, Bundle)
    assert jax.tree.leaves(rows[0][0].probs)
