"""Writes bundles from checkpoints of runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save as save_tensors

import crcjax
from crcjax.errors import InputError, writing
from crcjax.models.encoders.registry import has_published_encoder, pretrained_encoder
from crcjax.models.mil import Params, abstract_model
from crcjax.runs.bundle import (
    CALIBRATION,
    CARD,
    FORMAT,
    MANIFEST,
    SETTINGS,
    SIGNATURE,
    TRAINING_IDS,
    VERSION,
    Bundle,
    Encoder,
    MemberFacts,
    Target,
    id_key,
    open_bundle,
    tensor_name,
)
from crcjax.runs.checkpoint import best_metrics, metrics_of_steps
from crcjax.runs.ensemble_id import ensemble_id
from crcjax.runs.model_card import model_card
from crcjax.runs.pretrained_weights import published_encoder
from crcjax.runs.run_directory import DATA_MANIFEST, PATHS, Run, commit, member_runs, open_run
from crcjax.runs.signature import sign
from crcjax.runs.trained_model import (
    Arrays,
    TrainedModel,
    check_ensemble,
    model_id_of,
    model_of_run,
)
from crcjax.validation.calibration import load_calibration


def export_bundle(
    runs: Sequence[Path],
    out: Path,
    *,
    step: int | None = None,
    calibration: Path | None = None,
    key: Path | None = None,
    encoder_weights: Path | None = None,
) -> Bundle:
    """Writes a bundle of the checkpoints of one run, or of several runs as an ensemble.

    The same checkpoints, calibration and version of crcjax give the same bytes, so the same id.

    Args:
      runs: run directories that differ only by their seed, or the directory of an ensemble.
      out: the folder, new, or a bundle with the same content.
      step: the step of the checkpoints; by default of each run the best one, which `crcjax predict --run` uses.
      calibration: calibration.json of the same models.
      key: file of the private key that signs the bundle.
      encoder_weights: the file of the published encoder's weights, for runs that do not record its hash.

    Raises:
      InputError: a run has no such checkpoint; the runs form no ensemble; the calibration is of other models; the hash of
        the encoder's weights is unknown; the key is not usable; `out` exists.
      OutputError: `out` cannot be written.
    """
    opened = [open_run(member) for run in runs for member in member_runs(run)]
    check_ensemble(opened)
    steps = [_step_of(run, step) for run in opened]
    encoder = _encoder(opened, encoder_weights)
    texts: dict[str, bytes] = {}
    parts: dict[str, Any] = {}

    def add(part: str, name: str, content: bytes, *, optional: bool = False) -> None:
        texts[name] = content
        parts.setdefault(part, {"files": [], "optional": optional})["files"].append(name)

    members = []
    for number, (run, (checkpoint_step, metrics)) in enumerate(zip(opened, steps, strict=True)):
        params, density = _restored(model_of_run(run.path, checkpoint_step))
        if encoder and number == 0 and run.encoder_sha256 is None:
            _check_encoder(run, params, encoder_weights or Path(run.config.model.weights))
        members.append(_member(run, model_id_of(params, density), checkpoint_step, metrics))
        if encoder:
            del params["encoder"]["published"]
        add("weights", f"weights-{number}.safetensors", _tensors(params))
        if density:
            add("density", f"density-{number}.safetensors", save_tensors(density))
    model_id, config = ensemble_id(member.model_id for member in members), opened[0].config
    target = Target(config.data.label, tuple(config.data.classes), config.data.cancer_type)
    fitted = load_calibration(calibration, model_id, target.classes) if calibration else None
    add("settings", SETTINGS, _json({"tiling": opened[0].tiling.to_json(), "members": list(map(_settings, opened))}))
    add("training_ids", TRAINING_IDS, _json(_training_ids(opened, model_id)))
    if calibration:
        add("calibration", CALIBRATION, calibration.read_bytes())
    card = model_card(target, members, encoder, opened[0], fitted)
    add("card", CARD, card.encode(), optional=True)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "target": asdict(target),
        "model_id": model_id,
        "members": [asdict(member) for member in members],
        "encoder": asdict(encoder) if encoder else None,
        "parts": parts,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(texts.items())},
        "made_by": {"crcjax": crcjax.__version__, "commit": commit()},
    }
    texts[MANIFEST] = _json(manifest)
    if key:
        texts[SIGNATURE] = sign(key, texts[MANIFEST])
    _write(out, texts)
    return open_bundle(out, encoder_weights=encoder_weights if encoder else None)


def _step_of(run: Run, step: int | None) -> tuple[int, dict[str, float] | None]:
    """The step of a run's checkpoint, by default the best one, and its validation metrics. Raises InputError."""
    best, metrics = best_metrics(run.path)
    if step is None or step == best:
        return best, metrics
    if model_of_run(run.path).density:
        raise InputError(
            f"{run.path}: its feature density is that of step {best}, the best one, and not of step {step}; export that one"
        )
    metrics_of_step = metrics_of_steps(run.path)
    if step not in metrics_of_step:
        raise InputError(
            f"{run.path}: has no checkpoint of step {step}; choose one of {', '.join(map(str, metrics_of_step))}"
        )
    return step, metrics_of_step[step]


