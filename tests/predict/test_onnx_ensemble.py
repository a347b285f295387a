"""An exported model predicts what its run predicts, by the same command, and a folder that is none is named."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

from crcjax.errors import InputError
from crcjax.predict.ensemble import EnsembleMember
from crcjax.predict.onnx_ensemble import open_onnx
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.predict.region_encoder import Shard, encode_regions
from crcjax.runs.bundle_export import export_bundle
from crcjax.validation.calibration import Calibration
from crcjax.validation.load_predictions import load_predictions


def _copy(exported: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of an exported model with other values in model.json."""
    copy = shutil.copytree(exported, tmp_path / "copy")
    description = json.loads((copy / "model.json").read_text()) | changes
    (copy / "model.json").write_text(json.dumps(description))
    return copy


def test_slides_get_the_rows_and_the_attention_that_their_run_gives_them(
    exported: Path, run: Path, painted: Path, tmp_path: Path
) -> None:
    slides = sorted((painted / "slides").glob("*.svs"))[-2:]
    jobs = [PredictJob(path.stem, path.stem, path) for path in slides]
    by_run, by_graph = Predictor(run), Predictor(open_onnx(exported))
    assert all(isinstance(member, EnsembleMember) for member in (*by_run.members, *by_graph.members))
    for expected, actual in zip(
        predict_slides(by_run, jobs, tmp_path / "run"), predict_slides(by_graph, jobs, tmp_path / "onnx"), strict=True
    ):
        assert actual.pipeline_id != expected.pipeline_id
        same = ("slide_id", "status", "call", "model", "regions", "qc_verdict", "slide_sha256", "target_name", "split")
        assert [getattr(actual, name) for name in same] == [getattr(expected, name) for name in same]
        for name in ("probs", "entropy", "expected_entropy", "stain"):
            np.testing.assert_allclose(getattr(actual, name), getattr(expected, name), atol=1e-4)
        attention = [
            np.load(tmp_path / out / "attention" / f"{actual.slide_id}.npz")["class_attention"]
            for out in ("run", "onnx")
        ]
        np.testing.assert_allclose(attention[0], attention[1], atol=1e-4)
        assert (tmp_path / "onnx" / "heatmaps" / f"{actual.slide_id}.png").exists()


def test_chunks_that_do_not_fit_the_memory_are_halved_and_give_the_same_features(
    exported: Path, painted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(open_onnx(exported))
    (member,) = predictor.members
    pixels = np.random.default_rng(0).integers(0, 256, (9, 1, 64, 64, 3), np.uint8)
    expected = member.encode(pixels, [None], [9])
    run = member._encoder.run

    def limited(outputs: list[str], fed: dict[str, np.ndarray]) -> list[np.ndarray]:
        if len(fed["tiles"]) > 2:
            raise RuntimeException("Failed to allocate memory for requested buffer of size 1")
        return run(outputs, fed)

    class Session:
        run = staticmethod(limited)

    monkeypatch.setattr(member, "_encoder", Session())
    features = np.zeros_like(expected)
    for result in encode_regions(predictor.members, [Shard("slide", np.arange(9), pixels, [None])]):
        assert not isinstance(result, tuple)
        features[result.regions] = result.features[0]
    assert member.chunk == 2
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_what_is_no_exported_model_is_named(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.json: does not exist; give a folder of crcjax export-model"):
        open_onnx(tmp_path)
    with pytest.raises(InputError, match="has format version 9, and this crcjax reads 1; update it"):
        open_onnx(_copy(exported, tmp_path, format_version=9))
    copy = tmp_path / "copy"
    (copy / "model.json").write_text("{}")
    with pytest.raises(InputError, match=r"model\.json: is damaged"):
        open_onnx(copy)
    shutil.rmtree(copy)
    model = open_onnx(_copy(exported, tmp_path))
    graph = copy / "aggregator-0.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"!")
    with pytest.raises(InputError, match=r"aggregator-0\.onnx: is not the file that model.json describes"):
        Predictor(model)
    graph.unlink()
    with pytest.raises(InputError, match=r"aggregator-0\.onnx: cannot be read"):
        Predictor(model)


def test_what_needs_jax_is_refused(exported: Path, run: Path) -> None:
    model = open_onnx(exported)
    with pytest.raises(InputError, match="--dropout-samples needs dropout"):
        Predictor(model, dropout_samples=2)
    with pytest.raises(InputError, match="--attribution occlusion needs"):
        Predictor(model, attribution="occlusion")
    with pytest.raises(InputError, match="one exported model predicts at a time"):
        Predictor(model, model)


def test_the_calibration_of_a_bundle_is_exported_and_applied(
    run: Path, painted: Path, tmp_path: Path, symbolic_shapes: None, crcjax: Callable[..., CompletedProcess]
) -> None:
    calibration = Calibration(
        Predictor(run).model_id, ("canonical", "immune", "stromal"), 1.7, "lac", 0.1, {"": 0.8}, {"": 20}
    )
    (tmp_path / "calibration.json").write_text(json.dumps(asdict(calibration)))
    bundle = export_bundle([run], tmp_path / "bundle", calibration=tmp_path / "calibration.json")
    folder, slide = tmp_path / "exported", painted / "slides" / "synthetic-0015.svs"
    assert crcjax("export-model", "--bundle", bundle.path, "--format", "onnx", "--out", folder).returncode == 0
    rows = []
    for option, model in (("--bundle", bundle.path), ("--onnx", folder)):
        done = crcjax("predict", slide, option, model, "--out", tmp_path / option)
        assert done.returncode == 0, done.stderr
        rows += load_predictions(tmp_path / option / "predictions.csv").rows
    assert [row.calibration for row in rows] == [calibration.id] * 2
    assert rows[0].conformal_set == rows[1].conformal_set
    assert [row.bundle_id for row in rows] == [bundle.id] * 2
    np.testing.assert_allclose(rows[0].probs, rows[1].probs, atol=1e-4)
    for options, words in (
        (("--calibration", tmp_path / "calibration.json"), "has a calibration of its own; leave --calibration out"),
        (("--run", run), "--onnx cannot be combined with --run; leave out one or the other"),
        (("--executor", "ray"), "--onnx cannot be combined with --executor"),
    ):
        done = crcjax("predict", slide, "--onnx", folder, "--out", tmp_path / "refused", *options)
        assert done.returncode == 2
        assert words in done.stderr
    assert not (tmp_path / "refused").exists()
