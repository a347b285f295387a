"""Seconds of MIL models' forward pass and training step, ours and the same in PyTorch, on the same cores.

python tools/bench_mil_torch.py [INSTANCES ...]     # of other sizes, the rows recorded last stay
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from record import Row, earlier_rows, record
from torch import nn

from crcjax.config import get_config
from crcjax.models.aggregators import Instances
from crcjax.models.mil import AGGREGATORS

WIDTH, HIDDEN, CLASSES, LABEL = 1024, 256, 3, 1
HEADS = 4
COUNTS = (1_000, 10_000, 100_000)
REPEATS = 5
Found = tuple[torch.Tensor, torch.Tensor | float]  # logits, instance loss


class Pool(nn.Module):
    """The mean or the maximum, and a linear classifier."""

    def __init__(self, largest: bool):
        super().__init__()
        self.largest, self.classify = largest, nn.Linear(WIDTH, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Found:
        pooled = features.amax(dim=0, keepdim=True) if self.largest else features.mean(dim=0, keepdim=True)
        return self.classify(pooled), 0.0


class Scores(nn.Module):
    """Attention scores (Ilse 2018, equation 8, or 9 if `gated`)."""

    def __init__(self, gated: bool, branches: int = 1):
        super().__init__()
        self.content = nn.Linear(WIDTH, HIDDEN)
        self.gate = nn.Linear(WIDTH, HIDDEN) if gated else None
        self.score = nn.Linear(HIDDEN, branches, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.content(features))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(features))
        return self.score(hidden)


class ABMIL(nn.Module):
    """Attention pooling and a linear classifier."""

    def __init__(self, gated: bool):
        super().__init__()
        self.score, self.classify = Scores(gated), nn.Linear(WIDTH, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Found:
        return self.classify(torch.softmax(self.score(features), dim=0).T @ features), 0.0


class CLAM(nn.Module):
    """CLAM (Lu 2021), SB or MB, with the smooth top-1 SVM on the 8 first and last instances, as ours has it."""

    def __init__(self, branches: int):
        super().__init__()
        self.branches = branches
        self.compress, self.score = nn.Linear(WIDTH, WIDTH), Scores(gated=True, branches=branches)
        self.classify, self.judge = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 2 * CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Found:
        features = torch.relu(self.compress(features))
        scores = self.score(features)
        logits = self.classify(torch.softmax(scores, dim=0).T @ features)
        logits = logits if self.branches == 1 else logits.diagonal()[None]
        return logits, 0.0 if label is None else self._instance_loss(features, scores, label)

    def _instance_loss(self, features: torch.Tensor, scores: torch.Tensor, label: int) -> torch.Tensor:
        chosen = (scores.topk(8, dim=0).indices, scores.topk(8, dim=0, largest=False).indices)
        branch = [c % self.branches for c in range(CLASSES)]
        high, low = (self.judge(features[at]).view(8, -1, CLASSES, 2)[:, branch, range(CLASSES)] for at in chosen)
        wrong_high = nn.functional.softplus(high[..., 1] + 1 - high[..., 0]).mean(dim=0)
        right = nn.functional.softplus(high[:, label, 0] + 1 - high[:, label, 1]).sum()
        right = (right + nn.functional.softplus(low[:, label, 1] + 1 - low[:, label, 0]).sum()) / 16
        return (right + wrong_high.sum() - wrong_high[label]) / CLASSES


class DSMIL(nn.Module):
    """DSMIL (Li 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.instance = nn.Linear(WIDTH, CLASSES)
        self.query = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.bag = nn.Linear(CLASSES * WIDTH, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Found:
        highest, critical = self.instance(features).max(dim=0)
        query = self.query(features)
        attention = torch.softmax(query @ query[critical].T / HIDDEN**0.5, dim=0)
        logits = (highest + self.bag((attention.T @ features).flatten())) / 2
        loss = 0.0 if label is None else nn.functional.cross_entropy(highest[None], torch.tensor([label]))
        return logits[None], loss


class Nystrom(nn.Module):
    """A layer of TransMIL: Nyström attention (Xiong 2021) with a convolution over the values, added to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.merge = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.residual = nn.Conv2d(HEADS, HEADS, (33, 1), padding=(16, 0), groups=HEADS, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        count, landmarks = len(tokens), WIDTH // 2
        query, key, value = self.project(self.norm(tokens)).view(count, 3, HEADS, -1).permute(1, 2, 0, 3)
        query = query * query.shape[-1] ** -0.5
        stretch = -(-count // landmarks)
        full = count // stretch * stretch
        query_marks, key_marks = (
            torch.cat(
                [part[:, :full].unflatten(1, (-1, stretch)).mean(dim=2), part[:, full:].mean(dim=1, keepdim=True)], 1
            )
            if full < count
            else part.unflatten(1, (-1, stretch)).mean(dim=2)
            for part in (query, key)
        )
        to_marks = torch.softmax(query @ key_marks.mT, dim=-1)
        between = torch.softmax(query_marks @ key_marks.mT, dim=-1)
        from_marks = torch.softmax(query_marks @ key.mT, dim=-1)
        out = (to_marks @ self._pseudo_inverse(between)) @ (from_marks @ value) + self.residual(value[None])[0]
        return tokens + self.merge(out.transpose(0, 1).reshape(count, WIDTH))

    def _pseudo_inverse(self, matrix: torch.Tensor) -> torch.Tensor:
        scale = matrix.abs().sum(dim=-1).amax(dim=-1) * matrix.abs().sum(dim=-2).amax(dim=-1)
        inverse, identity = matrix.mT / scale[:, None, None], torch.eye(matrix.shape[-1])
        for _ in range(6):
            product = matrix @ inverse
            inverse = 0.25 * inverse @ (13 * identity - product @ (15 * identity - product @ (7 * identity - product)))
        return inverse


class TransMIL(nn.Module):
    """TransMIL (Shao 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.compress, self.token = nn.Linear(WIDTH, WIDTH), nn.Parameter(0.02 * torch.randn(1, WIDTH))
        self.layers = nn.ModuleList([Nystrom(), Nystrom()])
        self.positions = nn.ModuleList(
            [nn.Conv2d(WIDTH, WIDTH, side, padding=side // 2, groups=WIDTH) for side in (7, 5, 3)]
        )
        self.norm, self.classify = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Found:
        side = math.isqrt(len(features) - 1) + 1
        sequence = torch.relu(self.compress(features))
        sequence = torch.cat([sequence, sequence[: side**2 - len(sequence)]])
        tokens = self.layers[0](torch.cat([self.token, sequence]))
        square = tokens[1:].T.reshape(1, WIDTH, side, side)
        encoded = square + sum(convolution(square) for convolution in self.positions)
        tokens = self.layers[1](torch.cat([tokens[:1], encoded.flatten(2)[0].T]))
        return self.classify(self.norm(tokens[:1])), 0.0


class Hierarchical(nn.Module):
    """Ours, of one slot a region: a layer of attention across the regions, and gated attention a class."""

    def __init__(self) -> None:
        super().__init__()
        self.pool_slots, self.pool_regions = Scores(gated=True), Scores(gated=True, branches=CLASSES)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.project, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))
        self.classify = nn.Linear(WIDTH, CLASSES)
        # A slot's magnification and place, which a region of one slot does without; counted, so that both are as large.
        self.embeddings = nn.Parameter(torch.zeros(2, WIDTH), requires_grad=False)

    def forward(self, features: torch.Tensor, label: int | None) -> Found:
        slots = features[:, None]
        regions = (torch.softmax(self.pool_slots(slots), dim=1).mT @ slots)[:, 0]
        parts = self.project(self.norms[0](regions)).view(len(regions), 3, HEADS, -1).permute(1, 2, 0, 3)
        query, key = (self._turned(part) for part in parts[:2])
        seen = nn.functional.scaled_dot_product_attention(query[None], key[None], parts[2][None])[0]
        regions = regions + self.merge(seen.transpose(0, 1).reshape(len(regions), WIDTH))
        regions = regions + self.perceptron(self.norms[1](regions))
        pooled = torch.softmax(self.pool_regions(regions), dim=0).T @ regions
        return self.classify(pooled).diagonal()[None], 0.0

    def _turned(self, values: torch.Tensor) -> torch.Tensor:
        """By the position, which is the same for all here, as the time does not depend on it."""
        pairs = values.shape[-1] // 4
        angle = torch.zeros(values.shape[1], 2, 1) * 256.0 ** (-torch.arange(pairs) / pairs)
        cos, sin = angle.flatten(1).cos(), angle.flatten(1).sin()
        first, second = values.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


TWINS: dict[str, Callable[[], nn.Module]] = {
    "mean": partial(Pool, largest=False),
    "max": partial(Pool, largest=True),
    "abmil": partial(ABMIL, gated=False),
    "gated_abmil": partial(ABMIL, gated=True),
    "clam_sb": partial(CLAM, branches=1),
    "clam_mb": partial(CLAM, branches=CLASSES),
    "dsmil": DSMIL,
    "transmil": TransMIL,
    "hierarchical": Hierarchical,
}
# 100,000 instances: attention of all to all takes a hundred times as long as at 10,000, hours on two cores; TransMIL's weights
# of landmarks, [instances, 512] a head, and their gradients do not fit the memory.
LARGEST = {"hierarchical": 10_000, "transmil": 10_000}


def in_torch(mil: str, features: np.ndarray) -> tuple[float, float]:
    """Seconds of a forward pass and of a step of AdamW."""
    model, bag, label = TWINS[mil](), torch.from_numpy(features), torch.tensor([LABEL])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4)

    def forward() -> None:
        with torch.inference_mode():
            model(bag, None)

    def step() -> None:
        optimizer.zero_grad()
        logits, instance_loss = model(bag, LABEL)
        (nn.functional.cross_entropy(logits, label) + instance_loss).backward()
        optimizer.step()

    return median_seconds(forward), median_seconds(step)


def in_jax(mil: str, features: np.ndarray) -> tuple[float, float]:
    """Seconds of a forward pass and of a step of AdamW, compiled before."""
    config = get_config().model
    config.mil, config.features, config.attention, config.heads, config.dropout = mil, WIDTH, HIDDEN, HEADS, 0.0
    graph, first = nnx.split(AGGREGATORS[mil](config, CLASSES, (1,), dtype=jnp.float32, rngs=nnx.Rngs(0)))
    sizes = [sum(part.size for part in jax.tree.leaves(first)), sum(part.numel() for part in TWINS[mil]().parameters())]
    assert sizes[0] == sizes[1], f"{mil}: {sizes[0]:,} parameters, PyTorch's {sizes[1]:,}"
    optimizer = optax.adamw(1e-4)
    bag = Instances(jnp.asarray(features)[None], jnp.ones((1, len(features)), bool), jnp.zeros((1, len(features), 2)))
    label = jnp.array([LABEL])

    @jax.jit
    def forward(params: nnx.State, bag: Instances) -> jax.Array:
        return nnx.merge(graph, params)(bag).logits

    @partial(jax.jit, donate_argnums=0)
    def step(state: tuple, bag: Instances) -> tuple:
        params, moments = state

        def loss(params: nnx.State) -> jax.Array:
            found = nnx.merge(graph, params)(bag, label)
            losses = optax.softmax_cross_entropy_with_integer_labels(found.logits, label) + found.instance_loss
            return losses.mean()

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


def rows_of(count: int) -> list[Row]:
    """The rows of bags of one size."""
    features = np.random.default_rng(0).standard_normal((count, WIDTH), np.float32)
    rows = []
    for mil in TWINS:
        if count > LARGEST.get(mil, count):
            continue
        ours, theirs = in_jax(mil, features), in_torch(mil, features)
        for what, one, other in zip(("forward", "training step"), ours, theirs, strict=True):
            name = f"{count:,} instances, {mil}, {what}"
            rows += [Row(name, one * 1e3, "ms", other / one, "PyTorch"), Row(f"{name}, PyTorch", other * 1e3, "ms")]
            print(rows[-2], flush=True)
    return rows


def main(counts: list[int]) -> None:
    rows = [row for row in earlier_rows("mil_torch") if not row["measure"].startswith(tuple(f"{n:,} " for n in counts))]
    found = [Row(**row) for row in rows] + [row for count in counts for row in rows_of(count)]
    found.sort(key=lambda row: int(row.measure.split()[0].replace(",", "")))
    note = (
        f"{WIDTH} features, {HIDDEN} hidden units, float32, one bag, medians of {REPEATS}; the ratio is how many times as"
        f" fast ours is. Steps of clam_sb and dsmil include their instance losses. PyTorch {torch.__version__}."
        " Where ours is behind, it is by the products: on 10,000 x 1,024 features and 256 units, XLA's CPU code takes 44 ms forward"
        " and 84 ms for the weights' gradient, PyTorch's library 40 and 37. The other order of that product takes 76 ms, features"
        " turned over first 73. Bags of few instances also pay XLA's start of a program."
    )
    record("mil_torch", "python tools/bench_mil_torch.py", found, note)


if __name__ == "__main__":
    main([int(count) for count in sys.argv[1:]] or list(COUNTS))