def _restored(model: TrainedModel) -> tuple[Params, Arrays | None]:
    config = model.config
    abstract = abstract_model(config.model, len(config.data.classes), model.tiling.factors)
    params = jax.tree.map(np.asarray, model.restore(abstract))
    return params, model.density() if model.density else None


def _encoder(runs: Sequence[Run], file: Path | None) -> Encoder | None:
    """The frozen published encoder of the runs, whose weights are not copied; None without one.

    Raises InputError if the hash of its weights is unknown.
    """
    config = runs[0].config.model
    if not has_published_encoder(config) or not config.frozen:
        return None
    recorded = {run.encoder_sha256 for run in runs} - {None}
    weights = file or Path(config.weights)
    if len(recorded) > 1:
        raise InputError(
            f"{runs[0].path}: the runs were trained with different weights of {config.encoder}; export them alone"
        )
    if recorded:
        sha256 = recorded.pop()
    elif weights.is_file():
        with open(weights, "rb") as opened:
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    else:
        raise InputError(
            f"{runs[0].path}: does not record the SHA-256 of the weights of {config.encoder}, and {weights} is not there; give "
            "their file with --encoder-weights"
        )
    return Encoder(config.encoder, str(sha256), pretrained_encoder(config.encoder).source)


def _check_encoder(run: Run, params: Params, file: Path) -> None:
    """Raises InputError if a file does not hold the encoder's weights that are in a checkpoint."""
    expected = nnx.to_pure_dict(nnx.state(published_encoder(run.config.model, file)[0]))
    equal = jax.tree.map(np.array_equal, expected, params["encoder"]["published"])
    if not jax.tree.all(equal):
        raise InputError(f"{file}: holds other weights than {run.path} was trained with; give the file of the training")


def _member(run: Run, model_id: str, step: int, metrics: dict[str, float] | None) -> MemberFacts:
    manifest = run.path / DATA_MANIFEST
    return MemberFacts(
        model_id,
        run.config.seed,
        step,
        metrics,
        hashlib.sha256((run.path / "config.json").read_bytes()).hexdigest(),
        hashlib.sha256(manifest.read_bytes()).hexdigest() if manifest.is_file() else None,
    )


def _settings(run: Run) -> dict[str, Any]:
    """The config and stain normaliser of a run. Paths, which may name people and machines, are left out."""
    config = run.config.copy_and_resolve_references()
    config.update_from_flattened_dict(dict.fromkeys(PATHS, ""))
    return {"config": config.to_dict(), "stain": run.normaliser.to_json() if run.normaliser else None}


def _training_ids(runs: Sequence[Run], salt: str) -> dict[str, Any]:
    """Keyed hashes of the slides and cases of training and validation.

    The key is the model's id, so that hashes of two bundles cannot be compared.
    """
    training = {name for run in runs for name in run.ids("train")}
    validation = {name for run in runs for name in run.ids("val")} - training
    hashes = {split: sorted(id_key(salt, n) for n in ids) for split, ids in (("train", training), ("val", validation))}
    return {"salt": salt, **hashes}


def _tensors(params: Params) -> bytes:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return save_tensors({tensor_name(path): np.ascontiguousarray(value) for path, value in leaves})


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True) + "\n").encode()


def _write(out: Path, texts: dict[str, bytes]) -> None:
    """Writes the files of a folder that appears under its name when it is complete.

    Raises InputError if there is something else under that name, OutputError.
    """
    if out.exists() or out.is_symlink():
        try:
            existing = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if not file.is_dir()}
        except OSError:
            existing = {}
        if existing != texts:
            raise InputError(f"{out}: exists; choose another --out, or remove it")
        return
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        with writing(out):
            partial.mkdir(parents=True)
            for name, content in texts.items():
                with open(partial / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            partial.rename(out)
    finally:
        with suppress(OSError):
            shutil.rmtree(partial)
