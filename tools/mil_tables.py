"""The classical MIL sets, five times ten folds, for every model, beside the published means.

    CRCJAX_REAL_DATA=FOLDER python tools/mil_tables.py [SET ...]

One recipe for all sets and models, fixed beforehand: nothing is selected on any fold, so nothing can leak from one. The
50 folds of a model train at once, by vmap. Published figures (Ilse et al. 2018, table 1, same protocol, other splits) are
the papers' own.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from ml_collections import ConfigDict
from record import record

from crcjax.config import get_config
from crcjax.models.aggregators import Instances
from crcjax.models.mil import AGGREGATORS
from crcjax.train.losses import focal

MODELS = ("mean", "max", "abmil", "gated_abmil", "dsmil", "hierarchical")
PUBLISHED = {
    "musk1": {"abmil": ".892 ± .040", "gated_abmil": ".900 ± .050"},
    "fox": {"abmil": ".615 ± .043", "gated_abmil": ".603 ± .029"},
    "elephant": {"abmil": ".868 ± .022", "gated_abmil": ".857 ± .027"},
}
WIDTHS = {"musk1": 166, "fox": 230, "elephant": 230}  # one column more would be the instances' labels
EPOCHS, BATCH, WIDTH, DROPOUT = 40, 8, 64, 0.25


class Classifier(nnx.Module):
    """Two layers on the instances, then an aggregator."""

    def __init__(self, features: int, mil: str, config: ConfigDict, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(features, WIDTH, rngs=rngs), nnx.Linear(WIDTH, WIDTH, rngs=rngs)])
        self.aggregator = AGGREGATORS[mil](config, 2, (1,), dtype=jnp.float32, rngs=rngs)

    def __call__(self, features, mask, key=None, label=None):
        for i, layer in enumerate(self.layers):
            features = jax.nn.relu(layer(features))
            if key is not None:
                keep = jax.random.bernoulli(jax.random.fold_in(key, i), 1 - DROPOUT, features.shape)
                features = jnp.where(keep, features / (1 - DROPOUT), 0)
        return self.aggregator(Instances(features, mask, jnp.zeros((*mask.shape, 2))), label)


def padded_bags(name: str, data: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features [bag, instance, feature], mask, labels and the 50 training masks of a set."""
    held = np.load(data / "mil" / f"{name}.npz")
    features, bag_id = held["features"], held["bag_id"]
    assert features.shape[1] == WIDTHS[name], (
        f"{name}: {features.shape[1]} columns: the instances' labels are among them"
    )
    sizes = np.bincount(bag_id)
    bags = np.zeros((len(sizes), sizes.max(), features.shape[1]), np.float32)
    mask = np.arange(sizes.max()) < sizes[:, None]
    bags[mask] = features[np.argsort(bag_id, kind="stable")]
    train = held["train_mask"]
    return bags, mask, held["bag_label"].astype(np.int32), train.reshape(-1, train.shape[-1])


def accuracies(mil: str, bags: np.ndarray, mask: np.ndarray, label: np.ndarray, train: np.ndarray) -> np.ndarray:
    """The held-out accuracy of every fold."""
    config = get_config().model
    config.features, config.attention, config.heads = WIDTH, WIDTH, 4
    steps = EPOCHS * int(train.sum(axis=1).max()) // BATCH
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, steps // 10, steps)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    held, labels = jnp.asarray(mask), jnp.asarray(label)

    def fold(number: jax.Array, used: jax.Array) -> jax.Array:
        weight = (used[:, None] & held)[..., None]
        mean = (bags * weight).sum(axis=(0, 1)) / weight.sum()
        deviation = jnp.sqrt((((bags - mean) ** 2) * weight).sum(axis=(0, 1)) / weight.sum())
        scaled = (bags - mean) / jnp.maximum(deviation, 1e-6)
        graph, params = nnx.split(Classifier(bags.shape[-1], mil, config, nnx.Rngs(jax.random.fold_in(KEY, number))))

        def step(carry: tuple, at: jax.Array) -> tuple[tuple, None]:
            params, moments = carry
            draw, dropout = jax.random.split(jax.random.fold_in(jax.random.fold_in(KEY, number), at))
            chosen = jax.random.choice(draw, len(labels), (BATCH,), replace=False, p=used / used.sum())

            def loss(params: nnx.State) -> jax.Array:
                found = nnx.merge(graph, params)(scaled[chosen], held[chosen], dropout, labels[chosen])
                losses = focal(found.logits, jax.nn.one_hot(labels[chosen], 2), 0.0)
                return (losses + 0.5 * found.instance_loss).mean()

            updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
            return (optax.apply_updates(params, updates), moments), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))
        called = nnx.merge(graph, params)(scaled, held).logits.argmax(axis=-1)
        return ((called == labels) & ~used).sum() / (~used).sum()

    return np.asarray(jax.jit(jax.vmap(fold))(jnp.arange(len(train)), jnp.asarray(train)))


KEY = jax.random.key(0)


def main(sets: list[str], data: Path) -> None:
    rows = []
    for name in sets:
        prepared = padded_bags(name, data)
        for mil in MODELS:
            start = time.monotonic()
            found = accuracies(mil, *prepared)
            repeats = found.reshape(-1, 10).mean(axis=1)
            rows.append(
                {
                    "set": name,
                    "model": mil,
                    "accuracy": f"{found.mean():.3f}",
                    "sd over the 5 repeats": f"{repeats.std(ddof=1):.3f}",
                    "sd over the 50 folds": f"{found.std(ddof=1):.3f}",
                    "published": PUBLISHED[name].get(mil, ""),
                    "seconds": f"{time.monotonic() - start:.0f}",
                }
            )
            print(rows[-1], flush=True)
    note = (
        f"Five times ten folds; {EPOCHS} epochs of batches of {BATCH} bags, AdamW 1e-3, width {WIDTH}, dropout {DROPOUT},"
        " the same for every set and model and never tuned on them; no model selection."
    )
    record("mil_tables", "CRCJAX_REAL_DATA=… python tools/mil_tables.py", rows, note)


if __name__ == "__main__":
    main(sys.argv[1:] or list(PUBLISHED), Path(os.environ["CRCJAX_REAL_DATA"]))
