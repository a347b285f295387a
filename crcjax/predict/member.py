"""One trained model of an ensemble on the devices, and the loading of an ensemble that JAX runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float32, UInt8

from crcjax.errors import InputError
from crcjax.models.encoders.registry import has_published_encoder
from crcjax.models.mil import abstract_model
from crcjax.models.prediction import Prediction
from crcjax.parallel.compilation_cache import use_compilation_cache
from crcjax.parallel.mesh import local_mesh, replicated
from crcjax.predict.attribution import attributor
from crcjax.predict.attribution_method import Method
from crcjax.predict.ensemble import EncodedBag, Ensemble
from crcjax.predict.feature_density import density_of, summary
from crcjax.predict.forward import Forward, by_region
from crcjax.runs.ensemble_id import ensemble_id
from crcjax.runs.trained_model import TrainedModel, check_ensemble, model_id_of, model_of_run, split_by
from crcjax.slides.stain.methods import StainEstimate
from crcjax.slides.tiling.plan import TilePlan
from crcjax.slides.wsi.slide import Slide


def opened_models(models: Sequence[str | Path | TrainedModel]) -> list[TrainedModel]:
    """Opens run directories; models that are open already stay as they are. Raises InputError."""
    return [model if isinstance(model, TrainedModel) else model_of_run(model) for model in models]


class Member:
    """One trained model, an ensemble member, with its parameters on the devices.

    Args:
      trained: the model.
      attribution: the method of `attribution`.
      stored: whether the bags hold stored features of a published encoder in place of pixels.

    Raises:
      InputError: the model cannot be read, or its published encoder's weights are needed and not known.
    """

    def __init__(self, trained: TrainedModel, attribution: Method, stored: bool = False):
        use_compilation_cache()
        config = trained.config
        model = abstract_model(config.model, len(config.data.classes), trained.tiling.factors)
        # Stored features need no encoder, and a bundle, which records the id, may be opened without its weights.
        without_encoder = stored and bool(trained.model_id) and has_published_encoder(config.model)
        if without_encoder:
            del model.encoder.published  # type: ignore[attr-defined]
        params, arrays = trained.restore(model), trained.density() if trained.density else None
        self._density = density_of(arrays, trained.path) if arrays else None
        self.model_id = trained.model_id if without_encoder else model_id_of(params, arrays)
        if trained.model_id and self.model_id != trained.model_id:
            raise InputError(
                f"{trained.path}: its parameters are of model {self.model_id}, and it states {trained.model_id}; export it again"
            )
        mesh = local_mesh()
        self.forward = Forward(
            model, config.data.region_buckets, config.data.regions_per_bag, mesh, trained.normaliser, stored
        )
        self.params = jax.device_put(params, replicated(mesh))
        self.attribute = None if attribution == "attention" else attributor(model, attribution)

    @property
    def feature_size(self) -> int:
        """The number of features of a tile."""
        return self.params["norm"]["bias"].size

    @property
    def chunk(self) -> int:
        """Regions that are encoded at a time."""
        return self.forward.chunk

    def halve(self, chunk: int) -> bool:
        """As `Forward.halve`."""
        return self.forward.halve(chunk)

    def compile_ahead(self, regions: int, tile_shape: tuple[int, ...], stain: StainEstimate | None) -> None:
        """As `Forward.compile_ahead`."""
        self.forward.compile_ahead(self.params, regions, tile_shape, self.feature_size, stain)

    def stain_of(self, slide: Slide, plan: TilePlan) -> StainEstimate | None:
        """The slide's stain estimate; None without stain normalisation. Raises SlideError."""
        return self.forward.normaliser.of_slide(slide, plan) if self.forward.normaliser else None

    def encode(
        self,
        pixels: UInt8[np.ndarray, "region slot y x 3"],
        stains: Sequence[StainEstimate | None],
        counts: Sequence[int],
    ) -> Array:
        """Starts the encoding of at most `chunk` regions; arguments as for `EnsembleMember.encode`."""
        return self.forward.encode(self.params, pixels, by_region(stains, counts))

    def pool(self, bag: EncodedBag, key: Array | None = None) -> Prediction:
        """Predicts one bag, its evidence scaled if the run has a feature density. With a key, dropout is active."""
        prediction = self.forward.pool(self.params, *bag, key)
        return self._density.scale_evidence(prediction, summary(*bag[:2])[None]) if self._density else prediction

    def attribution(self, bag: EncodedBag) -> Float32[np.ndarray, "region slot class"]:
        """The contribution of each instance to every class (nats), by gradients or occlusion."""
        assert self.attribute is not None
        padded = (array[0] for array in self.forward.padded(*bag))
        return np.asarray(self.attribute(self.params, *padded))[: len(bag[0])]


def load_ensemble(models: Sequence[str | Path | TrainedModel], dropout_samples: int, attribution: Method) -> Ensemble:
    """Loads the models that are to predict slide files together; arguments and errors as for `Predictor`."""
    opened = opened_models(models)
    for model in opened:
        if model.config.model.imported_features:
            raise InputError(
                f"{model.path}: was trained on imported features, and the weights of {model.config.model.encoder} are unknown; "
                "import the features of the slides into a store, and predict that with --store"
            )
    check_ensemble(opened)
    keys = dropout_keys(opened, dropout_samples)
    members = [Member(model, attribution) for model in opened]
    data = opened[0].config.data
    return Ensemble(
        opened,
        members,
        keys,
        ensemble_id((member.model_id for member in members), dropout_samples),
        opened[0].bundle_id,
        opened[0].tiling,
        data.magnifications and tuple(data.magnifications),
        tuple(data.classes),
        data.label,
        data.unit,
        split_by(opened),
        settings_of(opened, dropout_samples),
    )


def settings_of(models: Sequence[TrainedModel], dropout_samples: int) -> dict[str, Any]:
    """What decides a prediction besides parameters, code, calibration and slide, as JSON values (see `pipeline_id`)."""
    data = models[0].config.data
    return {
        "tiling": models[0].tiling.to_json(),
        "magnifications": list(data.magnifications or ()),
        "unit": data.unit,
        "stain": [model.normaliser.to_json() if model.normaliser else None for model in models],
        "dropout samples": dropout_samples,
    }


def dropout_keys(models: Sequence[TrainedModel], samples: int) -> list[Array | None]:
    """The keys of `samples` predictions with dropout by each model, or [None] for one prediction without.

    Raises InputError if the models were trained without dropout.
    """
    if samples and not models[0].config.model.dropout:
        raise InputError(f"{models[0].path}: was trained without dropout; predict without --dropout-samples")
    return [jax.random.fold_in(jax.random.key(0), sample) for sample in range(samples)] or [None]
