"""Bundles: trained models with all that prediction needs, in one folder whose every byte is checked when it is opened.

| file | content |
|---|---|
| bundle.json | format version, target, members, parts, and the SHA-256 of every other file; its own SHA-256 is the bundle's id |
| settings.json | the tiling, and each member's config (without paths) and stain normaliser |
| weights-N.safetensors | the parameters of member N, without a frozen published encoder, which bundle.json names by its hash |
| density-N.safetensors | the feature density of member N, if its head has one |
| training_ids.json | keyed hashes of the slides and cases that the members were fitted and chosen on |
| calibration.json | the calibration, if there is one |
| model_card.md | the bundle in words |
| signature | an Ed25519 signature of bundle.json, if it is signed; the only file that bundle.json does not list |
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors

from crcjax.errors import InputError
from crcjax.models.mil import MILModel, Params, params_of
from crcjax.runs.ensemble_id import ensemble_id
from crcjax.runs.pretrained_weights import published_encoder
from crcjax.runs.run_directory import config_from_json
from crcjax.runs.signature import is_signed_by
from crcjax.runs.trained_model import Arrays, TrainedModel
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.tiling.plan import TilingParams
from crcjax.validation.calibration import Calibration, read_calibration

FORMAT, VERSION = "crcjax bundle", 1
MANIFEST, SIGNATURE, CARD = "bundle.json", "signature", "model_card.md"
SETTINGS, TRAINING_IDS, CALIBRATION = "settings.json", "training_ids.json", "calibration.json"
_REQUIRED_PARTS = {"settings", "weights", "training_ids"}
# Parts that this version reads. A bundle with a further part is refused unless the part is marked optional.
_KNOWN_PARTS = {*_REQUIRED_PARTS, "density", "calibration", "card"}
_COPY_AGAIN = "copy the bundle again, or export it again"


@dataclass(frozen=True)
class Target:
    """The prediction target: its name, which is also the cohort's label column, its classes, and the cancer type."""

    name: str
    classes: tuple[str, ...]
    cancer_type: str


@dataclass(frozen=True)
class Encoder:
    """A published encoder, its weights named by the SHA-256 of their file, and where they are published."""

    name: str
    sha256: str
    source: str


