"""Whether a model could tell sites apart, and whether that could carry its result.

If embeddings tell the site and the site tells the label, an AUROC over all sites may be that of the site. The AUROC within
sites is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped
from scipy import special, stats

from crcjax.errors import InputError
from crcjax.validation.bootstrap import number_patients
from crcjax.validation.decisions import balanced_accuracy
from crcjax.validation.estimate import Estimate, TestResult, undetermined
from crcjax.validation.influence import Z, clustered_error, count_clusters
from crcjax.validation.proportions import RARE
from crcjax.validation.ranking import placements

# Variance added to every direction, as a share of the mean one, so that few slides do not determine a direction.
_RIDGE = 0.1


@dataclass(frozen=True)
class Probe:
    """How well a linear probe tells groups such as sites.

    Attributes:
      groups: the groups, each with ten slides or more.
      balanced_accuracy: of predictions for patients whom the probe was not fitted on.
      baseline: the mean balanced accuracy after permuting the groups.
      test: the probability of a balanced accuracy as high after permuting.
    """

    groups: tuple[str, ...]
    balanced_accuracy: Estimate
    baseline: float
    test: TestResult


def probe_groups(
    features: Float[np.ndarray, "unit feature"],
    group: Shaped[np.ndarray, " unit"],
    seed: int,
    cluster: Int[np.ndarray, " unit"] | None = None,
    stratum: Int[np.ndarray, " unit"] | None = None,
    *,
    folds: int = 5,
    permutations: int = 999,
) -> Probe:
    """Predicts the site or scanner of slides from embeddings, or from the logits of predictions, by a linear probe.

    The probe whitens the features and takes the nearest mean of a group, so that small groups count as much as large ones. Its
    patients are divided into folds. The baseline permutes the groups of patients; where the slides of a patient are of several
    groups, as in a comparison of scanners, it permutes them within the patient.

    Args:
      features: of each slide; slides whose features are not numbers are excluded.
      group: the site or scanner, as text; empty if it is not known. Groups with fewer than ten slides are excluded.
      seed: the seed of folds and permutations.
      cluster: the patient of each slide; None if each slide is a patient of its own.
      stratum: if given, groups are permuted within strata alone. With the label, the test asks for a signal beyond that of
        the label.
      folds: the number of folds.
      permutations: the number of permutations.
    """
    method = f"linear probe, {folds} folds of patients, {permutations} permutations"
    counts = {name: int((group == name).sum()) for name in sorted(set(group.tolist()) - {""})}
    names = tuple(name for name, count in counts.items() if count >= RARE)
    used = np.isin(group, names) & np.isfinite(features).all(axis=1)
    excluded = int((~used).sum())
    if len(names) < 2:
        reason = f"fewer than two groups have {RARE} slides"
        nothing = undetermined(method, int(used.sum()), reason)
        return Probe(names, nothing, np.nan, TestResult(np.nan, np.nan, method, warnings=(reason,)))
    features, place = features[used], np.searchsorted(names, group[used])
    numbered = number_patients(None if cluster is None else cluster[used], features, place)
    strata = np.zeros(len(place), int) if stratum is None else np.unique(stratum[used], return_inverse=True)[1]
    rng = np.random.default_rng([seed, 26])
    fold = rng.permutation(int(numbered.max()) + 1)[numbered] % folds
    columns = np.stack([place, *_permuted(place, numbered, strata, permutations, rng)], axis=1)
    predicted = np.zeros_like(columns)
    for number in range(folds):
        test = fold == number
        if test.any():
            predicted[test] = _nearest_mean(features[~test], columns[~test], features[test], len(names))
    recalls = np.stack(
        [((predicted == k) & (columns == k)).sum(axis=0) / (columns == k).sum(axis=0) for k in range(len(names))]
    )
    reached = recalls.mean(axis=0)
    estimate = balanced_accuracy(place, predicted[:, 0], len(names), None if cluster is None else numbered)
    value = Estimate(
        estimate.value, estimate.ci_low, estimate.ci_high, f"{method}; {estimate.method}", estimate.n,
        warnings=estimate.warnings, n_clusters=estimate.n_clusters, n_excluded=excluded,
    )  # fmt: skip
    p_value = float((reached >= reached[0] - 1e-12).mean())
    return Probe(names, value, float(reached[1:].mean()), TestResult(float(reached[0]), p_value, method))


def _permuted(
    place: np.ndarray, patient: np.ndarray, strata: np.ndarray, permutations: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, " unit"]]:
    """The groups after every permutation: between patients of a stratum, or within patients of several groups."""
    first = np.unique(patient, return_index=True)[1]
    varies = (place != place[first][patient]) | (strata != strata[first][patient])
    within = bool(varies.any())
    blocks = patient * (int(strata.max()) + 1) + strata if within else strata[first]
    values = place if within else place[first]
    order = np.argsort(blocks, kind="stable")
    for _ in range(permutations):
        shuffled = np.empty_like(values)
        # Random order within each block.
        shuffled[order] = values[np.lexsort((rng.random(len(values)), blocks))]
        yield shuffled if within else shuffled[patient]


def _nearest_mean(
    train: Float[np.ndarray, "train feature"],
    groups: Int[np.ndarray, "train column"],
    test: Float[np.ndarray, "test feature"],
    count: int,
) -> Int[np.ndarray, "test column"]:
    """For every column of groups, the group whose mean is nearest to each test row, after whitening."""
    centre = train.mean(axis=0)
    _, size, directions = np.linalg.svd(train - centre, full_matrices=False)
    variance = size**2 / len(train)
    scale = np.sqrt(variance + _RIDGE * variance.mean() + 1e-12)
    inside, outside = ((rows - centre) @ directions.T / scale for rows in (train, test))
    scores = np.full((count, len(test), groups.shape[1]), -np.inf)
    for k in range(count):
        member = (groups == k).astype(float)
        number = member.sum(axis=0)
        mean = inside.T @ member / np.maximum(number, 1)
        scores[k] = np.where(number > 0, outside @ mean - (mean**2).sum(axis=0) / 2, -np.inf)
    return scores.argmax(axis=0)


@dataclass(frozen=True)
class Association:
    """Cramér's V, from 0 for independent to 1 for determined, with the permutation test of independence."""

    cramer_v: float
    test: TestResult


