"""Losses: pure functions in float32. Logarithmic losses are in nats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float, Float32, Int
from ml_collections import ConfigDict

from crcjax.models.prediction import Prediction


def bag_losses(
    prediction: Prediction, label: Int[Array, " batch"], step: Int[Array, ""] | int, config: ConfigDict
) -> Float32[Array, " batch"]:
    """Each bag's loss by `config` (config.train), with its instance loss."""
    logits = jnp.asarray(prediction.logits)
    target = jax.nn.one_hot(label, logits.shape[-1])
    if prediction.alpha is None:
        smoothed = optax.smooth_labels(target, config.label_smoothing)
        losses = focal(logits, smoothed, config.focal_gamma if config.loss == "focal" else 0.0)
    else:
        alpha, kl_weight = jnp.asarray(prediction.alpha), jnp.minimum(1.0, step / max(1, config.annealing_steps))
        losses = evidential(alpha, target, digamma_form=config.loss == "evidential_digamma")
        losses = losses + kl_weight * misleading_evidence(alpha, target)
    return losses + config.instance_weight * prediction.instance_loss


def weighted_mean(losses: Float32[Array, " batch"], weight: Float[Array, " batch"]) -> Float32[Array, ""]:
    """The weighted mean; 0 if all weights are 0."""
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def supervised_contrastive(
    embedding: Float32[Array, "batch embedding"],
    label: Int[Array, " batch"],
    temperature: float,
) -> Float32[Array, ""]:
    """Supervised contrastive loss of normalised embeddings (Khosla et al. 2020, equation 2).

    The mean is over the bags whose class occurs more than once in the batch; without such bags the loss is 0.
    """
    length = jnp.maximum(jnp.sqrt((embedding**2).sum(axis=-1, keepdims=True) + 1e-12), 1e-6)
    similarity = (embedding / length) @ (embedding / length).T / temperature
    is_other = ~jnp.eye(len(label), dtype=bool)
    log_prob = similarity - jax.nn.logsumexp(jnp.where(is_other, similarity, -jnp.inf), axis=-1, keepdims=True)
    is_positive = (label[:, None] == label) & is_other
    positives = is_positive.sum(axis=-1)
    losses = -jnp.where(is_positive, log_prob, 0.0).sum(axis=-1) / jnp.maximum(positives, 1)
    return weighted_mean(losses, (positives > 0).astype(jnp.float32))


def focal(
    logits: Float32[Array, "batch class"], target: Float32[Array, "batch class"], gamma: float
) -> Float32[Array, " batch"]:
    """Focal loss (Lin et al. 2017, equation 4) of a target distribution; with gamma 0, the cross-entropy."""
    log_probs = jax.nn.log_softmax(logits)
    weight = (1.0 - jnp.exp(log_probs)) ** gamma if gamma else 1.0
    return -(target * weight * log_probs).sum(axis=-1)


def evidential(
    alpha: Float32[Array, "batch class"], target: Float32[Array, "batch class"], *, digamma_form: bool
) -> Float32[Array, " batch"]:
    """The expected loss under the Dirichlet distribution (Sensoy et al. 2018).

    It is the expected squared error (equation 5), or with `digamma_form` the expected cross-entropy (equation 4).
    """
    strength = alpha.sum(axis=-1, keepdims=True)
    if digamma_form:
        return (target * (digamma(strength) - digamma(alpha))).sum(axis=-1)
    probs = alpha / strength
    return ((target - probs) ** 2 + probs * (1.0 - probs) / (strength + 1.0)).sum(axis=-1)


def misleading_evidence(
    alpha: Float32[Array, "batch class"], target: Float32[Array, "batch class"]
) -> Float32[Array, " batch"]:
    """The KL divergence of the predicted Dirichlet, without its evidence for the target, from the uniform Dirichlet.

    It penalises evidence for wrong classes (Sensoy et al. 2018).
    """
    misleading = target + (1.0 - target) * alpha
    strength = misleading.sum(axis=-1, keepdims=True)
    constant = gammaln(strength[:, 0]) - gammaln(jnp.float32(alpha.shape[-1])) - gammaln(misleading).sum(axis=-1)
    return constant + ((misleading - 1.0) * (digamma(misleading) - digamma(strength))).sum(axis=-1)
