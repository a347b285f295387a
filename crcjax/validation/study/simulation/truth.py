"""The model that simulated trials are sampled from: what is put in, and what should come out."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

CLASSES = ("canonical", "immune", "stromal")
SITES = ("Aberdale", "Brightwell", "Castleford", "Dunmore")
SCANNERS = ("scanner A", "scanner B", "scanner C")


@dataclass(frozen=True)
class Truth:
    """Parameters of the model. Scores are on a scale where patients of one class have a standard deviation of 1.

    Attributes:
      prevalence: of the classes.
      separation: by how much the score of a patient's own class exceeds the others'.
      glass_noise, scan_noise: standard deviations of the score between glass slides of a patient, and between scans.
      scanner_shift: of each scanner and class, with stain normalisation.
      scanner_shift_without: the same without normalisation.
      site_shift: of each site, against the score of the patient's own class.
      temperature: the stated probabilities are too sure by this factor; a fitted temperature should return it.
      reliability: how often the reference calls the true class, by its confidence.
      low_confidence: the share of references of low confidence.
      other_reliability: the same for a second molecular call.
      comparator_separation, reader_separation: as `separation`.
      hazard_ratio: of each class against the first, by outcome.
      score_hazard_ratio: of a point of the clinical risk score.
      arm_hazard_ratio: of the second arm; the same in every class.
      embedding_scanner_shift: the distance of a scanner's slides from others in each direction of the embeddings, in
        standard deviations of their noise; 0 leaves no signal of the scanner beyond that of the scores.
      median: of the first class with a score of 2, in months, by outcome.
    """

    prevalence: tuple[float, ...] = (0.50, 0.19, 0.31)
    separation: float = 2.3
    glass_noise: float = 0.35
    scan_noise: float = 0.15
    scanner_shift: tuple[tuple[float, ...], ...] = ((0.0, 0.0, 0.0), (0.1, -0.05, 0.0), (-0.05, 0.0, 0.1))
    scanner_shift_without: tuple[tuple[float, ...], ...] = ((0.0, 0.0, 0.0), (0.9, -0.3, -0.4), (-0.5, -0.1, 0.8))
    site_shift: tuple[float, ...] = (0.15, 0.0, -0.15, -0.35)
    temperature: float = 1.5
    reliability: dict[str, float] = field(default_factory=lambda: {"high": 0.96, "low": 0.80})
    low_confidence: float = 0.25
    other_reliability: float = 0.88
    comparator_separation: float = 1.8
    reader_separation: float = 1.1
    hazard_ratio: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {"pfs": (1.0, 0.37, 0.65), "os": (1.0, 0.45, 0.80)}
    )
    score_hazard_ratio: float = 1.25
    arm_hazard_ratio: float = 1.2
    embedding_scanner_shift: float = 0.7
    median: dict[str, float] = field(default_factory=lambda: {"pfs": 18.0, "os": 55.0})

    @property
    def reference_reliability(self) -> float:
        """How often the reference calls the true class."""
        low = self.low_confidence
        return self.reliability["high"] * (1 - low) + self.reliability["low"] * low

    @property
    def score_variance(self) -> float:
        """The variance of a scan's score within a class."""
        return 1 + self.glass_noise**2 + self.scan_noise**2

    def probabilities(self, score: Float[np.ndarray, "*scan class"]) -> Float[np.ndarray, "*scan class"]:
        """The probabilities that the simulated system states: the true ones at the inverse temperature."""
        logits = score * self.separation / self.score_variance + np.log(self.prevalence)
        return softmax(self.temperature * logits)


@dataclass(frozen=True)
class Sampled:
    """The patients of a simulated trial; `score` is the mean of the patient's glass slides, by class."""

    true: Int[np.ndarray, " patient"]
    reference: Int[np.ndarray, " patient"]
    confidence: np.ndarray
    other: Int[np.ndarray, " patient"]
    site: Int[np.ndarray, " patient"]
    score: Float[np.ndarray, "patient class"]
    risk_score: Int[np.ndarray, " patient"]
    arm: Int[np.ndarray, " patient"]


def sample_patients(truth: Truth, count: int, rng: np.random.Generator) -> Sampled:
    """Samples patients: classes, references, sites, scores and clinical data."""
    classes = len(truth.prevalence)
    true = rng.choice(classes, count, p=truth.prevalence)
    site = rng.choice(len(SITES), count, p=(0.35, 0.30, 0.20, 0.15))
    confidence = np.where(rng.random(count) < truth.low_confidence, "low", "high")
    reliable = np.array([truth.reliability[word] for word in confidence])
    score = rng.normal(size=(count, classes))
    score[np.arange(count), true] += truth.separation + np.array(truth.site_shift)[site]
    return Sampled(
        true,
        _with_errors(true, reliable, classes, rng),
        confidence,
        _with_errors(true, np.full(count, truth.other_reliability), classes, rng),
        site,
        score,
        rng.binomial(5, 0.4, count),
        rng.integers(0, 2, count),
    )


def weaker_calls(
    sampled: Sampled, truth: Truth, separation: float, shared: float, rng: np.random.Generator
) -> Float[np.ndarray, "patient class"]:
    """Scores of a weaker judge, who sees a `shared` part of the system's noise: a comparator, or a reader."""
    rows = np.arange(len(sampled.true))
    noise = sampled.score.copy()
    noise[rows, sampled.true] -= truth.separation + np.array(truth.site_shift)[sampled.site]
    score = shared * noise + np.sqrt(1 - shared**2) * rng.normal(size=noise.shape)
    score[rows, sampled.true] += separation
    return score


def sample_times(
    truth: Truth, sampled: Sampled, outcome: str, rng: np.random.Generator
) -> tuple[Float[np.ndarray, " patient"], Int[np.ndarray, " patient"]]:
    """Exponential times to an event in months, by the true class, and censoring when the study ends after 24 to 84 months."""
    hazard = np.log(2) / truth.median[outcome]
    hazard = hazard * np.array(truth.hazard_ratio[outcome])[sampled.true]
    hazard = hazard * truth.score_hazard_ratio ** (sampled.risk_score - 2) * truth.arm_hazard_ratio**sampled.arm
    time, end = rng.exponential(1 / hazard), rng.uniform(24, 84, len(hazard))
    return np.minimum(time, end), (time <= end).astype(int)


def softmax(logits: Float[np.ndarray, "*scan class"]) -> Float[np.ndarray, "*scan class"]:
    """Probabilities of logits."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def _with_errors(
    true: Int[np.ndarray, " patient"],
    reliability: Float[np.ndarray, " patient"],
    classes: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " patient"]:
    """Calls that are the true class with the stated probability, and otherwise any other."""
    other = (true + rng.integers(1, classes, len(true))) % classes
    return np.where(rng.random(len(true)) < reliability, true, other)