def label_association(
    label: Shaped[np.ndarray, " patient"], group: Shaped[np.ndarray, " patient"], seed: int, *, permutations: int = 9999
) -> Association:
    """The association of the label with the site or scanner; patients whose label or group is empty are excluded.

    V is corrected for its bias in small tables (Bergsma 2013).
    """
    known = (label != "") & (group != "")
    rows, columns = (np.unique(values[known], return_inverse=True)[1] for values in (label, group))
    table = np.zeros((int(rows.max(initial=0)) + 1, int(columns.max(initial=0)) + 1), int)
    np.add.at(table, (rows, columns), 1)
    method, n = f"chi-squared, {permutations} permutations", len(rows)
    if min(table.shape) < 2:
        reason = "fewer than two labels or groups"
        return Association(np.nan, TestResult(np.nan, np.nan, method, warnings=(reason,)))
    sampling = stats.PermutationMethod(n_resamples=permutations, rng=np.random.default_rng([seed, 27]))
    test = stats.chi2_contingency(table, correction=False, method=sampling)
    r, c = table.shape
    phi = max(0.0, test.statistic / n - (r - 1) * (c - 1) / (n - 1))
    smaller = min(r - (r - 1) ** 2 / (n - 1), c - (c - 1) ** 2 / (n - 1)) - 1
    value = float(np.sqrt(phi / smaller)) if smaller > 0 else np.nan
    return Association(value, TestResult(float(test.statistic), float(test.pvalue), method, (r - 1) * (c - 1)))


def within_site_auroc(
    label: Int[np.ndarray, " unit"],
    probs: Float[np.ndarray, "unit class"],
    site: Shaped[np.ndarray, " unit"],
    cluster: Int[np.ndarray, " unit"] | None = None,
) -> Estimate:
    """The macro AUROC in which only slides of the same site are compared, so that the site cannot rank them.

    The probability that a slide of a class ranks above one of another class from the same site, over all such pairs. The interval
    is that of its influence function, on the logit scale. NaN if a class is compared at no site.
    """
    if len(site) != len(label):
        raise InputError(f"there must be one site for each of {len(label)} slides, got {len(site)}")
    method = "pairs within sites, influence function" + (", clustered by patient" if cluster is not None else "")
    values, influence = [], np.zeros(len(label))
    for k in range(probs.shape[1]):
        positive = label == k
        right, weight = np.zeros(len(label)), np.zeros(len(label))
        for name in np.unique(site):
            rows = np.flatnonzero(site == name)
            positives = int(positive[rows].sum())
            others = len(rows) - positives
            if positives and others:
                right[rows] = placements(positive[rows], probs[rows, k])[1]
                weight[rows] = np.where(positive[rows], others, positives)
        pairs = float(weight[positive].sum())
        if pairs == 0:
            return undetermined(method, len(label), f"no site has class {k} and another", count_clusters(cluster))
        value = float((weight * right)[positive].sum() / pairs)
        values.append(value)
        influence += len(label) * weight * (right - value) / pairs / probs.shape[1]
    mean, error = float(np.mean(values)), clustered_error(influence, cluster)
    clusters = count_clusters(cluster)
    if error <= 1e-12 or not 0 < mean < 1:
        reason = "the data show no variance, which determines no interval"
        return Estimate(mean, np.nan, np.nan, method, len(label), warnings=(reason,), n_clusters=clusters)
    half = Z * error / (mean * (1 - mean))
    low, high = special.expit(special.logit(mean) + half * np.array([-1, 1])).tolist()
    return Estimate(mean, low, high, method, len(label), n_clusters=clusters)
