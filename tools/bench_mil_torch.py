"""Seconds of a MIL model's forward pass and training step, ours and the same in PyTorch, on the same cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from record import Row, record

from crcjax.config import get_config
from crcjax.models.mil import build_model, params_of

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
    model = build_model(config, CLASSES, 0)
    graph, optimizer = nnx.graphdef(model), optax.adamw(1e-4)
    bag = jnp.asarray(features)[None, :, None]
    mask, position = jnp.ones(bag.shape[:3], bool), jnp.zeros((1, len(features), 2))

    @jax.jit
    def forward(params: dict) -> jax.Array:
        return nnx.merge(graph, params).pool(bag, mask, position).logits

    @jax.jit
    def step(params: dict, moments: optax.OptState) -> tuple:
        gradient = jax.grad(lambda params: jax.nn.logsumexp(forward(params)) - forward(params)[0, 1])(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments

    params = params_of(model)
    moments = optimizer.init(params)
    return (
        median_seconds(lambda: jax.block_until_ready(forward(params))),
        median_seconds(lambda: jax.block_until_ready(step(params, moments))),
    )


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
                rows += [Row(name, one, "s", one / other, "PyTorch"), Row(f"{name}, PyTorch", other, "s")]
        if count <= 1_000:  # attention of all to all: 10,000 already take minutes on two cores
            for what, one in zip(("forward", "training step"), in_jax("hierarchical", features), strict=True):
                rows.append(Row(f"hierarchical, {count:,} instances, {what}", one, "s"))
    note = f"{WIDTH} features, {HIDDEN} hidden units, float32, medians of {REPEATS}; below 1 ours is faster. "
    record("mil_torch", "python tools/bench_mil_torch.py", rows, note + f"PyTorch {torch.__version__}.")


if __name__ == "__main__":
    main()
