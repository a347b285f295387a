from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError, OutputError
from crcjax.models.prediction import Prediction
from crcjax.predict.feature_density import Density, fit_density, is_fitted, load_density, summary
from crcjax.validation.ranking import auroc

FEATURES, REGIONS = 16, 30


def _bags(rng: np.random.Generator, count: int, shift: float = 0.0, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    """Bags of three classes of one covariance; in others the mean is shifted, or what instances differ by is scaled."""
    label = np.arange(count) % 3
    own = np.random.default_rng(1).normal(size=(FEATURES, FEATURES)) / 4
    centre = label[:, None] + rng.normal(size=(count, FEATURES)) @ own + shift * np.eye(FEATURES)[0]
    instances = rng.normal(size=(count, REGIONS, FEATURES)) * rng.uniform(0.8, 1.2, (count, 1, 1)) * scale
    return (centre[:, None] + instances)[:, :, None].astype(np.float32), label


def _summaries(bags: np.ndarray) -> np.ndarray:
    return np.stack([summary(bag, np.ones(bag.shape[:2], bool)) for bag in bags])


@pytest.fixture(scope="module")
def density() -> Density:
    rng = np.random.default_rng(0)
    bags, label = _bags(rng, 120)
    return fit_density(_summaries(bags), label, _summaries(_bags(rng, 60)[0]))


def _evidence(alpha: np.ndarray) -> Prediction:
    empty, by_slot = np.zeros((len(alpha), 1), np.float32), np.zeros((len(alpha), 1, 1), np.float32)
    probs = alpha / alpha.sum(axis=1, keepdims=True)
    vacuity = alpha.shape[1] / alpha.sum(axis=1)
    return Prediction(np.log(alpha), probs, empty, empty, by_slot, by_slot[..., None], alpha, vacuity, vacuity, vacuity)


def test_a_summary_is_of_valid_instances_in_any_order() -> None:
    rng = np.random.default_rng(0)
    features, mask = rng.normal(size=(9, 5, FEATURES)).astype(np.float32), rng.random((9, 5)) < 0.7
    found = summary(features, mask)
    valid = features[mask].astype(np.float64)
    np.testing.assert_allclose(found, [valid.mean(axis=0), np.log(valid.std(axis=0))], atol=1e-5)
    features[~mask] = np.nan
    order = rng.permutation(9)
    np.testing.assert_allclose(summary(features[order], mask[order]), found, rtol=1e-12)
    padding = ((0, 4), (0, 0))
    padded = summary(np.pad(features, (*padding, (0, 0))), np.pad(mask, padding))
    np.testing.assert_allclose(padded, found, rtol=1e-12)


def test_the_mean_is_judged_by_mahalanobis_distance_to_the_nearest_class_beyond_what_is_usual() -> None:
    rng = np.random.default_rng(0)
    known, label = rng.normal(size=(60, 2, 3)), np.arange(60) % 2
    known[:, 0] += 3 * label[:, None]
    others, new = rng.normal(size=(2, 40, 2, 3))
    known[:, 1] = others[:, 1] = new[:, 1] = 0  # the deviations say nothing
    density = fit_density(known, label, others)
    around = known[:, 0] - np.stack([known[label == one, 0].mean(axis=0) for one in (0, 1)])[label]
    sample = around.T @ around / 60
    # Ledoit and Wolf (2004), section 3.2: towards the mean variance m by b2 / d2.
    m = np.trace(sample) / 3
    d2 = ((sample - m * np.eye(3)) ** 2).sum()
    b2 = min(d2, sum(((np.outer(one, one) - sample) ** 2).sum() for one in around) / 60**2)
    precision = np.linalg.inv(b2 / d2 * m * np.eye(3) + (1 - b2 / d2) * sample)

    def squared(values: np.ndarray) -> np.ndarray:
        centres = [known[label == one, 0].mean(axis=0) for one in (0, 1)]
        return np.min([[(one - centre) @ precision @ (one - centre) for one in values] for centre in centres], axis=0)

    low, high = np.quantile(squared(others[:, 0]), [0.25, 0.75])
    expected = np.maximum(squared(new[:, 0]) - high, 0) / (high - low)
    np.testing.assert_allclose(density.excess(new), expected, rtol=1e-6)
    assert 0.05 < (expected > 0).mean() < 0.6


def test_deviations_are_judged_in_the_components_that_hold_four_fifths_of_their_variance() -> None:
    rng = np.random.default_rng(0)
    turned = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    known = np.zeros((4000, 2, 4))
    known[:, 1] = rng.normal(size=(4000, 4)) * np.sqrt([5.0, 3.5, 1.0, 0.5]) @ turned
    label = np.zeros(4000, int)
    others = np.zeros((4000, 2, 4))
    others[:, 1] = rng.normal(size=(4000, 4)) * np.sqrt([5.0, 3.5, 1.0, 0.5]) @ turned
    density = fit_density(known, label, others)
    scaled = known[:, 1] / known[:, 1].std(axis=0)
    variance, axes = np.linalg.eigh(np.cov(scaled.T))
    kept = np.cumsum(variance[::-1]) / variance.sum() < 0.8
    count = kept.sum() + 1
    assert count < 4
    expected = (others[:, 1] / known[:, 1].std(axis=0) - scaled.mean(axis=0)) @ axes[:, ::-1][:, :count]
    expected = (expected**2 / variance[::-1][:count]).sum(axis=1)
    low, high = np.quantile(expected, [0.25, 0.75])
    np.testing.assert_allclose(density.excess(others), np.maximum(expected - high, 0) / (high - low), rtol=1e-6)


def test_evidence_falls_with_the_excess_and_the_call_stays(density: Density) -> None:
    rng = np.random.default_rng(2)
    alpha = (1 + rng.gamma(1.0, 10.0, (50, 3))).astype(np.float32)
    new = _summaries(_bags(rng, 50, shift=1.0)[0])
    excess = density.excess(new)
    assert (excess == 0).any()
    assert (excess > 1).any()
    found = density.scale_evidence(_evidence(alpha), new)
    expected = 1 + np.exp(-excess)[:, None] * (alpha - 1)
    np.testing.assert_allclose(found.alpha, expected, rtol=1e-6)
    np.testing.assert_allclose(found.vacuity, 3 / expected.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(found.probs, expected / expected.sum(axis=1, keepdims=True), rtol=1e-6)
    assert (found.probs.argmax(axis=1) == alpha.argmax(axis=1)).all()
    np.testing.assert_array_equal(found.alpha[excess == 0], alpha[excess == 0])
    np.testing.assert_allclose(found.density_excess, excess, rtol=1e-6)
    drawn = rng.dirichlet(np.asarray(found.alpha[0], np.float64), 200_000)
    entropy = -(drawn * np.log(np.maximum(drawn, 1e-300))).sum(axis=1)
    assert float(found.expected_entropy[0]) == pytest.approx(entropy.mean(), abs=5 * entropy.std() / len(drawn) ** 0.5)


@pytest.mark.parametrize(("shift", "scale"), [(6.0, 1.0), (0.0, 0.5), (0.0, 2.0)])
def test_bags_of_another_mean_or_of_more_or_less_alike_instances_have_hardly_any_evidence(
    density: Density, shift: float, scale: float
) -> None:
    rng = np.random.default_rng(3)
    alpha = np.full((60, 3), 10.0, np.float32)
    vacuity = [
        density.scale_evidence(_evidence(alpha), _summaries(_bags(rng, 60, *how)[0])).vacuity
        for how in ((), (shift, scale))
    ]
    assert np.median(vacuity[0]) == pytest.approx(0.1)
    assert np.median(vacuity[1]) > 0.9
    assert auroc(np.repeat([False, True], 60), np.concatenate(vacuity)) > 0.98


def test_an_empty_bag_has_no_evidence(density: Density) -> None:
    empty = summary(np.ones((2, 1, FEATURES), np.float32), np.zeros((2, 1), bool))[None]
    found = density.scale_evidence(_evidence(np.full((1, 3), 10.0, np.float32)), empty)
    np.testing.assert_array_equal(found.vacuity, 1.0)


def test_features_that_never_vary_say_nothing() -> None:
    known = np.random.default_rng(0).normal(size=(20, 2, 3))
    known[:, :, 2] = 7.0
    density = fit_density(known, np.arange(20) % 3, known)
    assert np.isfinite(density.excess(known)).all()


def test_a_density_is_read_back_as_it_was_saved(density: Density, tmp_path: Path) -> None:
    density.save(tmp_path)
    for name, value in vars(load_density(tmp_path)).items():
        np.testing.assert_array_equal(value, getattr(density, name))


def test_a_save_that_is_cut_off_leaves_no_density(
    density: Density, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(path: Path, **arrays: np.ndarray) -> None:
        path.write_bytes(b"PK")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", cut_off)
    with pytest.raises(
        OutputError, match=r"cannot be written \(No space left on device\); free space or choose another --workdir"
    ):
        density.save(tmp_path)
    assert not is_fitted(tmp_path)


def test_too_few_bags_and_files_that_are_none_are_refused(density: Density, tmp_path: Path) -> None:
    known = np.zeros((20, 2, 3))
    with pytest.raises(
        InputError, match=r"20 training and 7 validation slides or cases are too few.*or choose evidential"
    ):
        fit_density(known, np.zeros(20, int), known[:7])
    with pytest.raises(InputError, match=r"has no density\.npz, which is written at the end of training"):
        load_density(tmp_path)
    (tmp_path / "density.npz").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"density\.npz: is damaged .* delete it"):
        load_density(tmp_path)
