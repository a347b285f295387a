"""Exports a trained model for other runtimes: ONNX and StableHLO graphs of encoder and aggregator, with all else they need."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Num

import crcjax
from crcjax.errors import InputError, writing
from crcjax.models.mil import MILModel, abstract_model
from crcjax.predict.graph_weights import WEIGHTS, with_weights
from crcjax.predict.member import opened_models
from crcjax.predict.onnx_ensemble import CALIBRATION, DESCRIPTION, FORMAT_VERSION, open_session
from crcjax.runs.trained_model import TrainedModel, check_ensemble, model_id_of

FORMATS = ("onnx", "stablehlo")
ONNX_OPSET = 17
# The sizes at which a graph is compared with the model: tiles for the encoder, regions for the aggregator.
CHECKED_TILES, CHECKED_REGIONS = (1, 7, 32), (1, 7, 1000, 20_000)
TOLERANCE = {"onnx": 1e-4, "stablehlo": 1e-5}
# With smaller weights, the class may differ only where the two largest probabilities of the model are closer than this.
MARGIN = 0.02
_SEED = 0
# jax2onnx requires an older orbax-checkpoint than crcjax, without using what has changed.
_INSTALL = "pip install 'crcjax[onnx]' && pip install --no-deps jax2onnx==0.17.1"

Function = Callable[..., Any]
Runner = Callable[..., Sequence[np.ndarray]]


@dataclass(frozen=True)
class Graph:
    """A function of the model that becomes a graph.

    Attributes:
      name: the file's name without the format.
      function: maps arrays to a tuple of arrays.
      inputs: name, dtype and shape of each input; the axis "n" has any length.
      outputs: the names of the outputs.
      sizes: the lengths of "n" at which the graph is checked.
    """

    name: str
    function: Function
    inputs: tuple[tuple[str, Any, tuple[int | str, ...]], ...]
    outputs: tuple[str, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class ExportedGraph:
    """A written graph: its file, bytes, operators (ONNX alone), and its largest difference from the model."""

    file: Path
    size_bytes: int
    operators: tuple[str, ...]
    largest_difference: float


def export_model(
    models: Sequence[str | Path | TrainedModel],
    out: Path,
    formats: Sequence[str] = FORMATS,
    weights: str = "float32",
) -> list[ExportedGraph]:
    """Writes OUT/encoder-K.FORMAT and OUT/aggregator-K.FORMAT for each ensemble member K, and OUT/model.json.

    The encoder maps `tiles` (8-bit RGB, of any number) to `features`. The aggregator maps `features`, `mask` (1 for a valid tile)
    and `position` (x and y of each region, in sides of a region), of any number of regions, to probabilities, attention and
    uncertainties of one bag; the members' probabilities are to be averaged. model.json has the classes, the tiling, the inputs
    and outputs, and the SHA-256 of every file. Every graph is run and compared with the model before it is written. The
    calibration of a bundle is copied to OUT/calibration.json.

    Args:
      models: run directories or models of a bundle, as for `Predictor`.
      out: a folder, new or empty.
      formats: "onnx" or "stablehlo", or both.
      weights: how ONNX graphs store their weights: "float32", "float16" or "int8".

    Raises:
      InputError: `out` has files; the model needs what a graph cannot hold (stain normalisation by the slide, a feature density,
        imported features, an aggregator whose operations depend on the number of regions); a package is missing.
      OutputError: the folder cannot be written.
    """
    if unknown := set(formats) - set(FORMATS):
        raise InputError(f"--format {sorted(unknown)[0]!r}: choose {' or '.join(FORMATS)}")
    if weights not in WEIGHTS or (weights != "float32" and tuple(formats) != ("onnx",)):
        raise InputError(f"--weights {weights}: choose {', '.join(WEIGHTS)}, all but float32 with --format onnx alone")
    opened = opened_models(models)
    check_ensemble(opened)
    for trained in opened:
        _check_exportable(trained)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out}: has files; choose a new folder")
    exported, model_ids = [], []
    for number, trained in enumerate(opened):
        model, model_id = _restored(trained)
        model_ids.append(model_id)
        for graph in _graphs(model, trained, number):
            for name in formats:
                exported.append(_export(graph, name, out, weights))
    _write_description(opened[0], model_ids, exported, out, weights)
    return exported


def _check_exportable(model: TrainedModel) -> None:
    config = model.config
    obstacles = (
        (config.model.imported_features, "was trained on imported features, whose encoder is unknown"),
        (model.normaliser is not None, f"normalises stain by the slide (config.stain.method {config.stain.method})"),
        (
            model.density is not None,
            f"scales its evidence by a feature density (config.model.head {config.model.head})",
        ),
    )
    for stands, reason in obstacles:
        if stands:
            raise InputError(f"{model.path}: {reason}, which a graph does not hold; predict with crcjax predict")


def _restored(trained: TrainedModel) -> tuple[MILModel, str]:
    model = abstract_model(trained.config.model, len(trained.config.data.classes), trained.tiling.factors)
    params = trained.restore(model)
    model.set_attributes(fused=False, raise_if_not_found=False)
    return nnx.merge(nnx.graphdef(model), params), model_id_of(params)


def _graphs(model: MILModel, trained: TrainedModel, number: int) -> list[Graph]:
    side, slots, size = trained.tiling.tile_px, trained.tiling.slots, trained.config.model.features
    graph, state = nnx.split(model)

    def encode(tiles: Num[Array, "tile y x 3"]) -> tuple[Float32[Array, "tile feature"]]:
        return (nnx.merge(graph, state).encode(tiles),)

    names = ["probs", "embedding", "region_attention", "slot_attention", "class_attention", "expected_entropy"]
    names += ["alpha", "vacuity"] if trained.config.model.head != "softmax" else []

    def pool(
        features: Float32[Array, "region slot feature"],
        mask: Float32[Array, "region slot"],
        position: Float32[Array, "region 2"],
    ) -> tuple[Array, ...]:
        prediction = nnx.merge(graph, state).pool(features[None], mask[None] > 0.5, position[None])
        return tuple(getattr(prediction, name)[0] for name in names)

    tiles = (("tiles", jnp.uint8, ("n", side, side, 3)),)
    bag = (
        ("features", jnp.float32, ("n", slots, size)),
        ("mask", jnp.float32, ("n", slots)),
        ("position", jnp.float32, ("n", 2)),
    )
    return [
        Graph(f"encoder-{number}", encode, tiles, ("features",), CHECKED_TILES),
        Graph(f"aggregator-{number}", pool, bag, tuple(names), CHECKED_REGIONS),
    ]


def _export(graph: Graph, format_name: str, out: Path, weights: str) -> ExportedGraph:
    """Converts a graph, compares it with the model, and writes it."""
    convert = partial(_to_onnx, weights=weights) if format_name == "onnx" else _to_stablehlo
    file = out / f"{graph.name}.{format_name}"
    try:
        content, runner, operators = convert(graph)
    # JAX and jax2onnx raise one of these for an operation that needs the number of regions, or that they cannot convert.
    except (TypeError, NotImplementedError, ValueError, jax.errors.JAXTypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{file}: the graph cannot be made for any number of {'tiles' if len(graph.inputs) == 1 else 'regions'} ({reason}); "
            "choose another config.model.mil or encoder, or predict with crcjax predict"
        ) from error
    differences, has_same_classes = [], True
    for length in graph.sizes:
        expected, actual = _outputs(graph, runner, length)
        differences += [np.abs(actual[name] - expected[name]).max() for name in expected]
        has_same_classes &= "probs" not in expected or same_class(expected["probs"], actual["probs"])
    # Unlike Python's, NumPy's maximum is NaN if one value is.
    difference = float(np.max(differences))
    limit = TOLERANCE[format_name] if weights == "float32" else float(np.finfo(np.float32).max)
    if not difference <= limit:
        raise InputError(
            f"{file}: the graph's results differ from the model's by {difference:.2g}, more than {limit:.0e}"
        )
    if not has_same_classes:
        raise InputError(f"{file}: with {weights} weights it predicts another class than the model; try float32")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return ExportedGraph(file, len(content), operators, difference)


def _to_onnx(graph: Graph, weights: str = "float32") -> tuple[bytes, Runner, tuple[str, ...]]:
    # They warn of values without a type, which are optional, and of examples that need further packages.
    for noisy in ("onnx_ir.serde", "jax2onnx.plugins.plugin_system"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise InputError(f"ONNX needs {error.name}; {_INSTALL}") from error
    inputs = _abstract_inputs(graph)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # jax2onnx reads flax's variables in the old way
        model = to_onnx(
            graph.function,
            inputs,
            model_name=graph.name,
            opset=ONNX_OPSET,
            input_names=[name for name, *_ in graph.inputs],
            output_names=list(graph.outputs),
        )
    model = with_weights(model, weights)
    content = model.SerializeToString()
    session = open_session(content)
    operators = sorted(
        {node.op_type for node in model.graph.node} | {node.op_type for f in model.functions for node in f.node}
    )

    def run(*arrays: np.ndarray) -> Sequence[np.ndarray]:
        fed = {name: array for (name, *_), array in zip(graph.inputs, arrays, strict=True)}
        return session.run(list(graph.outputs), fed)

    return content, run, tuple(operators)


def _to_stablehlo(graph: Graph) -> tuple[bytes, Runner, tuple[str, ...]]:
    inputs = _abstract_inputs(graph)
    exported = jax.export.export(jax.jit(graph.function), platforms=("cpu", "cuda"))(*inputs)
    content = bytes(exported.serialize())
    call = jax.jit(jax.export.deserialize(bytearray(content)).call)
    return content, lambda *arrays: [np.asarray(array) for array in call(*arrays)], ()


def _abstract_inputs(graph: Graph) -> list[jax.ShapeDtypeStruct]:
    scope = jax.export.SymbolicScope()  # one n for all inputs
    return [
        jax.ShapeDtypeStruct(tuple(jax.export.symbolic_shape(", ".join(map(str, shape)), scope=scope)), dtype)
        for _, dtype, shape in graph.inputs
    ]


def _outputs(graph: Graph, runner: Runner, length: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The outputs of a function and of its graph, on random inputs of a length; one tile in eight is masked."""
    rng = np.random.default_rng(_SEED + length)
    arrays = []
    for name, dtype, shape in graph.inputs:
        sizes = [length if size == "n" else int(size) for size in shape]
        if name == "mask":
            arrays.append((rng.random(sizes) < (0.875 if length > 1 else 1.0)).astype(np.float32))
        elif dtype == jnp.uint8:
            arrays.append(rng.integers(0, 256, sizes, np.uint8))
        else:
            arrays.append(rng.normal(size=sizes).astype(np.float32))
    expected, actual = (
        {name: np.asarray(array, np.float64) for name, array in zip(graph.outputs, outputs, strict=True)}
        for outputs in (jax.jit(graph.function)(*arrays), runner(*arrays))
    )
    return expected, actual


