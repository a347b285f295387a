"""Attribution: the contribution of each instance of a bag to a class, by attention, gradients or occlusion.

Attention shows where a model looked, not why. In a model whose instances attend to each other, attention may lie on an
instance that is not the evidence (Jain and Wallace 2019). Gradients and occlusion are valid for every aggregator.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float32, Int

from crcjax.models.mil import MILModel, Params
from crcjax.predict.attribution_method import Method

# Points on the path of integrated gradients.
_PATH_POINTS = 32

Features = Float32[Array, "region slot feature"]
Mask = Bool[Array, "region slot"]
Score = Callable[[Features, Mask], Float32[Array, "*class"]]


def attributor(model: MILModel, method: Method) -> Callable[..., Float32[Array, "region slot class"]]:
    """Returns a jitted function that attributes the log-odds of every class to the instances of one bag.

    Args:
      model: the model; its parameters are not used.
      method: any method except "attention", for which `attention_for` needs no further computation.

    Returns:
      A function of (params, features, mask, position) that returns log-odds (nats) by region, slot and class.
    """
    graph = nnx.graphdef(model)

    def attribute(
        params: Params, features: Features, mask: Mask, position: Float32[Array, "region 2"]
    ) -> Float32[Array, "region slot class"]:
        def score(features: Features, mask: Mask) -> Float32[Array, " class"]:
            prediction = nnx.merge(graph, params).pool(features[None], mask[None], position[None])
            # An evidential head's probabilities are no softmax of the logits; they are the softmax of their own logarithms.
            scores = jnp.asarray(prediction.logits if prediction.alpha is None else jnp.log(prediction.probs))[0]
            return jax.vmap(lambda target: log_odds(scores, target))(jnp.arange(len(scores)))

        if method == "gradient":
            classes = jax.eval_shape(score, features, mask).shape[0]
            by_class = jax.lax.map(
                lambda target: integrated_gradients(lambda *bag: score(*bag)[target], features, mask),
                jnp.arange(classes),
            )
            return jnp.moveaxis(by_class, 0, -1)
        # Without an instance, the scores of all classes come from one forward pass.
        return (occlusion if method == "occlusion" else region_occlusion)(score, features, mask)

    return jax.jit(attribute)


def log_odds(logits: Float32[Array, " class"], target: Int[Array, ""] | int) -> Float32[Array, ""]:
    """The logit of a class minus the log-sum-exp of the other logits, in nats.

    Unlike that of the probability, its gradient does not vanish where the class is almost certain.
    """
    others = jnp.where(jnp.arange(len(logits)) == target, -jnp.inf, logits)
    return logits[target] - jax.nn.logsumexp(others)


def integrated_gradients(
    score: Callable[[Features, Mask], Float32[Array, ""]], features: Features, mask: Mask
) -> Float32[Array, "region slot"]:
    """Integrated gradients of a single score (Sundararajan et al. 2017, equation 3), by the midpoint rule.

    The path runs from a bag in which every instance is the bag's mean instance to the bag itself. The attributions sum to
    the score minus the score of the bag of mean instances.
    """
    valid = mask[..., None]
    mean = (features * valid).sum(axis=(0, 1)) / jnp.maximum(valid.sum(), 1)
    displacement = jnp.where(valid, features - mean, 0.0)

    def gradient_at(fraction: Float32[Array, ""]) -> Float32[Array, "region slot"]:
        point = features - (1.0 - fraction) * displacement
        return (jax.grad(score)(point, mask) * displacement).sum(axis=-1)

    return jax.lax.map(gradient_at, (jnp.arange(_PATH_POINTS) + 0.5) / _PATH_POINTS).mean(axis=0)


def occlusion(score: Score, features: Features, mask: Mask) -> Float32[Array, "region slot *class"]:
    """The drop of each score when one instance is masked (Zeiler and Fergus 2014); one forward pass per instance."""
    drops = _score_drops(lambda instances: score(features, instances.reshape(mask.shape)), mask.reshape(-1, 1))
    return drops.reshape(*mask.shape, *drops.shape[1:])


def region_occlusion(score: Score, features: Features, mask: Mask) -> Float32[Array, "region slot *class"]:
    """The drop of each score when one region is masked, divided equally among its instances; one forward pass per region.

    Where neighbouring instances carry the same information, masking only one of them hardly lowers the score.
    """
    drops = _score_drops(lambda instances: score(features, instances), mask)
    valid = mask.reshape(*mask.shape, *(1,) * (drops.ndim - 1))
    return jnp.where(valid, (drops.T / jnp.maximum(mask.sum(axis=1), 1)).T[:, None], 0.0)


def _score_drops(
    score: Callable[[Bool[Array, "group instance"]], Float32[Array, "*class"]], mask: Bool[Array, "group instance"]
) -> Float32[Array, "group *class"]:
    """The drop of a mask's scores without each group of instances; zero for groups without a valid instance."""
    has_instances = mask.any(axis=1)
    # Groups with instances come first, so that the loop ends after them.
    order = jnp.argsort(~has_instances, stable=True)
    full_score = score(mask)

    def mask_group(i: Int[Array, ""], drops: Float32[Array, "group *class"]) -> Float32[Array, "group *class"]:
        return drops.at[order[i]].set(full_score - score(mask.at[order[i]].set(False)))

    return jax.lax.fori_loop(0, has_instances.sum(), mask_group, jnp.zeros((len(mask), *full_score.shape)))
