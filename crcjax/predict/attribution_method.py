"""The names of the methods of attribution, and attention, the method that needs no model; this module needs no JAX."""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Float

from crcjax.models.prediction import Prediction

Method = Literal["attention", "gradient", "occlusion", "region_occlusion"]


def attention_for(prediction: Prediction, target: int) -> Float[np.ndarray, "region slot"]:
    """Attention for a class: that of the class's branch if the aggregator has one per class, otherwise the mean over branches.

    Args:
      prediction: the prediction of a single bag.
      target: the index of the class.
    """
    maps = np.asarray(prediction.class_attention[0])
    classes = prediction.logits.shape[-1]
    return maps[..., target] if maps.shape[-1] == classes else maps.mean(axis=-1)
