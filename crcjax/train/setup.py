"""The setup of a training run: everything that is checked, opened and compiled before the run writes its first file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from crcjax.config_check import check_config
from crcjax.data.bags import StoredSlides, featured, open_features, open_stores
from crcjax.data.case_bags import rows_by_unit
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.cohort_summary import content_hashes, summarise_cohort
from crcjax.data.hard_mining import Mining, start_mining
from crcjax.data.loader import Feed, open_feed
from crcjax.data.slide_quality import quality_sentences, without_refused
from crcjax.data.splits import divide
from crcjax.errors import InputError
from crcjax.models.encoders.registry import PRETRAINED, StoredEncoder, has_published_encoder
from crcjax.models.feature_scaling import column_statistics
from crcjax.models.heads import BY_DENSITY
from crcjax.models.mil import MILModel, build_model
from crcjax.monitor.logs import log
from crcjax.parallel.compilation_cache import use_compilation_cache
from crcjax.parallel.mesh import device_mesh
from crcjax.predict.feature_density import check_bags
from crcjax.runs.pretrained_weights import build_unloaded, is_frozen, load_published
from crcjax.slides.stain.normalisation import StainNormaliser, stain_normaliser
from crcjax.slides.store.features import FeatureReader, feature_attributes
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.plan import TilingParams
from crcjax.train.auxiliary_tasks import Tasks, add_heads, check_tasks, open_tasks
from crcjax.train.memory_budget import Budget, MicroBatches, fitting_step
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state, build_step

# Regions of each slide that the statistics of features are computed from, about: more change them little and take time.
_STATISTICS_REGIONS = 512


@dataclass(frozen=True)
class RunData:
    """The data of a run, opened once.

    Attributes:
      cohort: the training and validation slides.
      slides: their open stores and feature readers.
      tiling: how the slides were tiled.
      normaliser: the stain normaliser of config.stain.
      feed: the source of training batches.
      training_units: the training slides, or with config.data.unit "case" the first slide of each training case.
    """

    cohort: Cohort
    slides: StoredSlides
    tiling: TilingParams
    normaliser: StainNormaliser | None
    feed: Feed
    training_units: Cohort


@dataclass(frozen=True)
class Plan:
    """The parts of a run, without its compiled step. The model's parameters are on the host.

    `encoder_sha256` is the SHA-256 of the file of the published encoder's weights; None without one.
    """

    config: ConfigDict
    mesh: Mesh
    data: RunData
    model: MILModel
    optimizer: optax.GradientTransformation
    tasks: Tasks | None
    mining: Mining | None
    encoder_sha256: str | None


def plan_run(config: ConfigDict) -> Plan:
    """Checks the config against the cohort, the store and the devices, and builds the parts of a run.

    Writes nothing. Raises InputError.
    """
    check_config(config)
    check_tasks(config)
    cohort = training_cohort(config)
    stores = open_stores(config.data.store, cohort, not config.data.features, config.data.magnifications)
    for sentence in quality_sentences(cohort.rows, stores):
        log.info(sentence)
    config = _with_embedded_magnifications(_with_imported_features(config, stores), stores)
    use_compilation_cache()
    mesh = device_mesh(config)
    data = _run_data(config, cohort, stores, mesh)
    model = model_of_seed(config, data, config.seed)
    encoder_sha256 = _load_published(model, config, data.slides)
    if config.model.standardise:
        set_feature_statistics(model, data.slides.split("train"))
    # Without a frozen parameter, the optimiser's state has the form that earlier checkpoints have.
    frozen = partial(is_frozen, config.model.frozen) if encoder_sha256 or config.model.standardise else None
    tasks = open_tasks(config, data.feed.reader.tile_labels, data.feed.reader.stains)
    if tasks:
        add_heads(model, tasks, config.seed)
    optimizer = build_optimizer(config.optimizer, config.train.steps, frozen)
    mining = start_mining(config.data, len(data.training_units.rows))
    return Plan(config, mesh, data, on_host(model), optimizer, tasks, mining, encoder_sha256)


def model_of_seed(config: ConfigDict, data: RunData, seed: int) -> MILModel:
    """The model with parameters sampled from a seed. A published encoder has no values yet (`load_published`)."""
    build = build_unloaded if has_published_encoder(config.model) else build_model
    return build(config.model, len(data.cohort.classes), seed, data.tiling.factors)


def set_feature_statistics(model: MILModel, training: StoredSlides) -> None:
    """Sets the statistics that the model standardises features by: those of regions spread over each training slide."""

    def valid_features() -> Iterator[Float[np.ndarray, "_ feature"]]:
        for store, reader in zip(training.stores, training.features, strict=True):
            regions = np.flatnonzero(store.mask.any(axis=1))
            regions = regions[:: max(1, len(regions) // _STATISTICS_REGIONS)]
            yield reader.read(regions)[store.mask[regions]]

    assert isinstance(model.encoder, StoredEncoder)
    assert model.encoder.standardiser
    mean, inverse_deviation = column_statistics(valid_features())
    if constant := int((inverse_deviation == 0).sum()):
        log.info(f"{constant} of {len(mean)} features have one value in all training slides, and are ignored")
    model.encoder.standardiser.set_statistics(mean, inverse_deviation)


def fit_step(plan: Plan, run: Path) -> tuple[jax.stages.Compiled, Budget, MicroBatches]:
    """Compiles the step with the fewest micro-batches that fit the devices (`fitting_step`). Raises InputError."""
    model, optimizer, config, mesh = plan.model, plan.optimizer, plan.config, plan.mesh
    build = partial(build_step, model, optimizer, mesh=mesh, normaliser=plan.data.normaliser, tasks=plan.tasks)
    state = abstract_state(model, optimizer, config, mesh, plan.mining)
    return fitting_step(build, config, mesh, state, plan.data.feed.shapes(), run)


def build_for_mesh(plan: Plan, micro_batches: MicroBatches, mesh: Mesh) -> Any:
    """The jitted step of a run for another mesh than its own."""
    config = plan.config.copy_and_resolve_references()
    config.train.micro_batches = micro_batches.count
    # The same parameters in a model of its own, whose attributes `build_step` sets for the mesh.
    model = nnx.merge(*nnx.split(plan.model))
    return build_step(model, plan.optimizer, config, mesh, plan.data.normaliser, plan.tasks)


def on_host(model: MILModel) -> MILModel:
    """Moves the model's parameters to the host, so that the training state has the only copy on the devices."""
    # np.array copies; on a CPU, np.asarray would be a view that keeps the device's memory allocated.
    nnx.update(model, jax.tree.map(np.array, nnx.state(model)))
    return model


