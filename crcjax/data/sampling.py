"""Sampling of slides and regions: pure functions of seed, step and mining memory.

Any step can be sampled without the steps before it, so that a resumed run samples the same bags.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Num


def sample_slides(
    labels: Int[np.ndarray, " slide"],
    seed: int,
    step: int,
    bags: int,
    *,
    sites: Int[np.ndarray, " slide"] | None = None,
    losses: Float32[np.ndarray, " slide"] | None = None,
    mined_fraction: float = 0.0,
) -> Int[np.ndarray, " bag"]:
    """Samples the slides of a step's bags.

    The classes take turns, and each class shows all of its slides in a random order before it repeats one.

    Args:
      labels: class index of each slide.
      seed: the seed of all samples.
      step: the step, counted from 0.
      bags: bags of a step.
      sites: site index of each slide. With it, the sites of a class take turns too, so that a large site does not dominate
        the class.
      losses: the running loss of each slide; negative if unknown.
      mined_fraction: the fraction of the bags that is mined (`mined_places`). These are sampled in proportion to their
        losses within a class, and the classes take turns here too.

    Returns:
      The index of each bag's slide.
    """
    classes = np.unique(labels)
    slides_of_class = [np.flatnonzero(labels == number) for number in classes]
    slides = []
    for place, is_mined in enumerate(mined_places(step, bags, mined_fraction)):
        # Bags are counted over all steps, mined and other bags separately.
        position = step * bags + place
        mined_before = _mined_before(position, mined_fraction)
        if is_mined:
            candidates = slides_of_class[mined_before % len(classes)]
            weights = hardness(losses, candidates)
            slides.append(np.random.default_rng([seed, 12, position]).choice(candidates, p=weights / weights.sum()))
            continue
        round_, number = divmod(position - mined_before, len(classes))
        candidates, stream = slides_of_class[number], [seed, 10, number]
        if sites is not None:
            class_sites = np.unique(sites[candidates])
            round_, site = divmod(round_, len(class_sites))
            candidates, stream = candidates[sites[candidates] == class_sites[site]], [*stream, site, 1]
        # A round shows every candidate once; each round has its own order.
        round_, index = divmod(round_, len(candidates))
        slides.append(np.random.default_rng([*stream, round_]).permutation(candidates)[index])
    return np.array(slides)


def mined_places(step: int, bags: int, fraction: float) -> Bool[np.ndarray, " bag"]:
    """Whether each bag of a step is mined: evenly spaced, and at most `fraction` of all bags up to any step."""
    mined_before = [_mined_before(position, fraction) for position in range(step * bags, (step + 1) * bags + 1)]
    return np.diff(mined_before) > 0


def hardness(
    losses: Float32[np.ndarray, " slide"] | None, candidates: Int[np.ndarray, " candidate"]
) -> Float[np.ndarray, " candidate"]:
    """The unnormalised probability of mining each candidate: its loss, or if that is unknown the mean of the others."""
    if losses is None or not (losses[candidates] > 0).any():
        return np.ones(len(candidates))
    candidate_losses = losses[candidates].astype(np.float64)
    return np.where(candidate_losses < 0, candidate_losses[candidate_losses >= 0].mean(), candidate_losses)


def slide_weights(labels: Int[np.ndarray, " slide"], beta: float) -> Float32[np.ndarray, " slide"]:
    """The weight of each slide in the loss, by the effective number of its class (Cui et al. 2019, equation 2).

    `sample_slides` shows all classes equally often. With these weights a class of n slides counts in proportion to
    n / E(n), where E(n) = (1 - beta^n) / (1 - beta) is its effective number: with beta 1 all classes count alike, with
    beta 0 in proportion to their slides. The mean of the weights over the classes is 1.
    """
    classes, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    if beta == 1.0 or len(classes) == 0:
        return np.ones(len(labels), np.float32)
    weights = counts * (1.0 - beta) / (1.0 - beta**counts)
    return (weights / weights.mean())[inverse].astype(np.float32)


def sample_regions(
    mask: Bool[np.ndarray, "region slot"],
    seed: int,
    step: int,
    bag: int,
    count: int,
    *,
    cells: Int[np.ndarray, " region"] | None = None,
    tissue: Float[np.ndarray, " region"] | None = None,
    mined: Int[np.ndarray, " mined"] | None = None,
) -> Int[np.ndarray, " sampled"]:
    """Samples the regions of a bag.

    Args:
      mask: the slide's tiles; regions without a tile are not sampled.
      seed, step, bag: the sample depends on these alone.
      count: the number of regions; a slide with fewer shows all of them.
      cells: the cell of each region (`spread_cells`, with the same `count`). With cells, at most one region of a cell is
        sampled, in proportion to its tissue. Without cells, sampling is uniform.
      tissue: the fraction of tissue in each region.
      mined: store indices of regions that are shown first; -1 for none.

    Returns:
      Sorted store indices, without repetition.
    """
    with_tiles = np.flatnonzero(mask.any(axis=1))
    if len(with_tiles) <= count:
        return with_tiles
    is_mined = np.isin(with_tiles, mined if mined is not None else [])
    mined_regions, others = with_tiles[is_mined][:count], with_tiles[~is_mined]
    rng = np.random.default_rng([seed, 11, step, bag])
    missing = count - len(mined_regions)
    if cells is None or tissue is None:
        return np.sort(np.concatenate([mined_regions, rng.choice(others, missing, replace=False)]))
    others = others[~np.isin(cells[others], cells[mined_regions])]
    # Weighted sampling by exponential keys (Efraimidis and Spirakis 2006); the first region of each cell is its sample.
    order = np.argsort(rng.exponential(size=len(others)) / np.maximum(tissue[others], 1e-6))
    _, first_of_cell = np.unique(cells[others[order]], return_index=True)
    cell_samples = others[order][first_of_cell]
    return np.sort(np.concatenate([mined_regions, rng.choice(cell_samples, missing, replace=False)]))


def spread_cells(
    mask: Bool[np.ndarray, "region slot"], origin: Num[np.ndarray, "region 2"], count: int
) -> Int[np.ndarray, " region"]:
    """Divides the tissue of a slide into `count` cells with equal numbers of regions.

    The tissue is halved along its longer side, and its halves likewise, until there are `count` cells. If a slide has fewer
    regions than `count`, each region is a cell.

    Returns:
      The cell of each region, 0 to count - 1; -1 for regions without a tile.
    """
    with_tiles = np.flatnonzero(mask.any(axis=1))
    cells = np.full(len(mask), -1)
    # Areas to be divided: their regions, first cell and number of cells.
    areas = [(with_tiles, 0, min(count, len(with_tiles)))]
    while areas:
        regions, first_cell, cell_count = areas.pop()
        if cell_count <= 1:
            cells[regions] = first_cell
            continue
        axis = np.ptp(origin[regions], axis=0).argmax()
        along_axis = regions[np.argsort(origin[regions, axis], kind="stable")]
        half = cell_count // 2
        cut = round(len(regions) * half / cell_count)
        areas += [(along_axis[:cut], first_cell, half), (along_axis[cut:], first_cell + half, cell_count - half)]
    return cells


def _mined_before(position: int, fraction: float) -> int:
    """The number of mined bags among the first `position` bags."""
    # The small number corrects products such as 0.29 x 100, which is 28.999… in floating point.
    return int(position * fraction + 1e-9)
