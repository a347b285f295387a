"""An ensemble as prediction uses it, whatever runs its members: JAX or ONNX Runtime. This module needs no JAX."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Float32, UInt8

from crcjax.models.prediction import Prediction, combine
from crcjax.predict.attribution_method import Method, attention_for
from crcjax.slides.tiling.plan import TilePlan, TilingParams
from crcjax.slides.wsi.slide import Slide

# The features, mask and positions (x, y in sides of a region) of one bag.
EncodedBag = tuple[
    Float32[np.ndarray, "region slot feature"], Bool[np.ndarray, "region slot"], Float32[np.ndarray, "region 2"]
]
# A slide's stain estimate (`slides.stain.methods.StainEstimate`) for each member; None for a member that does not normalise.
SlideStains = Sequence[Any]


@runtime_checkable
class EnsembleMember(Protocol):
    """One trained model that is ready to predict.

    Attributes:
      model_id: the hash of its parameters.
      feature_size: the number of features of a tile.
      chunk: regions that it encodes at a time.
    """

    model_id: str

    @property
    def feature_size(self) -> int: ...

    @property
    def chunk(self) -> int: ...

    def halve(self, chunk: int) -> bool:
        """Makes chunks smaller than `chunk`, which did not fit the memory; False if they cannot be smaller."""

    def compile_ahead(self, regions: int, tile_shape: tuple[int, ...], stain: Any) -> None:
        """Prepares what a bag with this number of regions needs; other threads may encode meanwhile."""

    def stain_of(self, slide: Slide, plan: TilePlan) -> Any:
        """The slide's stain estimate; None if the model does not normalise stains. Raises SlideError."""

    def encode(self, pixels: UInt8[np.ndarray, "region slot y x 3"], stains: SlideStains, counts: Sequence[int]) -> Any:
        """Starts the encoding of at most `chunk` regions; NumPy waits for the result, whose first axis may be padded.

        Args:
          pixels: the tiles.
          stains: the stain estimate of each slide.
          counts: the number of regions of each slide, in their order.

        Raises:
          One of `memory_errors`.
        """

    def pool(self, bag: EncodedBag, key: Any = None) -> Prediction:
        """Predicts one bag. With a key, dropout is active."""

    def attribution(self, bag: EncodedBag) -> Float32[np.ndarray, "region slot class"]:
        """The contribution of each instance to every class (nats), by gradients or occlusion."""


@dataclass(frozen=True)
class Ensemble:
    """Models that predict together, and everything their predictions depend on besides the slides.

    Attributes:
      models: the opened models, from which another process can load the same ensemble.
      members: the models, ready to predict.
      keys: every member predicts once per key with dropout; the key None predicts without.
      model_id: the ensemble's id (`ensemble_id`).
      bundle_id: the bundle that the models are of; empty if they are of none.
      tiling: how the slides of the training were tiled.
      magnifications: those of the tiling that the models use; None for all.
      classes: the classes in the order of the probabilities.
      target: the name of the predicted property.
      unit: `slide` or `case`.
      split_of: the split, `train` or `val`, of a slide or case that a model was fitted or chosen on, by its id.
      settings: JSON values that identify everything else that decides a prediction (see `pipeline_id`).
    """

    models: Sequence[Any]
    members: Sequence[EnsembleMember]
    keys: Sequence[Any]
    model_id: str
    bundle_id: str
    tiling: TilingParams
    magnifications: tuple[str, ...] | None
    classes: tuple[str, ...]
    target: str
    unit: str
    split_of: Callable[[str], str]
    settings: Mapping[str, Any]


def memory_errors() -> tuple[type[Exception], ...]:
    """The errors of memory that ran out, on the host or on a device; JAX's, which may also be another fault of a device."""
    jax = sys.modules.get("jax")
    return (MemoryError, jax.errors.JaxRuntimeError) if jax else (MemoryError,)


def pool_bag(
    members: Sequence[EnsembleMember], bags: Sequence[EncodedBag], method: Method, keys: Sequence[Any] = (None,)
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
