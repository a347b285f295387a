"""Seconds of a MIL model's forward pass and training step, ours and the same in PyTorch, on the same cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from record import Row, record

from crcjax.config import get_config
from crcjax.models.aggregators import Instances
from crcjax.models.mil import AGGREGATORS

WIDTH, HIDDEN, CLASSES = 1024, 256, 3
COUNTS = (1_000, 10_000, 100_000)
REPEATS = 5


class TorchABMIL(torch.nn.Module):
    """Attention pooling (Ilse 2018, equation 8, or 9 if `gated`) and a linear classifier."""

    def __init__(self, gated: bool):
        super().__init__()
        self.content = torch.nn.Linear(WIDTH, HIDDEN)
        self.gate = torch.nn.Linear(WIDTH, HIDDEN) if gated else None
        self.score = torch.nn.Linear(HIDDEN, 1, bias=False)
        self.classify = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.content(features))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(features))
        return self.classify(torch.softmax(self.score(hidden), dim=0).T @ features)


def in_torch(gated: bool, features: np.ndarray) -> tuple[float, float]:
    """Seconds of a forward pass and of a step of AdamW."""
    model, bag, label = TorchABMIL(gated), torch.from_numpy(features), torch.tensor([1])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def forward() -> None:
        with torch.inference_mode():
            model(bag)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(bag), label).backward()
        optimizer.step()

    return median_seconds(forward), median_seconds(step)


def in_jax(mil: str, features: np.ndarray) -> tuple[float, float]:
    """Seconds of a forward pass and of a step of AdamW, compiled before."""
    config = get_config().model
    config.mil, config.features, config.attention, config.dropout = mil, WIDTH, HIDDEN, 0.0
    graph, first = nnx.split(AGGREGATORS[mil](config, CLASSES, (1,), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    optimizer = optax.adamw(1e-4)
    bag = Instances(jnp.asarray(features)[None], jnp.ones((1, len(features)), bool), jnp.zeros((1, len(features), 2)))

    @jax.jit
    def forward(params: nnx.State, bag: Instances) -> jax.Array:
        return nnx.merge(graph, params)(bag).logits

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, bag: Instances) -> tuple:
        params, moments = state

        def loss(params: nnx.State) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(forward(params, bag), jnp.array([1])).mean()

        updates, moments = optimizer.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    seconds = median_seconds(lambda: jax.block_until_ready(forward(first, bag)))
    state = [(first, optimizer.init(first))]

    def train() -> None:
        state[0] = jax.block_until_ready(step(state[0], bag))

    return seconds, median_seconds(train)


def median_seconds(call: Callable[[], object]) -> float:
    """The median of some calls, after one that compiles or allocates."""
    call()
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


def main() -> None:
    rows = []
    for count in COUNTS:
        features = np.random.default_rng(0).standard_normal((count, WIDTH), np.float32)
        for mil in ("abmil", "gated_abmil"):
            ours, theirs = in_jax(mil, features), in_torch(mil == "gated_abmil", features)
            for what, one, other in zip(("forward", "training step"), ours, theirs, strict=True):
                name = f"{mil}, {count:,} instances, {what}"
                rows += [Row(name, one * 1e3, "ms", other / one, "PyTorch"), Row(f"{name}, PyTorch", other * 1e3, "ms")]
        if count <= 1_000:  # attention of all to all: 10,000 already take minutes on two cores
            for what, one in zip(("forward", "training step"), in_jax("hierarchical", features), strict=True):
                rows.append(Row(f"hierarchical, {count:,} instances, {what}", one * 1e3, "ms"))
    note = f"{WIDTH} features, {HIDDEN} hidden units, float32, medians of {REPEATS}; the ratio is how many times as fast ours is. "
    record("mil_torch", "python tools/bench_mil_torch.py", rows, note + f"PyTorch {torch.__version__}.")


if __name__ == "__main__":
    main()