def same_class(expected: Float[np.ndarray, " class"], actual: Float[np.ndarray, " class"]) -> bool:
    """Whether the most probable class is the same, or the expected probabilities leave it open by MARGIN."""
    second, first = np.sort(expected)[-2:]
    return bool(first - second <= MARGIN or expected.argmax() == actual.argmax())


def _write_description(
    first: TrainedModel, ids: Sequence[str], exported: Sequence[ExportedGraph], out: Path, weights: str
) -> None:
    config = first.config
    graphs = {
        graph.file.name: {
            "sha256": hashlib.sha256(graph.file.read_bytes()).hexdigest(),
            "operators": graph.operators,
            "largest_difference": graph.largest_difference,
        }
        for graph in exported
    }
    description = {
        "format_version": FORMAT_VERSION,
        "crcjax": crcjax.__version__,
        "model_ids": ids,
        "bundle_id": first.bundle_id,
        "classes": list(config.data.classes),
        "target": config.data.label,
        "unit": config.data.unit,
        "tiling": first.tiling.to_json(),
        "magnifications": list(config.data.magnifications or first.tiling.magnifications),
        "onnx_opset": ONNX_OPSET,
        "weights": weights,
        "graphs": graphs,
        "use": "research use only",
    }
    with writing(out):
        if first.bundle_id and (first.path / CALIBRATION).exists():
            shutil.copyfile(first.path / CALIBRATION, out / CALIBRATION)
        (out / DESCRIPTION).write_text(json.dumps(description, indent=1) + "\n")
