"""MIL aggregators, which pool a bag's instances to logits and attention; some add an instance loss in training.

Masked instances have no influence, the order of instances does not matter, and a bag may have a single instance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int
from ml_collections import ConfigDict

from crcjax.models.attention import AttentionScores, masked_softmax
from crcjax.models.linear import Linear
from crcjax.models.maximum import maximum_along


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Instances:
    """Bags of instances; `position` is each instance's (x, y) in sides of a region. The slots of a region are adjacent."""

    features: Float[Array, "batch instance feature"]
    mask: Bool[Array, "batch instance"]
    position: Float32[Array, "batch instance 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pooled:
    """The output of an aggregator for each bag.

    `attention` has one map per branch: a single branch, or one per class. Each map sums to one over a bag and is zero where
    the mask is False. `instance_loss` is the aggregator's loss on instances, zero if it has none or there are no labels.
    """

    logits: Float32[Array, "batch class"]
    embedding: Float32[Array, "batch embedding"]
    attention: Float32[Array, "batch instance branch"]
    instance_loss: Float32[Array, " batch"]


@runtime_checkable
class Aggregator(Protocol):
    """The signature of all aggregators; with labels, they compute the instance loss."""

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled: ...


class MeanPool(nnx.Module):
    """Mean of the instances and a linear classifier."""

    def __init__(self, config: ConfigDict, classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.classify = nnx.Linear(config.features, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        count = jnp.maximum(bag.mask.sum(axis=1, keepdims=True), 1)
        return _weighted(bag, (bag.mask / count)[..., None], self.classify)


class MaxPool(nnx.Module):
    """Maximum of every feature and a linear classifier; attention is the share of features whose maximum an instance has."""

    def __init__(self, config: ConfigDict, classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.classify = nnx.Linear(config.features, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        values, valid = bag.features.astype(jnp.float32), bag.mask[..., None]
        # XLA's CPU code takes 20 times as long for jnp.where as for the sum, which it fuses with the maximum.
        largest = maximum_along(values + jnp.where(valid, 0.0, -jnp.inf), 1)
        has_maximum = (valid & (values == largest[:, None])).astype(jnp.float32)
        shares = (has_maximum / jnp.maximum(has_maximum.sum(axis=1, keepdims=True), 1.0)).mean(axis=-1, keepdims=True)
        embedding = jnp.where(bag.mask.any(axis=1)[:, None], largest, 0.0)
        return Pooled(self.classify(embedding), embedding, shares, jnp.zeros(embedding.shape[0]))


class ABMIL(nnx.Module):
    """Attention pooling (Ilse et al. 2018, equation 8; 9 with `gated`) and a linear classifier."""

    def __init__(self, config: ConfigDict, classes: int, *, gated: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.score = AttentionScores(config.features, config.attention, 1, gated=gated, dtype=dtype, rngs=rngs)
        self.classify = nnx.Linear(config.features, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        return _weighted(bag, masked_softmax(self.score(bag.features), bag.mask), self.classify)


class CLAM(nnx.Module):
    """Clustering-constrained attention (Lu et al. 2021) with one attention branch (SB) or one per class (MB).

    Each class has a binary instance classifier. For the bag's class, the k most attended instances are its positive and the
    k least attended its negative examples. For every other class, whose evidence must be absent, the k most attended
    instances are negative examples. The instance loss is the smooth top-1 SVM with tau 1, averaged over classes. k is at most
    half of the bag, so that no instance is both. The published weights of bag loss and instance loss, 0.7 and 0.3, correspond
    to config.train.instance_weight = 0.3 / 0.7.
    """

    def __init__(self, config: ConfigDict, classes: int, *, multibranch: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        branches = classes if multibranch else 1
        self.k = config.clam_instances
        self.compress = Linear(config.features, config.features, dtype=dtype, rngs=rngs)
        self.score = AttentionScores(config.features, config.attention, branches, gated=True, dtype=dtype, rngs=rngs)
        self.classify = nnx.Linear(config.features, classes, rngs=rngs)
        # Class by class: the scores of negative and of positive.
        self.judge = Linear(config.features, 2 * classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        features = jax.nn.relu(self.compress(bag.features)).astype(jnp.float32)
        scores = self.score(features)
        attention = masked_softmax(scores, bag.mask)
        embeddings = jnp.einsum("bnk,bnf->bkf", attention, features)
        if attention.shape[-1] == 1:
            logits = self.classify(embeddings[:, 0])
        else:
            # The logit of a class uses the branch of that class only.
            logits = jnp.einsum("bkk->bk", self.classify(embeddings))
        loss = jnp.zeros(logits.shape[0]) if label is None else self._instance_loss(features, scores, bag.mask, label)
        return Pooled(logits, embeddings.mean(axis=1), attention, loss)

    def _instance_loss(
        self,
        features: Float32[Array, "batch instance feature"],
        scores: Float32[Array, "batch instance branch"],
        mask: Bool[Array, "batch instance"],
        label: Int[Array, " batch"],
    ) -> Float32[Array, " batch"]:
        instance_scores = self.judge(features).reshape(*mask.shape, -1, 2)
        classes = instance_scores.shape[2]
        count = mask.sum(axis=1)
        k = jnp.minimum(self.k, jnp.maximum(count // 2, 1))[:, None, None]
        valid = mask[..., None]
        most_attended = _rank(jnp.where(valid, -scores, jnp.inf)) < k
        least_attended = (_rank(jnp.where(valid, scores, jnp.inf)) < k) & (count > 1)[:, None, None]
        most_attended, least_attended = most_attended & valid, least_attended & valid
        is_label = jax.nn.one_hot(label, classes, dtype=bool)
        negative = _smooth_svm(instance_scores, positive=False)
        positive = _smooth_svm(instance_scores, positive=True)
        label_sum = (jnp.where(most_attended, positive, 0) + jnp.where(least_attended, negative, 0)).sum(axis=1)
        label_loss = label_sum / jnp.maximum((most_attended.sum(axis=1) + least_attended.sum(axis=1)), 1)
        other_sum = jnp.where(most_attended, negative, 0).sum(axis=1)
        other_loss = other_sum / jnp.maximum(most_attended.sum(axis=1), 1)
        return jnp.where(is_label, label_loss, other_loss).mean(axis=-1)


class DSMIL(nnx.Module):
    """Dual-stream MIL (Li et al. 2021).

    The first stream is the highest instance logit of each class; the second attends by similarity to that instance. The
    logits are the mean of the streams, as published for prediction. The instance loss is the cross-entropy of the first
    stream. Li et al. train the mean of both cross-entropies instead (docs/models.md).
    """

    def __init__(self, config: ConfigDict, classes: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        width, hidden = config.features, config.attention
        self.instance = Linear(width, classes, rngs=rngs)
        self.query = nnx.List(
            [Linear(width, hidden, dtype=dtype, rngs=rngs), Linear(hidden, hidden, dtype=dtype, rngs=rngs)]
        )
        # The convolution over the class embeddings in the paper.
        self.bag = nnx.Linear(classes * width, classes, rngs=rngs)

    def __call__(self, bag: Instances, label: Int[Array, " batch"] | None = None) -> Pooled:
        values = bag.features.astype(jnp.float32)
        by_instance = jnp.where(bag.mask[..., None], self.instance(values), -jnp.inf)
        critical = by_instance.argmax(axis=1)
        highest = jnp.where(bag.mask.any(axis=1)[:, None], maximum_along(by_instance, 1), 0.0)
        query = jnp.tanh(self.query[1](jax.nn.relu(self.query[0](bag.features)))).astype(jnp.float32)
        critical_query = jnp.take_along_axis(query, critical[..., None], axis=1)
        scores = jnp.einsum("bnh,bkh->bnk", query, critical_query) / jnp.sqrt(query.shape[-1])
        attention = masked_softmax(scores, bag.mask)
        embeddings = jnp.einsum("bnk,bnf->bkf", attention, values)
        logits = (highest + self.bag(embeddings.reshape(embeddings.shape[0], -1))) / 2
        loss = jnp.zeros(logits.shape[0]) if label is None else _cross_entropy(highest, label)
        return Pooled(logits, embeddings.mean(axis=1), attention, loss)


def _weighted(bag: Instances, attention: Float32[Array, "batch instance 1"], classify: nnx.Linear) -> Pooled:
    embedding = jnp.einsum("bnk,bnf->bf", attention, bag.features.astype(jnp.float32))
    return Pooled(classify(embedding), embedding, attention, jnp.zeros(embedding.shape[0]))


def _rank(scores: Float32[Array, "batch instance branch"]) -> Int[Array, "batch instance branch"]:
    """The place of each instance in ascending order of its score."""
    return jnp.argsort(jnp.argsort(scores, axis=1), axis=1)


def _smooth_svm(
    scores: Float32[Array, "batch instance class 2"], positive: bool
) -> Float32[Array, "batch instance class"]:
    """Smooth top-1 SVM with margin 1 and tau 1 (Berrada et al. 2018, equation 11, for two classes)."""
    target_score, other_score = scores[..., int(positive)], scores[..., int(not positive)]
    return jax.nn.softplus(other_score + 1.0 - target_score)


def _cross_entropy(logits: Float32[Array, "batch class"], label: Int[Array, " batch"]) -> Float32[Array, " batch"]:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
