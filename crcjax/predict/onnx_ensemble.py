"""Exported models that ONNX Runtime runs; this module needs no JAX."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from crcjax.data.cohort import LABEL
from crcjax.environment import require_extra
from crcjax.errors import InputError
from crcjax.models.prediction import Prediction, logits_of
from crcjax.predict.attribution_method import Method
from crcjax.predict.ensemble import EncodedBag, Ensemble, SlideStains
from crcjax.runs.ensemble_id import ensemble_id
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.tiling.plan import TilePlan, TilingParams
from crcjax.slides.wsi.slide import Slide
from crcjax.validation.calibration import Calibration, read_calibration

DESCRIPTION, CALIBRATION = "model.json", "calibration.json"
FORMAT_VERSION = 1
# More tiles at a time are slower: their maps, one after each operation, leave the processor's cache.
_TILES_AT_ONCE = 16
_EXPORT_AGAIN = "copy the folder again, or export the model again"


@dataclass(frozen=True)
class OnnxModel:
    """An exported model: a pair of graphs for each ensemble member, and their description.

    Attributes:
      path: the folder.
      model_ids: the hash of each member's parameters.
      weights: how the graphs hold their weights (`predict.graph_weights`).
      sha256: that of each ONNX file by its name.
      bundle_id, tiling, magnifications, classes, target, unit: as in `Ensemble`.
    """

    path: Path
    model_ids: tuple[str, ...]
    weights: str
    sha256: dict[str, str]
    bundle_id: str
    tiling: TilingParams
    magnifications: tuple[str, ...]
    classes: tuple[str, ...]
    target: str
    unit: str

    def calibration(self) -> Calibration | None:
        """The calibration of the bundle that was exported; None without one. Raises InputError if it is damaged."""
        path = self.path / CALIBRATION
        return read_calibration(path) if path.exists() else None

    def graph(self, name: str) -> bytes:
        """The content of `NAME.onnx`. Raises InputError if it is missing, or not the file that was written."""
        file = self.path / f"{name}.onnx"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); {_EXPORT_AGAIN}") from error
        if hashlib.sha256(content).hexdigest() != self.sha256.get(file.name):
            raise InputError(f"{file}: is not the file that {DESCRIPTION} describes; {_EXPORT_AGAIN}")
        return content


def open_onnx(path: Path) -> OnnxModel:
    """Opens a folder of `crcjax export-model`. Raises InputError if it is none, or has no ONNX graphs."""
    file = path / DESCRIPTION
    try:
        values = json.loads(file.read_bytes())
        if values["format_version"] > FORMAT_VERSION:
            raise InputError(
                f"{file}: has format version {values['format_version']}, and this crcjax reads {FORMAT_VERSION}; update it"
            )
        sha256 = {name: graph["sha256"] for name, graph in values["graphs"].items() if name.endswith(".onnx")}
        model = OnnxModel(
            path,
            tuple(values["model_ids"]),
            values.get("weights", "float32"),
            sha256,
            values["bundle_id"],
            TilingParams.from_json(values["tiling"]),
            tuple(values["magnifications"]),
            tuple(values["classes"]),
            values.get("target", LABEL),
            values["unit"],
        )
    except FileNotFoundError as error:
        raise InputError(f"{file}: does not exist; give a folder of crcjax export-model") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: is damaged ({error!r}); {_EXPORT_AGAIN}") from error
    if not sha256:
        raise InputError(f"{path}: has no ONNX graphs; export the model with --format onnx")
    return model


def load_onnx_ensemble(models: Sequence[OnnxModel], dropout_samples: int, attribution: Method) -> Ensemble:
    """Loads the graphs of an exported model.

    Raises:
      InputError: a graph is not the one that was exported; there are several models; the graphs do not have what is asked for.
    """
    if len(models) > 1:
        raise InputError(f"{models[1].path}: one exported model predicts at a time; export the ensemble as one")
    (model,) = models
    obstacles = (
        (dropout_samples, "--dropout-samples needs dropout, which an exported graph does not have"),
        (attribution != "attention", f"--attribution {attribution} needs gradients or JAX's loops"),
        (
            model.tiling.stain and find_spec("jax") is None,
            "its training normalised the stain of tiles before they were encoded, which needs JAX",
        ),
    )
    for stands, reason in obstacles:
        if stands:
            raise InputError(f"{model.path}: {reason}; predict with crcjax and the run or bundle")
    members = [OnnxMember(model, number) for number in range(len(model.model_ids))]
    settings = {
        "tiling": model.tiling.to_json(),
        "magnifications": list(model.magnifications),
        "unit": model.unit,
        "graphs": model.sha256,
    }
    return Ensemble(
        models,
        members,
        (None,),
        ensemble_id(model.model_ids),
        model.bundle_id,
        model.tiling,
        model.magnifications,
        model.classes,
        model.target,
        model.unit,
        # Exported models do not name the slides of their training.
        lambda name: "",
        settings,
    )


class OnnxMember:
    """An ensemble member whose graphs ONNX Runtime runs on the CPU (see `EnsembleMember`)."""

    def __init__(self, model: OnnxModel, number: int):
        self.model_id, self._slots = model.model_ids[number], model.tiling.slots
        self._encoder = open_session(model.graph(f"encoder-{number}"))
        self._aggregator = open_session(model.graph(f"aggregator-{number}"))
        self._outputs = [output.name for output in self._aggregator.get_outputs()]
        self.chunk = max(1, _TILES_AT_ONCE // self._slots)

    @property
    def feature_size(self) -> int:
        """The number of features of a tile."""
        return next(given.shape[-1] for given in self._aggregator.get_inputs() if given.name == "features")

    def halve(self, chunk: int) -> bool:
        """Makes chunks smaller than `chunk`, which did not fit the memory; False if that is one region already."""
        if self.chunk >= chunk > 1:
            self.chunk //= 2
        return self.chunk < chunk

    def compile_ahead(self, regions: int, tile_shape: tuple[int, ...], stain: None) -> None:
        """Does nothing: a graph serves any number of regions."""

    def stain_of(self, slide: Slide, plan: TilePlan) -> None:
        """None: models that normalise stains by the slide are not exported."""

    def encode(
        self, pixels: UInt8[np.ndarray, "region slot y x 3"], stains: SlideStains, counts: Sequence[int]
    ) -> Float32[np.ndarray, "region slot feature"]:
        """Encodes regions. Raises MemoryError."""
        tiles = pixels.reshape(-1, *pixels.shape[2:])
        (features,) = _run(self._encoder, ["features"], {"tiles": tiles})
        return features.reshape(len(pixels), self._slots, -1)

    def pool(self, bag: EncodedBag, key: None = None) -> Prediction:
        """Predicts one bag. Raises MemoryError."""
        features, mask, position = bag
        fed = {"features": features, "mask": mask.astype(np.float32), "position": position}
        arrays = _run(self._aggregator, self._outputs, fed)
        values = {name: array[None] for name, array in zip(self._outputs, arrays, strict=True)}
        return Prediction(
            logits=logits_of(values["probs"]),
            instance_loss=np.zeros(1, np.float32),
            **{"alpha": None, "vacuity": None} | values,
        )

    def attribution(self, bag: EncodedBag) -> Float32[np.ndarray, "region slot class"]:
        """Raises InputError: an exported model has attention alone."""
        raise InputError("an exported model has attention alone; predict with its bundle for attributions")


def open_session(graph: bytes) -> Any:
    """Loads a graph for the CPU. Raises InputError without ONNX Runtime."""
    runtime = require_extra("onnxruntime", "onnx", "the prediction of exported models")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = usable_cores()
    # Threads that wait in a loop would take the cores from those that decode tiles.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # By default, products of stored int8 weights would also round the activations to int8.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = 3  # errors alone
    return runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _run(session: Any, outputs: Sequence[str], fed: dict[str, np.ndarray]) -> list[np.ndarray]:
    from onnxruntime.capi.onnxruntime_pybind11_state import RuntimeException

    try:
        return session.run(outputs, fed)
    except RuntimeException as error:
        # ONNX Runtime has no error of its own for memory.
        if "alloc" in str(error):
            raise MemoryError(str(error)) from error
        raise