def _run_data(config: ConfigDict, cohort: Cohort, stores: list[TileStore], mesh: Mesh) -> RunData:
    magnifications = config.data.magnifications
    # Again, since only some magnifications may have features.
    for store in stores:
        store.see(magnifications)
    features = open_features(stores, config.model.encoder, magnifications) if config.data.features else []
    slides = StoredSlides(cohort, stores, features)
    normaliser = stain_normaliser(config.stain.method, config.stain.reference, config.data.store)
    training_units = rows_by_unit(config.data.unit, cohort.split("train"))
    if config.model.head == BY_DENSITY:
        check_bags(len(training_units.rows), len(rows_by_unit(config.data.unit, cohort.split("val")).rows))
    feed = open_feed(slides.split("train"), config, mesh, normaliser)
    return RunData(cohort, slides, stores[0].params, normaliser, feed, training_units)


def _load_published(model: MILModel, config: ConfigDict, slides: StoredSlides) -> str | None:
    """Loads a published encoder's weights into the model, and returns the SHA-256 of their file; None without one."""
    if not has_published_encoder(config.model):
        return None
    sha256 = load_published(model, config.model)
    log.info(f"{config.model.weights}: SHA-256 {sha256}")
    if config.data.features:
        _check_features(config, slides.features[0], sha256)
    return sha256


def training_cohort(config: ConfigDict) -> Cohort:
    """The labelled slides of the training and validation cases. Slides that tiling refused are left out.

    Logs the refused slides, the summary of the others and its warnings. Raises InputError for a cohort that training cannot
    use.
    """
    cohort = divide(load_cohort(config.data.cohort, config.data.classes, config.data.label), config.data)
    # After the division, so that a refused slide changes no other case's split.
    cohort, refusals = without_refused(cohort, config.data.store)
    for sentence in refusals:
        log.warning(f"{config.data.cohort}: {sentence}")
    hashes = content_hashes(config.data.store, cohort.rows)
    summary = summarise_cohort(cohort, hashes, needs_validation=config.data.val_fraction > 0)
    log.info(str(summary))
    for warning in summary.warnings:
        log.warning(f"{config.data.cohort}: {warning}")
    if summary.problems:
        raise InputError(f"{config.data.cohort}: {'; '.join(summary.problems)}")
    return replace(cohort, rows=tuple(row for row in cohort.rows if row.label and row.split in ("train", "val")))


def _with_imported_features(config: ConfigDict, stores: Sequence[TileStore]) -> ConfigDict:
    """The config with the width of imported features in config.model.imported_features; 0 if it trains on other features.

    The weights that made imported features are unknown, so that the model has no encoder for them.
    """
    config = config.copy_and_resolve_references()
    config.model.imported_features = 0
    if not config.data.features:
        return config
    name = config.model.encoder
    if "imported" not in (feature_attributes(config.data.store, stores[0].slide_id, name) or {}):
        if name not in PRETRAINED or not config.model.frozen:
            raise InputError(
                "config.data.features needs a config.model.encoder of docs/encoders.md with config.model.frozen, or the name of "
                f"imported features; {stores[0].path} has no imported features {name}"
            )
        return config
    if config.model.weights:
        raise InputError(
            f"config.model.weights must be empty with the imported features {name}, whose weights are unknown, got "
            f"{config.model.weights}; leave it empty, or embed the slides with this file"
        )
    config.model.imported_features = FeatureReader(config.data.store, stores[0].slide_id, name).width
    return config


def _with_embedded_magnifications(config: ConfigDict, stores: Sequence[TileStore]) -> ConfigDict:
    """The config with the magnifications that have features, if not all have, so that prediction uses the same."""
    if config.data.features and not config.data.magnifications:
        config.data.magnifications = featured(stores, config.model.encoder)
    return config


def _check_features(config: ConfigDict, features: FeatureReader, sha256: str) -> None:
    """Raises InputError for features by other weights than the run's, which prediction computes features with."""
    if features.attributes.get("weights_sha256") != sha256:
        raise InputError(f"{features.path}: was made with other weights than {config.model.weights}; embed with these")


def batch_norm_message(config: ConfigDict, micro_batches: int) -> str:
    """The tiles that BatchNorm statistics are computed over, for the log."""
    regions = config.data.regions_per_bag // -(-config.data.regions_per_bag // config.model.encode_regions)
    bags = config.data.batch_size // micro_batches
    message = f"batch norms compute statistics over {bags} bags x {regions} regions at a time"
    if micro_batches > config.train.micro_batches:
        message += (
            f": memory does not suffice for config.train.micro_batches {config.train.micro_batches}, and statistics over "
            f"{micro_batches} micro-batches change the training beyond rounding"
        )
    return message
