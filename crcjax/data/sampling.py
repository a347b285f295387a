"""Which slides and regions a training step sees: pure functions of seed, step and memory, so that any step can be made alone."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Num


def draw_slides(
    labels: Int[np.ndarray, " slide"],
    seed: int,
    step: int,
    bags: int,
    *,
    sites: Int[np.ndarray, " slide"] | None = None,
    losses: Float32[np.ndarray, " slide"] | None = None,
    mined_share: float = 0.0,
) -> Int[np.ndarray, " bag"]:
    """Slides of one step's bags: the classes take turns, and each goes through its slides in a new order every round.

    With `sites`, the sites of a class take turns too, so that a class is not learned from its largest site alone. The
    places of `mined_places` are given to slides in proportion to their `losses` (negative: not known), by class in turn
    as well: what is hard is seen more often, and classes still alike.
    """
    classes = np.unique(labels)
    of_class = [np.flatnonzero(labels == number) for number in classes]
    mined = mined_places(step, bags, mined_share)
    slides = []
    for place, is_mined in enumerate(mined):
        position = step * bags + place
        before = _mined_before(position, mined_share)
        if is_mined:
            members = of_class[before % len(classes)]
            weights = hardness(losses, members)
            slides.append(np.random.default_rng([seed, 12, position]).choice(members, p=weights / weights.sum()))
            continue
        turn, number = divmod(position - before, len(classes))
        members, stream = of_class[number], [seed, 10, number]
        if sites is not None:
            there = np.unique(sites[members])
            turn, site = divmod(turn, len(there))
            members, stream = members[sites[members] == there[site]], [*stream, site, 1]
        turn, at = divmod(turn, len(members))
        slides.append(np.random.default_rng([*stream, turn]).permutation(members)[at])
    return np.array(slides)


def mined_places(step: int, bags: int, share: float) -> Bool[np.ndarray, " bag"]:
    """Which of a step's bags are mined: `share` of all so far, rounded down, spread evenly."""
    before = [_mined_before(position, share) for position in range(step * bags, (step + 1) * bags + 1)]
    return np.diff(before) > 0


def hardness(
    losses: Float32[np.ndarray, " slide"] | None, members: Int[np.ndarray, " member"]
) -> Float[np.ndarray, " member"]:
    """What slides are mined in proportion to: their losses; one that is not known counts as the mean of the others."""
    if losses is None or not (losses[members] > 0).any():
        return np.ones(len(members))
    known = losses[members].astype(np.float64)
    return np.where(known < 0, known[known >= 0].mean(), known)


def slide_weights(labels: Int[np.ndarray, " slide"], beta: float) -> Float32[np.ndarray, " slide"]:
    """Weights in the loss of slides that `draw_slides` draws, so that a class counts by its effective number.

    A class of n slides counts as n / ((1 - beta^n) / (1 - beta)) (Cui et al. 2019, equation 2): with beta 1 all alike, as
    drawn, and with beta 0 by their slides, as if nothing were balanced. Their mean over the classes is one.
    """
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if beta == 1.0 or len(classes) == 0:
        return np.ones(len(labels), np.float32)
    weights = counts * (1.0 - beta) / (1.0 - beta**counts)
    return (weights / weights.mean())[inverse].astype(np.float32)


def draw_regions(
    mask: Bool[np.ndarray, "region slot"],
    seed: int,
    step: int,
    bag: int,
    count: int,
    *,
    cells: Int[np.ndarray, " region"] | None = None,
    tissue: Float[np.ndarray, " region"] | None = None,
    mined: Int[np.ndarray, " mined"] | None = None,
) -> Int[np.ndarray, " drawn"]:
    """At most `count` different regions that hold a tile, in the order of the store: the `mined` ones, then others.

    The others are sampled uniformly; with `cells` (`spread_cells`, as many as `count`), one from each of different cells,
    in proportion to its `tissue`.
    """
    filled = np.flatnonzero(mask.any(axis=1))
    if len(filled) <= count:
        return filled
    is_mined = np.isin(filled, mined if mined is not None else [])
    first = filled[is_mined][:count]
    rng = np.random.default_rng([seed, 11, step, bag])
    wanted, others = count - len(first), filled[~is_mined]
    if cells is None or tissue is None:
        return np.sort(np.concatenate([first, rng.choice(others, wanted, replace=False)]))
    others = others[~np.isin(cells[others], cells[first])]
    # The first of each cell in an order drawn in proportion to tissue (Efraimidis and Spirakis 2006).
    ordered = others[np.argsort(rng.exponential(size=len(others)) / np.maximum(tissue[others], 1e-6))]
    _, place = np.unique(cells[ordered], return_index=True)
    return np.sort(np.concatenate([first, rng.choice(ordered[place], wanted, replace=False)]))


def spread_cells(
    mask: Bool[np.ndarray, "region slot"], origin: Num[np.ndarray, "region 2"], count: int
) -> Int[np.ndarray, " region"]:
    """The cell of every region that holds a tile, 0 to count - 1; -1 of the others.

    A slide's tissue is halved along its longer side, and its halves again, until there are `count` parts of as many
    regions each. Of fewer regions than `count`, each is its own cell.
    """
    filled = np.flatnonzero(mask.any(axis=1))
    cells = np.full(len(mask), -1)
    parts = [(filled, 0, min(count, len(filled)))]
    while parts:
        members, first, number = parts.pop()
        if number <= 1:
            cells[members] = first
            continue
        axis = np.ptp(origin[members], axis=0).argmax()
        ordered = members[np.argsort(origin[members, axis], kind="stable")]
        half = number // 2
        cut = round(len(members) * half / number)
        parts += [(ordered[:cut], first, half), (ordered[cut:], first + half, number - half)]
    return cells


def _mined_before(position: int, share: float) -> int:
    return int(position * share + 1e-9)  # so that 10 x 0.3 is 3
