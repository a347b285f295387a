"""The MIL models of crcjax.models in PyTorch, of the same sizes, for benchmarks to compare with.

Each takes the features of a bag [instance, WIDTH] and, in training, its label. It returns logits [1, CLASSES] and its instance
loss. ABMIL and Hierarchical also take [bag, instance, WIDTH].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

WIDTH, HIDDEN, CLASSES = 1024, 256, 3
HEADS = 4
# Tiles along the side of a region at 10x, 20x and 40x.
SLOTTED, FACTORS = "hierarchical, 21 slots per region", (1, 2, 4)
# Logits and instance loss.
Output = tuple[torch.Tensor, torch.Tensor | float]


class Pool(nn.Module):
    """The mean or the maximum, and a linear classifier."""

    def __init__(self, largest: bool):
        super().__init__()
        self.largest, self.classify = largest, nn.Linear(WIDTH, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Output:
        pooled = features.amax(dim=0, keepdim=True) if self.largest else features.mean(dim=0, keepdim=True)
        return self.classify(pooled), 0.0


class Scores(nn.Module):
    """Attention scores (Ilse 2018, equation 8, or 9 if `gated`)."""

    def __init__(self, gated: bool, branches: int = 1, width: int = WIDTH):
        super().__init__()
        self.content = nn.Linear(width, HIDDEN)
        self.gate = nn.Linear(width, HIDDEN) if gated else None
        self.score = nn.Linear(HIDDEN, branches, bias=False)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.content(features))
        if self.gate is not None:
            hidden = hidden * torch.sigmoid(self.gate(features))
        return self.score(hidden)


class ABMIL(nn.Module):
    """Attention pooling and a linear classifier."""

    def __init__(self, gated: bool, width: int = WIDTH):
        super().__init__()
        self.score, self.classify = Scores(gated, width=width), nn.Linear(width, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Output:
        pooled = torch.softmax(self.score(features), dim=-2).mT @ features
        return self.classify(pooled).reshape(-1, CLASSES), 0.0


class CLAM(nn.Module):
    """CLAM (Lu 2021), SB or MB, with the smooth top-1 SVM on the 8 first and last instances, as in crcjax."""

    def __init__(self, branches: int):
        super().__init__()
        self.branches = branches
        self.compress, self.score = nn.Linear(WIDTH, WIDTH), Scores(gated=True, branches=branches)
        self.classify, self.classify_instance = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 2 * CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Output:
        features = torch.relu(self.compress(features))
        scores = self.score(features)
        logits = self.classify(torch.softmax(scores, dim=0).T @ features)
        logits = logits if self.branches == 1 else logits.diagonal()[None]
        return logits, 0.0 if label is None else self._instance_loss(features, scores, label)

    def _instance_loss(self, features: torch.Tensor, scores: torch.Tensor, label: int) -> torch.Tensor:
        chosen = (scores.topk(8, dim=0).indices, scores.topk(8, dim=0, largest=False).indices)
        branch = [c % self.branches for c in range(CLASSES)]
        high, low = (
            self.classify_instance(features[at]).view(8, -1, CLASSES, 2)[:, branch, range(CLASSES)] for at in chosen
        )
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

    def forward(self, features: torch.Tensor, label: int | None) -> Output:
        highest, critical = self.instance(features).max(dim=0)
        query = self.query(features)
        attention = torch.softmax(query @ query[critical].T / HIDDEN**0.5, dim=0)
        logits = (highest + self.bag((attention.T @ features).flatten())) / 2
        loss = (
            0.0
            if label is None
            else nn.functional.cross_entropy(highest[None], torch.tensor([label], device=features.device))
        )
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
        inverse, identity = matrix.mT / scale[:, None, None], torch.eye(matrix.shape[-1], device=matrix.device)
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

    def forward(self, features: torch.Tensor, label: int | None) -> Output:
        side = math.isqrt(len(features) - 1) + 1
        sequence = torch.relu(self.compress(features))
        sequence = torch.cat([sequence, sequence[: side**2 - len(sequence)]])
        tokens = self.layers[0](torch.cat([self.token, sequence]))
        square = tokens[1:].T.reshape(1, WIDTH, side, side)
        encoded = square + sum(convolution(square) for convolution in self.positions)
        tokens = self.layers[1](torch.cat([tokens[:1], encoded.flatten(2)[0].T]))
        return self.classify(self.norm(tokens[:1])), 0.0


class Block(nn.Module):
    """Attention between instances, with rotary positions if `rotary`, and a perceptron; each is added to its input."""

    def __init__(self, rotary: bool) -> None:
        super().__init__()
        self.rotary = rotary
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH, eps=1e-6), nn.LayerNorm(WIDTH, eps=1e-6)])
        self.project, self.merge = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU("tanh"), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        parts = self.project(self.norms[0](values)).unflatten(-1, (3, HEADS, -1)).movedim((-3, -2), (0, -3))
        query, key = (self._rotated(part) for part in parts[:2]) if self.rotary else parts[:2]
        # PyTorch's fast kernels need exactly one batch axis.
        attended = nn.functional.scaled_dot_product_attention(
            *(part.reshape(-1, *part.shape[-3:]) for part in (query, key, parts[2]))
        )
        values = values + self.merge(attended.transpose(1, 2).reshape(values.shape))
        return values + self.perceptron(self.norms[1](values))

    def _rotated(self, values: torch.Tensor) -> torch.Tensor:
        """Rotates pairs of channels by the position, which is the same for all here: the time does not depend on it."""
        pairs = values.shape[-1] // 4
        angle = torch.zeros(values.shape[-2], 2, 1, device=values.device) * 256.0 ** (
            -torch.arange(pairs, device=values.device) / pairs
        )
        cos, sin = angle.flatten(1).cos(), angle.flatten(1).sin()
        first, second = values.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1).to(values.dtype)


class Hierarchical(nn.Module):
    """crcjax's hierarchical model: attention between the slots of a region, between regions, and gated attention per class.

    `factors` are the tiles along the side of a region, per magnification. The slots of a region are adjacent instances.
    """

    def __init__(self, factors: tuple[int, ...] = (1,)) -> None:
        super().__init__()
        tiles = [factor**2 for factor in factors]
        self.register_buffer(
            "magnification_of", torch.tensor([i for i, count in enumerate(tiles) for _ in range(count)])
        )
        # A region of one slot does not use these two. They make the number of parameters equal.
        self.magnification = nn.Parameter(0.02 * torch.randn(len(tiles), WIDTH))
        self.place = nn.Parameter(0.02 * torch.randn(sum(tiles), WIDTH))
        self.within = Block(rotary=False) if sum(tiles) > 1 else None
        self.pool_slots, self.across = Scores(gated=True), Block(rotary=True)
        self.pool_regions, self.classify = Scores(gated=True, branches=CLASSES), nn.Linear(WIDTH, CLASSES)

    def forward(self, features: torch.Tensor, label: int | None) -> Output:
        slots = features.unflatten(-2, (-1, len(self.place)))
        if self.within is not None:
            slots = self.within(slots + (self.magnification[self.magnification_of] + self.place))
        regions = (torch.softmax(self.pool_slots(slots), dim=-2).mT @ slots).squeeze(-2)
        regions = self.across(regions)
        pooled = torch.softmax(self.pool_regions(regions), dim=-2).mT @ regions
        return self.classify(pooled).diagonal(dim1=-2, dim2=-1).reshape(-1, CLASSES), 0.0


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
    SLOTTED: partial(Hierarchical, factors=FACTORS),
}
