"""One trained model of an ensemble on the devices, and what the members of an ensemble predict together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Array, Float, Float32

from crcjax.errors import InputError
from crcjax.models.encoders.registry import has_published_encoder
from crcjax.models.mil import Prediction, abstract_model, combine
from crcjax.parallel.compilation_cache import use_compilation_cache
from crcjax.parallel.mesh import local_mesh, replicated
from crcjax.predict.attribution import Method, attention_for, attributor
from crcjax.predict.feature_density import density_of, summary
from crcjax.predict.forward import EncodedBag, Forward
from crcjax.runs.trained_model import TrainedModel, model_id_of, model_of_run


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

    def pool(self, bag: EncodedBag, key: Array | None = None) -> Prediction:
        """Predicts one bag, its evidence scaled if the run has a feature density. With a key, dropout is active."""
        prediction = self.forward.pool(self.params, *bag, key)
        return self._density.scale_evidence(prediction, summary(*bag[:2])[None]) if self._density else prediction

    def attribution(self, bag: EncodedBag) -> Float32[np.ndarray, "region slot class"]:
        """The contribution of each instance to every class (nats), by gradients or occlusion."""
        assert self.attribute is not None
        padded = (array[0] for array in self.forward.padded(*bag))
        return np.asarray(self.attribute(self.params, *padded))[: len(bag[0])]


def pool_bag(
    members: Sequence[Member], bags: Sequence[EncodedBag], method: Method, keys: Sequence[Array | None] = (None,)
) -> tuple[Prediction, Float[np.ndarray, "region slot map"]]:
    """Predicts one bag with an ensemble, and attributes the classes to its instances.

    Args:
      members: the ensemble members.
      bags: the bag as encoded by each member.
      method: the method of the attribution.
      keys: every member predicts once per key with dropout; the key None predicts without.

    Returns:
      The combined prediction, and the attribution averaged over the members: one map for each class, or with the method
      "attention" a single map, the attention for the predicted class.
    """
    member_bags = list(zip(members, bags, strict=True))
    combined = combine([member.pool(bag, key) for member, bag in member_bags for key in keys])
    if method == "attention":
        return combined, attention_for(combined, int(np.argmax(combined.probs[0])))[..., None]
    return combined, np.mean([member.attribution(bag) for member, bag in member_bags], axis=0)


def split_by_slide(
    prediction: Prediction, attribution: Float[np.ndarray, "region slot map"], regions: Sequence[int]
) -> Iterator[tuple[Prediction, Float[np.ndarray, "_ slot map"]]]:
    """Splits the attention and attribution of a bag by slide; everything else of the prediction is shared.

    Args:
      prediction: the prediction of one bag.
      attribution: the attribution of the bag.
      regions: the number of regions of each slide.
    """
    ends = np.cumsum(regions)
    for count, end in zip(regions, ends, strict=True):
        rows = slice(end - count, end)
        slide_prediction = replace(
            prediction,
            region_attention=prediction.region_attention[:, rows],
            slot_attention=prediction.slot_attention[:, rows],
            class_attention=prediction.class_attention[:, rows],
        )
        yield slide_prediction, attribution[rows]


def dropout_keys(models: Sequence[TrainedModel], samples: int) -> list[Array | None]:
    """The keys of `samples` predictions with dropout by each model, or [None] for one prediction without.

    Raises InputError if the models were trained without dropout.
    """
    if samples and not models[0].config.model.dropout:
        raise InputError(f"{models[0].path}: was trained without dropout; predict without --dropout-samples")
    return [jax.random.fold_in(jax.random.key(0), sample) for sample in range(samples)] or [None]
