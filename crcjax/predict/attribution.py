"""What each instance of a bag did for a class: attention, gradients, and what is lost without it.

Attention says where a model looked, not what for; in a model whose instances see each other it may lie on another instance
than the evidence (Jain and Wallace 2019). The other two hold for any aggregator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int

from crcjax.models.mil import MILModel, Params, Prediction

Method = Literal["attention", "gradient", "occlusion", "region_occlusion"]
METHODS: tuple[str, ...] = get_args(Method)
_STEPS = 32  # of the path of integrated gradients

Features = Float32[Array, "region slot feature"]
Mask = Bool[Array, "region slot"]
Score = Callable[[Features, Mask], Float32[Array, ""]]


def attention_for(prediction: Prediction, target: int) -> Float[np.ndarray, "region slot"]:
    """The attention of the class's own branch where the aggregator has one a class, else its mean, of a single bag."""
    maps = np.asarray(prediction.class_attention[0])
    classes = prediction.logits.shape[-1]
    return maps[..., target] if maps.shape[-1] == classes else maps.mean(axis=-1)


def attributor(model: MILModel, method: Method) -> Callable[..., Float32[Array, "region slot"]]:
    """The jitted map of params, one bag (features, mask, position) and a class: what each instance did for its log-odds."""
    graph = nnx.graphdef(model)
    of_score = {"gradient": integrated_gradients, "occlusion": occlusion, "region_occlusion": region_occlusion}[method]

    def attribute(
        params: Params,
        features: Features,
        mask: Mask,
        position: Float32[Array, "region 2"],
        target: Int[Array, ""] | int,
    ) -> Float32[Array, "region slot"]:
        def score(features: Features, mask: Mask) -> Float32[Array, ""]:
            prediction = nnx.merge(graph, params).pool(features[None], mask[None], position[None])
            # Evidence is no softmax of the logits: its probabilities are, of their logarithms.
            scores = prediction.logits if prediction.alpha is None else jnp.log(prediction.probs)
            return log_odds(scores[0], target)

        return of_score(score, features, mask)

    return jax.jit(attribute)


def log_odds(logits: Float32[Array, " class"], target: Int[Array, ""] | int) -> Float32[Array, ""]:
    """Logit of the class less the log-sum-exp of the others (nats): gradients do not vanish where it is all but certain."""
    others = jnp.where(jnp.arange(len(logits)) == target, -jnp.inf, logits)
    return logits[target] - jax.nn.logsumexp(others)


def integrated_gradients(score: Score, features: Features, mask: Mask) -> Float32[Array, "region slot"]:
    """Gradient of the score times displacement, along the line from the bag's mean instance everywhere to the bag.

    Sundararajan et al. 2017, equation 3, by the midpoint rule; they sum to the score less that of the mean instances.
    """
    valid = mask[..., None]
    mean = (features * valid).sum(axis=(0, 1)) / jnp.maximum(valid.sum(), 1)
    way = jnp.where(valid, features - mean, 0.0)

    def at(part: Float32[Array, ""]) -> Float32[Array, "region slot"]:
        return (jax.grad(score)(features - (1.0 - part) * way, mask) * way).sum(axis=-1)

    return jax.lax.map(at, (jnp.arange(_STEPS) + 0.5) / _STEPS).mean(axis=0)


def occlusion(score: Score, features: Features, mask: Mask) -> Float32[Array, "region slot"]:
    """What the score loses when an instance is masked (Zeiler and Fergus 2014), one pass of the bag an instance."""
    alone = mask.reshape(-1, 1)
    return _lost(lambda rest: score(features, rest.reshape(mask.shape)), alone).reshape(mask.shape)


def region_occlusion(score: Score, features: Features, mask: Mask) -> Float32[Array, "region slot"]:
    """What the score loses when a region is masked, in equal parts to its instances; one pass of the bag a region.

    Where neighbours say the same, the loss of one alone is small.
    """
    lost = _lost(lambda rest: score(features, rest), mask)
    return jnp.where(mask, (lost / jnp.maximum(mask.sum(axis=1), 1))[:, None], 0.0)


def _lost(
    score: Callable[[Bool[Array, "part instance"]], Float32[Array, ""]], mask: Bool[Array, "part instance"]
) -> Float32[Array, " part"]:
    """What a mask's score loses without each of its parts; zero of those that hold nothing."""
    region_valid = mask.any(axis=1)
    order = jnp.argsort(~region_valid, stable=True)  # those that are held come first
    whole = score(mask)

    def without(i: Int[Array, ""], lost: Float32[Array, " part"]) -> Float32[Array, " part"]:
        return lost.at[order[i]].set(whole - score(mask.at[order[i]].set(False)))

    return jax.lax.fori_loop(0, region_valid.sum(), without, jnp.zeros(len(mask)))
