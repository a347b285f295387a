"""Temperature, conformal sets and limits, fitted on calibration or validation cases and stored in calibration.json."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar

from crcjax.data.cohort import CALIBRATION, LABEL, load_cohort
from crcjax.errors import InputError
from crcjax.validation.conformal import conformal_threshold, nonconformity
from crcjax.validation.limits import SHARE, Limits, fit_limits
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import probabilities_of
from crcjax.validation.statistics import entropy
from crcjax.validation.whole_files import write_whole

# Methods of `crcjax calibrate`.
METHODS = ("lac", "aps")
# Temperatures are fitted within [1 / HOTTEST, HOTTEST]; a value beyond would rest on a few cases.
HOTTEST = 10.0


@dataclass(frozen=True)
class Calibration:
    """A temperature and the thresholds of conformal sets.

    Attributes:
      model: the id of the model that predicted.
      classes: the classes in the order of the probabilities.
      temperature: divides the log-probabilities.
      method: "lac" or "aps".
      error: the share of sets that may miss the true class.
      thresholds: by site, the largest nonconformity score of a class in a set; the site "" stands for all other sites.
      cases: the number of cases that each threshold was fitted on.
      limits: beyond them a slide is not evaluable; None in calibrations of earlier versions, and if there shall be none.
    """

    model: str
    classes: tuple[str, ...]
    temperature: float
    method: str
    error: float
    thresholds: dict[str, float]
    cases: dict[str, int]
    limits: Limits | None = None

    @property
    def id(self) -> str:
        """The first 12 hex digits of the SHA-256 of all values."""
        return hashlib.sha256(json.dumps(_plain(self), sort_keys=True).encode()).hexdigest()[:12]

    def probs(self, probs: Float[np.ndarray, "slide class"]) -> Float[np.ndarray, "slide class"]:
        """Returns the probabilities at the temperature."""
        return at_temperature(probs, self.temperature)

    def set_of(self, probs: Float[np.ndarray, " class"], slide_id: str, site: str | None) -> tuple[str, ...]:
        """The conformal set of a slide, which may be empty; `probs` are those of the model, without the temperature."""
        scores = nonconformity(probs[None], self.method, np.array([_uniform(slide_id)]))[0]
        threshold = self.thresholds.get(site or "", self.thresholds[""])
        return tuple(name for name, score in zip(self.classes, scores, strict=True) if score <= threshold)


def calibrate(
    predictions_csv: Path,
    cohort_csv: Path,
    out: Path,
    *,
    method: str,
    error: float,
    by_site: bool,
    reject: float = SHARE,
) -> Calibration:
    """Fits a calibration on held-out cases and writes calibration.json.

    The cases are those of the cohort's split `calibration` that the run did not train on. Without that split they are the
    run's validation cases. Only the first slide of each case counts, so that the cases are independent. The test cases are not
    used: they will evaluate the model.

    Args:
      predictions_csv: predictions of these slides, made without a calibration.
      cohort_csv: the table with the reference labels, and the sites for `by_site`.
      out: the file, written whole or not at all.
      method: "lac" or "aps" (`nonconformity`).
      error: the share of sets that may miss the true class, between 0 and 1.
      by_site: fits a separate threshold for each site with enough cases.
      reject: the share of slides like these that each limit may refuse (`fit_limits`), from 0, without limits, to below 1.

    Raises:
      InputError: an argument is out of range, or the tables have no validation cases of one uncalibrated model.
      OutputError: the file cannot be written.
    """
    if method not in METHODS or not 0 < error < 1:
        raise InputError(f"--method must be lac or aps and --error between 0 and 1, got {method} and {error}")
    if not 0 <= reject < 1:
        raise InputError(f"--reject must be at least 0 and below 1, got {reject}; try {SHARE}")
    predictions = load_predictions(predictions_csv)
    cohort = {
        row.slide_id: row for row in load_cohort(cohort_csv, predictions.classes, predictions.target_name or LABEL).rows
    }
    in_cohort = [row for row in predictions.evaluable if row.slide_id in cohort]
    usable = [row for row in in_cohort if not row.split and cohort[row.slide_id].split == CALIBRATION]
    usable = usable or [row for row in in_cohort if row.split == "val"]
    rows = {cohort[row.slide_id].case_id: row for row in reversed(usable) if cohort[row.slide_id].label}
    if any(row.calibration for row in rows.values()):
        raise InputError(f"{predictions_csv}: is calibrated already; predict without --calibration first")
    models = {row.model for row in rows.values()}
    if len(models) != 1:
        raise InputError(
            f"{predictions_csv}: has {'no' if not models else 'several models for the'} validation cases of "
            f"{cohort_csv}; predict the run's validation slides, or those of the split {CALIBRATION}, with one model"
        )
    slides = [cohort[row.slide_id] for row in rows.values()]
    label = np.array([predictions.classes.index(slide.label or "") for slide in slides])
    probs = probabilities_of(list(rows.values()))
    temperature = fit_temperature(probs, label)
    uniforms = np.array([_uniform(slide.slide_id) for slide in slides])
    # Scores use the model's probabilities: a temperature fitted on the same cases would make their scores too small.
    scores = nonconformity(probs, method, uniforms)[np.arange(len(label)), label]
    groups = {"": scores}
    if by_site:
        sites = np.array([slide.site or "" for slide in slides])
        groups |= {site: scores[sites == site] for site in sorted(set(sites.tolist()) - {""})}
    thresholds = {name: conformal_threshold(values, error) for name, values in groups.items()}
    thresholds = {name: value for name, value in thresholds.items() if math.isfinite(value) or not name}
    cases = {name: len(groups[name]) for name in thresholds}
    scaled = at_temperature(probs, temperature)
    at_scale = [
        replace(row, probs=tuple(values), entropy=entropy(values))
        for row, values in zip(rows.values(), scaled, strict=True)
    ]
    limits = fit_limits(at_scale, reject) if reject else None
    calibration = Calibration(models.pop(), predictions.classes, temperature, method, error, thresholds, cases, limits)
    write_whole({out: json.dumps(_thresholds_as_text(_plain(calibration)), indent=1) + "\n"})
    return calibration


def load_calibration(source: Path | Calibration, model: str, classes: tuple[str, ...]) -> Calibration:
    """The calibration of a model, read from calibration.json unless it is read already.

    Raises InputError if the file is damaged, or the calibration is of another model or other classes.
    """
    if isinstance(source, Calibration):
        calibration, name = source, "the calibration"
    else:
        calibration, name = read_calibration(source), str(source)
    if (calibration.model, calibration.classes) != (model, classes):
        raise InputError(
            f"{name}: is of model {calibration.model}, not {model}; predict the validation slides with this one, and calibrate"
        )
    return calibration


def read_calibration(path: Path, content: bytes | None = None) -> Calibration:
    """Reads calibration.json, or its content that was read already. Raises InputError if the file is damaged."""
    try:
        values = json.loads(path.read_bytes() if content is None else content)
        thresholds = {name: float(value) for name, value in values["thresholds"].items()}
        values |= {"classes": tuple(values["classes"]), "thresholds": {"": thresholds[""]} | thresholds}
        if limits := values.get("limits"):
            largest = {name: float(value) for name, value in limits["largest"].items()}
            values["limits"] = Limits(float(limits["share"]), limits["slides"], largest, tuple(limits["stain"]))
        return Calibration(**values)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is not a calibration ({error}); make it with crcjax calibrate") from error


def at_temperature(probs: Float[np.ndarray, "slide class"], temperature: float) -> Float[np.ndarray, "slide class"]:
    """Softmax of the log-probabilities divided by the temperature (Guo et al. 2017, section 4.2), for any model."""
    logits = np.log(np.maximum(probs, 1e-15)) / temperature
    scaled = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return scaled / scaled.sum(axis=-1, keepdims=True)


def fit_temperature(probs: Float[np.ndarray, "case class"], label: Int[np.ndarray, " case"]) -> float:
    """The temperature with the least mean negative log-likelihood within [1 / HOTTEST, HOTTEST]."""

    def loss(log_temperature: float) -> float:
        scaled = at_temperature(probs, math.exp(log_temperature))[np.arange(len(label)), label]
        return -float(np.log(np.maximum(scaled, 1e-300)).mean())

    limit = math.log(HOTTEST)
    return math.exp(minimize_scalar(loss, bounds=(-limit, limit), method="bounded", options={"xatol": 1e-5}).x)


def _uniform(slide_id: str) -> float:
    """A number from 0 to 1 that depends only on the slide's id, so that the slide always gets the same set."""
    return int.from_bytes(hashlib.sha256(slide_id.encode()).digest()[:6]) / 2**48


def _plain(calibration: Calibration) -> dict:
    """All values; without limits, those of earlier versions, so that the id stays the same."""
    return {name: value for name, value in asdict(calibration).items() if name != "limits" or value is not None}


def _thresholds_as_text(values: dict) -> dict:
    """Replaces the thresholds by their texts, since JSON has no infinity."""
    return values | {"thresholds": {name: str(value) for name, value in values["thresholds"].items()}}
