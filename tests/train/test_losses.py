from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from crcjax.config import get_config
from crcjax.models.mil import build_model
from crcjax.train.losses import (
    bag_losses,
    evidential,
    focal,
    misleading_evidence,
    supervised_contrastive,
    weighted_mean,
)

LOGITS = jnp.array([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
TARGET = jnp.array([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
ALPHA = jnp.array([[5.0, 1.5, 2.0], [1.2, 9.0, 3.0]])


def test_focal_loss_with_gamma_zero_is_cross_entropy_and_otherwise_weighs_easy_bags_less() -> None:
    log_p = np.log(np.exp(LOGITS) / np.exp(LOGITS).sum(axis=1, keepdims=True))
    own = log_p[[0, 1], [0, 2]]
    np.testing.assert_allclose(focal(LOGITS, TARGET, 0.0), -own, rtol=1e-5)
    np.testing.assert_allclose(focal(LOGITS, TARGET, 2.0), -((1 - np.exp(own)) ** 2) * own, rtol=1e-5)


@pytest.mark.parametrize(
    ("digamma_form", "loss"),
    [(False, lambda p: ((np.asarray(TARGET)[:, None] - p) ** 2).sum(-1)), (True, None)],
)
def test_evidential_losses_are_expectations_under_the_dirichlet(digamma_form: bool, loss) -> None:
    rng = np.random.default_rng(0)
    samples = np.stack([rng.dirichlet(alpha, 400_000) for alpha in np.asarray(ALPHA, np.float64)])
    loss = loss or (lambda p: -(np.asarray(TARGET)[:, None] * np.log(p)).sum(-1))
    np.testing.assert_allclose(evidential(ALPHA, TARGET, digamma_form=digamma_form), loss(samples).mean(1), rtol=0.01)


def test_the_kl_term_depends_on_misleading_evidence_alone() -> None:
    actual = misleading_evidence(ALPHA, TARGET)
    more = misleading_evidence(ALPHA + 100 * TARGET, TARGET)
    np.testing.assert_allclose(actual, more, rtol=1e-6)
    np.testing.assert_allclose(misleading_evidence(jnp.ones((2, 3)), TARGET), 0, atol=1e-5)
    for b in range(2):
        rest = np.where(np.asarray(TARGET[b]) == 1, 1.0, np.asarray(ALPHA[b], np.float64))
        samples = np.random.default_rng(1).dirichlet(rest, 200_000)
        samples = np.clip(samples, 1e-12, None) / np.clip(samples, 1e-12, None).sum(1, keepdims=True)
        ratio = stats.dirichlet.logpdf(samples.T, rest) - stats.dirichlet.logpdf(samples.T, np.ones(3))
        np.testing.assert_allclose(actual[b], ratio.mean(), rtol=0.02)


def test_evidence_for_the_label_is_never_misleading_whatever_the_smoothing() -> None:
    config = get_config()
    config.train.loss, config.train.label_smoothing = "evidential", 0.2
    model = build_model(config.model, 3, 0)
    bag = jnp.zeros((1, 2, 1, config.model.features)), jnp.ones((1, 2, 1), bool), None
    alpha = jnp.array([[50.0, 1.0, 1.0]])
    actual = replace(model.pool(*bag), alpha=alpha, instance_loss=jnp.zeros(1))
    expected = evidential(alpha, jnp.array([[1.0, 0.0, 0.0]]), digamma_form=False)
    np.testing.assert_allclose(bag_losses(actual, jnp.array([0]), 10**6, config.train), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("loss", "head"), [("cross_entropy", "softmax"), ("focal", "softmax"), ("evidential_digamma", "evidential")]
)
def test_every_loss_has_gradients_also_for_large_and_for_no_evidence(loss: str, head: str) -> None:
    config = get_config()
    config.model.head, config.train.loss, config.model.mil = head, loss, "clam_mb"
    config.model.width, config.model.features, config.model.attention = 4, 16, 8
    model = build_model(config.model, 3, 0)

    def total(scale: jax.Array) -> jax.Array:
        features = scale * jnp.ones((2, 4, 1, 16)) * jnp.array([1.0, -1.0])[:, None, None, None]
        actual = model.pool(features, jnp.ones((2, 4, 1), bool), None, None, jnp.array([0, 2]))
        return weighted_mean(bag_losses(actual, jnp.array([0, 2]), 50, config.train), jnp.ones(2))

    for scale in (0.0, 1.0, 1e4):
        assert np.isfinite(jax.grad(total)(scale))


def test_the_supervised_contrastive_loss_is_the_published_one_and_leaves_out_bags_without_a_partner() -> None:
    embedding = np.random.default_rng(0).normal(size=(7, 5))
    label, temperature = np.array([0, 1, 0, 2, 1, 0, 3]), 0.3
    unit = embedding / np.linalg.norm(embedding, axis=1, keepdims=True)
    losses = []
    for i in range(7):
        others = [a for a in range(7) if a != i]
        total = sum(np.exp(unit[i] @ unit[a] / temperature) for a in others)
        same = [p for p in others if label[p] == label[i]]
        if same:
            losses.append(-np.mean([np.log(np.exp(unit[i] @ unit[p] / temperature) / total) for p in same]))
    actual = supervised_contrastive(jnp.asarray(embedding, jnp.float32), jnp.asarray(label), temperature)
    assert len(losses) == 5
    np.testing.assert_allclose(actual, np.mean(losses), rtol=1e-5)
    for values in (jnp.zeros((3, 4)), jnp.ones((3, 4))):
        loss, gradient = jax.value_and_grad(lambda z: supervised_contrastive(z, jnp.arange(3), 0.1))(values)
        assert float(loss) == 0.0
        assert np.isfinite(gradient).all()