@dataclass(frozen=True)
class MemberFacts:
    """Where a member of a bundle comes from.

    Attributes:
      model_id: the hash of its parameters.
      seed: config.seed of its run.
      step: the step of its checkpoint.
      metrics: the validation metrics of the checkpoint; None if it was not evaluated.
      config_sha256: the SHA-256 of the run's config.json.
      data_sha256: the SHA-256 of the run's data manifest; None for runs that have none.
    """

    model_id: str
    seed: int
    step: int
    metrics: dict[str, float] | None
    config_sha256: str
    data_sha256: str | None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle; every file was checked against bundle.json.

    Attributes:
      path: the folder.
      id: the SHA-256 of bundle.json.
      target: the prediction target.
      members: where the models come from.
      models: the models, as `Predictor` and `predict_stored` take them.
      calibration: the calibration; None without one.
      encoder: the published encoder that is not in the bundle; None without one.
      is_signed: whether it has a signature, which `open_bundle` verifies only with trusted keys.
    """

    path: Path
    id: str
    target: Target
    members: tuple[MemberFacts, ...]
    models: tuple[TrainedModel, ...]
    calibration: Calibration | None
    encoder: Encoder | None
    is_signed: bool

    @property
    def model_id(self) -> str:
        """The id of the ensemble in predictions.csv and calibration.json."""
        return ensemble_id(member.model_id for member in self.members)


def is_bundle(path: str | Path) -> bool:
    """Whether a folder is a bundle."""
    return (Path(path) / MANIFEST).is_file()


def open_bundle(path: str | Path, trust: Sequence[Path] = (), encoder_weights: Path | None = None) -> Bundle:
    """Opens a bundle and checks every file.

    Args:
      path: the folder.
      trust: files of public keys. With any, the bundle must be signed by one of them.
      encoder_weights: the file of the published encoder's weights, if the bundle names one. Without it the models predict
        only from stored features.

    Raises:
      InputError: the folder is no bundle; a file is changed, missing or does not belong; the signature is not by a trusted
        key; the weights are another file; a part is unknown and not optional.
    """
    path = Path(path)
    try:
        content = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: is not a bundle (no readable {MANIFEST}); give the folder that crcjax checkpoints export wrote"
        ) from error
    is_signed = _check_signature(path, content, trust)
    try:
        manifest = json.loads(content)
        if manifest["format"] != FORMAT:
            raise ValueError(f"format {manifest['format']!r}")
        if manifest["version"] > VERSION:
            raise InputError(
                f"{path}: has format version {manifest['version']}, and this crcjax reads {VERSION}; update it"
            )
        files = _checked_files(path, manifest["files"])
        return _bundle(path, content, manifest, files, encoder_weights, is_signed)
    except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise InputError(f"{path / MANIFEST}: is not a bundle's ({error!r}); {_COPY_AGAIN}") from error


def id_key(salt: str, name: str) -> str:
    """The keyed hash that stands for a slide or case in training_ids.json."""
    return hmac.digest(salt.encode(), name.encode(), "sha256").hex()[:32]


def tensor_name(path: Sequence[Any]) -> str:
    """The name of a parameter in a safetensors file, from its path of dictionary keys."""
    return ".".join(str(key.key) for key in path)


def _check_signature(path: Path, content: bytes, trust: Sequence[Path]) -> bool:
    """Whether there is a signature. Raises InputError if keys are trusted and it is not by one of them."""
    file = path / SIGNATURE
    signature = file.read_bytes() if file.is_file() else None
    if trust and signature is None:
        raise InputError(f"{path}: is not signed; export it with --key, or leave --trust out")
    if signature is not None and trust and not any(is_signed_by(key, content, signature) for key in trust):
        raise InputError(
            f"{path}: its signature is not by {' or '.join(map(str, trust))}, or {MANIFEST} was changed after it was signed; "
            "give the key of who signed it, or get the bundle again"
        )
    return signature is not None


def _checked_files(path: Path, hashes: Mapping[str, str]) -> Callable[[str], bytes]:
    """Compares the folder with the hashes of its files, and returns a function that reads a file.

    Raises InputError, which names every file that is changed, missing, or not in `hashes`.
    """
    if unsafe := [name for name in hashes if Path(name).name != name or name in (MANIFEST, SIGNATURE)]:
        raise ValueError(f"file name {unsafe[0]!r}")
    present = {str(file.relative_to(path)) for file in path.rglob("*") if not file.is_dir()}
    faults = [f"{name} is missing" for name in sorted(set(hashes) - present)]
    faults += [f"{name} does not belong to it" for name in sorted(present - {*hashes, MANIFEST, SIGNATURE})]
    faults += [f"{name} is changed" for name in sorted(set(hashes) & present) if _sha256(path / name) != hashes[name]]
    if faults:
        raise InputError(f"{path}: {'; '.join(faults)}; {_COPY_AGAIN}")

    def read(name: str) -> bytes:
        # Once more: the file may have changed since it was checked.
        content = (path / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != hashes[name]:
            raise InputError(f"{path}: {name} is changed; {_COPY_AGAIN}")
        return content

    return read


def _sha256(file: Path) -> str:
    """The SHA-256 of a file; empty if it cannot be read."""
    try:
        with open(file, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError:
        return ""


def _bundle(
    path: Path,
    content: bytes,
    manifest: dict[str, Any],
    read: Callable[[str], bytes],
    encoder_weights: Path | None,
    is_signed: bool,
) -> Bundle:
    """Raises InputError, and ValueError, KeyError, TypeError or AttributeError for values of another form."""
    parts = {name: list(part["files"]) for name, part in manifest["parts"].items()}
    unknown = [name for name in parts if name not in _KNOWN_PARTS and not manifest["parts"][name]["optional"]]
    if unknown:
        raise InputError(f"{path}: has the part {unknown[0]!r}, which this crcjax cannot read; update it")
    if missing := _REQUIRED_PARTS - set(parts):
        raise ValueError(f"no part {min(missing)!r}")
    encoder = Encoder(**manifest["encoder"]) if manifest["encoder"] else None
    if encoder_weights and not encoder:
        raise InputError(f"{path}: needs no weights of a published encoder; leave --encoder-weights out")
    members = tuple(MemberFacts(**member) for member in manifest["members"])
    settings, split_of = json.loads(read(SETTINGS)), _split_lookup(json.loads(read(TRAINING_IDS)))
    tiling = TilingParams.from_json(settings["tiling"])
    configs = [config_from_json(values["config"]) for values in settings["members"]]
    bundle_id = hashlib.sha256(content).hexdigest()
    load_encoder = None
    if encoder:
        load_encoder = cache(partial(_encoder_params, path, configs[0].model, encoder, encoder_weights))
    models = []
    for number, (member, config) in enumerate(zip(members, configs, strict=True)):
        stain = settings["members"][number]["stain"]
        density = partial(_density, read, parts["density"][number]) if "density" in parts else None
        models.append(
            TrainedModel(
                path,
                config,
                tiling,
                StainNormaliser.from_json(stain) if stain else None,
                split_of,
                partial(_restore, path, read, parts["weights"][number], load_encoder),
                density,
                encoder.sha256 if encoder else None,
                model_id=member.model_id,
                bundle_id=bundle_id,
            )
        )
    target = manifest["target"]
    return Bundle(
        path,
        bundle_id,
        Target(target["name"], tuple(target["classes"]), target["cancer_type"]),
        members,
        tuple(models),
        read_calibration(path / CALIBRATION, read(CALIBRATION)) if "calibration" in parts else None,
        encoder,
        is_signed,
    )


def _split_lookup(values: dict[str, Any]) -> Callable[[str], str]:
    split_of_key = {key: split for split in ("val", "train") for key in values[split]}
    return lambda name: split_of_key.get(id_key(values["salt"], name), "")


def _density(read: Callable[[str], bytes], file: str) -> Arrays:
    return load_tensors(read(file))


def _encoder_params(path: Path, config: ConfigDict, encoder: Encoder, file: Path | None) -> Params:
    """The parameters of the published encoder (`config` is config.model). Raises InputError for another file, and for none."""
    if file is None:
        raise InputError(
            f"{path}: names the weights of {encoder.name} by their SHA-256 {encoder.sha256} alone; give the file with "
            f"--encoder-weights, or a --store with features that crcjax embed made with it"
        )
    module, sha256 = published_encoder(config, file)
    if sha256 != encoder.sha256:
        raise InputError(
            f"{file}: must be the weights of {encoder.name} that {path} was trained with, SHA-256 {encoder.sha256}, got "
            f"{sha256}; try {encoder.source}"
        )
    return nnx.to_pure_dict(nnx.state(module))


def _restore(
    path: Path, read: Callable[[str], bytes], file: str, load_encoder: Callable[[], Params] | None, model: MILModel
) -> Params:
    """Reads the parameters of a member. Raises InputError if they do not fit the model."""
    expected = params_of(model)
    published = expected["encoder"].pop("published", None) if load_encoder else None
    params = jax.tree_util.tree_map_with_path(partial(_tensor, path / file, load_tensors(read(file))), expected)
    if load_encoder and published:
        params["encoder"]["published"] = load_encoder()
    return params


def _tensor(file: Path, tensors: Arrays, path: Sequence[Any], expected: jax.ShapeDtypeStruct) -> np.ndarray:
    name = tensor_name(path)
    value = tensors.get(name)
    if value is None or value.shape != expected.shape or value.dtype != expected.dtype:
        got = "none" if value is None else f"{value.dtype} {value.shape}"
        raise InputError(
            f"{file}: the tensor {name} must be {expected.dtype} {expected.shape}, got {got}; {_COPY_AGAIN}"
        )
    return value
