"""Exported graphs give what crcjax predict gives, for any number of regions, and what cannot be exported is named."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.predict import export_model as export
from crcjax.predict.export_model import TOLERANCE, export_model, same_class
from crcjax.predict.predictor import Predictor
from crcjax.runs.trained_model import model_of_run
from crcjax.slides.stain.methods import METHODS
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.wsi.slide import open_slide


def _onnx(file: Path, *arrays: np.ndarray) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]
    fed = {given.name: array for given, array in zip(session.get_inputs(), arrays, strict=True)}
    return dict(zip(outputs, session.run(outputs, fed), strict=True))


def _weight_bytes(file: Path) -> int:
    """The bytes of all stored arrays other than indices and shapes."""
    import onnx

    arrays = (onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(file).graph.initializer)
    return sum(array.nbytes for array in arrays if array.dtype != np.int64)


def _with_infinite_weights(model, weights: str):
    import onnx

    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.ndim == 2 and values.dtype == np.float32:
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full_like(values, np.inf), tensor.name))
    return model


def _stablehlo(file: Path, *arrays: np.ndarray) -> list[np.ndarray]:
    return [np.asarray(array) for array in jax.export.deserialize(bytearray(file.read_bytes())).call(*arrays)]


def test_a_slide_gets_the_same_probabilities_and_attention_from_both_graphs(
    exported: Path, run: Path, painted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictor = Predictor(run)
    forward, given = predictor.members[0].forward, []
    encode = forward.encode
    monkeypatch.setattr(
        forward, "encode", lambda params, pixels, stain: given.append(pixels) or encode(params, pixels, stain)
    )
    with open_slide(painted / "slides" / "synthetic-0015.svs") as slide:
        encoded = predictor.encode(slide, 1)
    (expected,) = predictor.predict_encoded([encoded])
    shown = encoded.mask.any(axis=1)
    tiles = np.concatenate(given)
    mask = encoded.mask.astype(np.float32)
    position = (encoded.plan.origin / encoded.plan.region_px).astype(np.float32)
    features = np.zeros_like(encoded.features[0])
    features[shown] = _onnx(exported / "encoder-0.onnx", tiles.reshape(-1, 64, 64, 3))["features"].reshape(
        len(tiles), 1, -1
    )
    outputs = _onnx(exported / "aggregator-0.onnx", features, mask, position)
    np.testing.assert_allclose(outputs["probs"], expected.probs, atol=TOLERANCE["onnx"])
    np.testing.assert_allclose(outputs["slot_attention"], expected.prediction.slot_attention[0], atol=TOLERANCE["onnx"])
    (by_stablehlo,) = _stablehlo(exported / "encoder-0.stablehlo", tiles.reshape(-1, 64, 64, 3))
    features[shown] = by_stablehlo.reshape(len(tiles), 1, -1)
    probs = _stablehlo(exported / "aggregator-0.stablehlo", features, mask, position)[0]
    np.testing.assert_allclose(probs, expected.probs, atol=TOLERANCE["stablehlo"])


def test_the_description_names_classes_tiling_operators_and_the_hash_of_every_graph(exported: Path, run: Path) -> None:
    description = json.loads((exported / "model.json").read_text())
    assert description["classes"] == ["canonical", "immune", "stromal"]
    assert (description["target"], description["weights"]) == ("subtype", "float32")
    assert description["model_ids"] == [Predictor(run).model_id]
    assert description["tiling"]["tile_px"] == 64
    graphs = description["graphs"]
    assert graphs.keys() == {f"{n}-0.{f}" for n in ("encoder", "aggregator") for f in ("onnx", "stablehlo")}
    for name, graph in graphs.items():
        assert graph["sha256"] == hashlib.sha256((exported / name).read_bytes()).hexdigest()
        assert 0 <= graph["largest_difference"] <= TOLERANCE[name.split(".")[1]]
        assert bool(graph["operators"]) == name.endswith("onnx")
    with pytest.raises(InputError, match="has files; choose a new folder"):
        export_model([run], exported)


@pytest.mark.parametrize(("weights", "share"), [("float16", 0.55), ("int8", 0.4)])
def test_smaller_weights_make_smaller_graphs_whose_results_are_close(
    exported: Path, run: Path, tmp_path: Path, symbolic_shapes: None, weights: str, share: float
) -> None:
    export_model([run], tmp_path / "model", ("onnx",), weights)
    description = json.loads((tmp_path / "model" / "model.json").read_text())
    assert description["weights"] == weights
    for graph in description["graphs"].values():
        assert TOLERANCE["onnx"] * 1e-4 < graph["largest_difference"] < 0.1
    smaller, whole = (_weight_bytes(folder / "encoder-0.onnx") for folder in (tmp_path / "model", exported))
    assert smaller < share * whole


def test_a_graph_that_overflows_is_refused(
    run: Path, tmp_path: Path, symbolic_shapes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "with_weights", _with_infinite_weights)
    for weights in ("float32", "float16"):
        with pytest.raises(InputError, match=r"encoder-0\.onnx: the graph's results differ from the model's by nan"):
            export_model([run], tmp_path / "model", ("onnx",), weights)
    assert not (tmp_path / "model").exists()


def test_a_class_may_differ_only_where_the_model_is_undecided() -> None:
    assert same_class(np.array([0.5, 0.4, 0.1]), np.array([0.41, 0.39, 0.2]))
    assert not same_class(np.array([0.5, 0.4, 0.1]), np.array([0.44, 0.46, 0.1]))
    assert same_class(np.array([0.451, 0.449, 0.1]), np.array([0.449, 0.451, 0.1]))


def test_what_a_graph_cannot_hold_is_named_before_anything_is_written(run: Path, tmp_path: Path) -> None:
    model, out = model_of_run(run), tmp_path / "out"
    stained = replace(model, normaliser=StainNormaliser("macenko", METHODS["macenko"][1]))
    for obstacle, words in (
        (stained, "normalises stain by the slide"),
        (replace(model, density=dict), "scales its evidence by a feature density"),
    ):
        with pytest.raises(InputError, match=words):
            export_model([obstacle], out)
    with pytest.raises(InputError, match="choose onnx or stablehlo"):
        export_model([model], out, ("tensorrt",))
    with pytest.raises(InputError, match="all but float32 with --format onnx alone"):
        export_model([model], out, weights="int8")
    assert not out.exists()
