"""Losses: pure functions, in float32, in nats where they are logarithms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import digamma, gammaln
from jaxtyping import Array, Float, Float32, Int
from ml_collections import ConfigDict

from crcjax.models.mil import Prediction


def bag_losses(
    prediction: Prediction, label: Int[Array, " batch"], step: Int[Array, ""] | int, config: ConfigDict
) -> Float32[Array, " batch"]:
    """Each bag's loss by `config` (config.train), its instance loss included."""
    logits = jnp.asarray(prediction.logits)
    target = jax.nn.one_hot(label, logits.shape[-1])
    if prediction.alpha is None:
        smoothed = optax.smooth_labels(target, config.label_smoothing)
        losses = focal(logits, smoothed, config.focal_gamma if config.loss == "focal" else 0.0)
    else:
        alpha, annealed = jnp.asarray(prediction.alpha), jnp.minimum(1.0, step / max(1, config.annealing_steps))
        losses = evidential(alpha, target, digamma_form=config.loss == "evidential_digamma")
        losses = losses + annealed * misleading_evidence(alpha, target)
    return losses + config.instance_weight * prediction.instance_loss


def weighted_mean(losses: Float32[Array, " batch"], weight: Float[Array, " batch"]) -> Float32[Array, ""]:
    """The mean with weights."""
    return (losses * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def supervised_contrastive(
    embedding: Float32[Array, "batch embedding"],
    label: Int[Array, " batch"],
    temperature: float,
) -> Float32[Array, ""]:
    """Supervised contrastive loss of normalised embeddings (Khosla et al. 2020, equation 2).

    The mean over the bags that have another one of their class in the batch; zero where none has.
    """
    length = jnp.maximum(jnp.sqrt((embedding**2).sum(axis=-1, keepdims=True) + 1e-12), 1e-6)
    near = (embedding / length) @ (embedding / length).T / temperature
    other = ~jnp.eye(len(label), dtype=bool)
    log_share = near - jax.nn.logsumexp(jnp.where(other, near, -jnp.inf), axis=-1, keepdims=True)
    positive = (label[:, None] == label) & other
    count = positive.sum(axis=-1)
    losses = -jnp.where(positive, log_share, 0.0).sum(axis=-1) / jnp.maximum(count, 1)
    return weighted_mean(losses, (count > 0).astype(jnp.float32))


def focal(
    logits: Float32[Array, "batch class"], target: Float32[Array, "batch class"], gamma: float
) -> Float32[Array, " batch"]:
    """Focal loss (Lin et al. 2017, equation 4) for a distribution as target; with gamma 0 the cross-entropy."""
    log_probs = jax.nn.log_softmax(logits)
    weight = (1.0 - jnp.exp(log_probs)) ** gamma if gamma else 1.0
    return -(target * weight * log_probs).sum(axis=-1)


def evidential(
    alpha: Float32[Array, "batch class"], target: Float32[Array, "batch class"], *, digamma_form: bool
) -> Float32[Array, " batch"]:
    """Expected loss under the Dirichlet (Sensoy et al. 2018): of the squares (equation 5), or of the logarithm (4)."""
    strength = alpha.sum(axis=-1, keepdims=True)
    if digamma_form:
        return (target * (digamma(strength) - digamma(alpha))).sum(axis=-1)
    probs = alpha / strength
    return ((target - probs) ** 2 + probs * (1.0 - probs) / (strength + 1.0)).sum(axis=-1)


def misleading_evidence(
    alpha: Float32[Array, "batch class"], target: Float32[Array, "batch class"]
) -> Float32[Array, " batch"]:
    """KL divergence of the Dirichlet without the evidence for the target from the uniform one (Sensoy et al. 2018)."""
    rest = target + (1.0 - target) * alpha
    strength = rest.sum(axis=-1, keepdims=True)
    constant = gammaln(strength[:, 0]) - gammaln(jnp.float32(alpha.shape[-1])) - gammaln(rest).sum(axis=-1)
    return constant + ((rest - 1.0) * (digamma(rest) - digamma(strength))).sum(axis=-1)
