"""A trained model as prediction loads it: the best checkpoint of a run, or a member of a bundle."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from ml_collections import ConfigDict

from crcjax.errors import InputError
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import MILModel, Params
from crcjax.runs.checkpoint import restore_params
from crcjax.runs.run_directory import Run, open_run
from crcjax.slides.stain.normalisation import StainNormaliser
from crcjax.slides.tiling.plan import TilingParams

# The feature density of a run, written at the end of its training.
DENSITY_FILE = "density.npz"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class TrainedModel:
    """A model that can predict, with everything its predictions depend on besides the slides.

    Attributes:
      path: the run directory or the bundle, which error messages name.
      config: the config of the training. In a bundle the paths are empty.
      tiling: how the slides were tiled.
      normaliser: the stain normaliser of config.stain.
      split_of: the split, `train` or `val`, of a slide or case that the model was fitted or chosen on, by its id; an empty
        text for all others.
      restore: reads the parameters into the structure of a model. Raises InputError.
      density: reads the arrays of the feature density; None for a head that has none. Raises InputError.
      encoder_sha256: the SHA-256 of the file of a published encoder's weights; None if it is unknown.
      model_id: the id that `model_id_of` gives, where it is recorded.
      bundle_id: the id of the bundle that holds the model; empty for a run.
    """

    path: Path
    config: ConfigDict
    tiling: TilingParams
    normaliser: StainNormaliser | None
    split_of: Callable[[str], str]
    restore: Callable[[MILModel], Params]
    density: Callable[[], Arrays] | None
    encoder_sha256: str | None
    model_id: str = ""
    bundle_id: str = ""


def model_of_run(path: str | Path, step: int | None = None) -> TrainedModel:
    """The model of a run's checkpoint: of its best one, or of a step. Raises InputError if it is no run directory."""
    run = open_run(path)
    return TrainedModel(
        run.path,
        run.config,
        run.tiling,
        run.normaliser,
        lambda name: run.split_of.get(name) or "",
        lambda model: restore_params(run.path, model, step)[0],
        partial(read_density, run.path) if run.config.model.head == BY_DENSITY else None,
        run.encoder_sha256,
    )


def split_by(models: Iterable[TrainedModel]) -> Callable[[str], str]:
    """The function that looks up the split of a slide or case by its id in all members of an ensemble.

    A slide that is in `train` of one member and in `val` of another counts as `train`: no evaluation may include it.
    """
    members = list(models)

    def split_of(name: str) -> str:
        splits = {model.split_of(name) for model in members}
        return next((split for split in ("train", "val") if split in splits), "")

    return split_of


def check_ensemble(models: Sequence[TrainedModel | Run]) -> None:
    """Raises InputError if the models differ in more than their seed, so that they form no ensemble."""
    first = models[0]
    for other in models[1:]:
        differing = [
            name
            for name, expected, actual in (
                ("tiling", first.tiling, other.tiling),
                ("config.data.classes", first.config.data.classes, other.config.data.classes),
                ("config.data.label", first.config.data.label, other.config.data.label),
                ("config.data.unit", first.config.data.unit, other.config.data.unit),
                ("config.data.magnifications", first.config.data.magnifications, other.config.data.magnifications),
                ("config.model", first.config.model, other.config.model),
            )
            if actual != expected
        ]
        if differing:
            raise InputError(
                f"{other.path}: another {' and '.join(differing)} than {first.path}; give runs that differ in their seed"
            )


def model_id_of(params: Params, density: Mapping[str, np.ndarray] | None = None) -> str:
    """The first 12 hex digits of the SHA-256 of the parameters and of the feature density, by name."""
    digest = hashlib.sha256()
    for path, value in jax.tree_util.tree_leaves_with_path(params | ({"density": dict(density)} if density else {})):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(np.asarray(value).tobytes())
    return digest.hexdigest()[:12]


def read_density(run: Path) -> Arrays:
    """Reads the arrays of a run's feature density. Raises InputError if the file is missing or damaged."""
    try:
        with open(run / DENSITY_FILE, "rb") as file, np.load(file) as saved:
            return dict(saved)
    except FileNotFoundError as error:
        raise InputError(
            f"{run}: has no {DENSITY_FILE}, which is written at the end of training; give the training command again"
        ) from error
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        raise InputError(
            f"{run / DENSITY_FILE}: is damaged ({error}); delete it and give the training command again"
        ) from error
