"""The tables of a simulated trial: cohort, predictions, comparator, readers, calibration and development."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from crcjax.slides.tiling.qc_result import REFUSED
from crcjax.validation.predictions_table import FAILED, NOT_EVALUABLE, OK, PredictionRow
from crcjax.validation.study.simulation.truth import (
    CLASSES,
    SCANNERS,
    SITES,
    Sampled,
    Truth,
    sample_patients,
    sample_times,
    weaker_calls,
)

READERS = ("reader 1", "reader 2", "reader 3", "reader 4", "reader 5")
# The scanner that each site uses, by place.
_SCANNER_OF_SITE = (0, 1, 2, 0)
# Numbers of an embedding, and slides of the simulated development.
EMBEDDING, TRAINING = 32, 240
# Patients who drop out on the way to the analysis.
PRIMARY_TUMOUR, WITHOUT_SLIDE, REFUSED_SLIDE, FAILED_SLIDE, WITHOUT_REFERENCE = 4, 3, 2, 1, 3
DROPPED = PRIMARY_TUMOUR + WITHOUT_SLIDE + REFUSED_SLIDE + FAILED_SLIDE + WITHOUT_REFERENCE


@dataclass
class Tables:
    """Rows of every table by its name, as texts or as rows of predictions; embeddings by slide id."""

    cohort: list[dict[str, str]] = field(default_factory=list)
    predictions: list[PredictionRow] = field(default_factory=list)
    without_normalisation: list[PredictionRow] = field(default_factory=list)
    comparator: list[PredictionRow] = field(default_factory=list)
    calibration: list[PredictionRow] = field(default_factory=list)
    readers: list[dict[str, str]] = field(default_factory=list)
    training: list[dict[str, str]] = field(default_factory=list)
    embeddings: dict[str, Float[np.ndarray, " feature"]] = field(default_factory=dict)


def simulate_tables(truth: Truth, analysed: int, rng: np.random.Generator) -> Tables:
    """Samples all tables of a trial in which `analysed` patients reach the analysis, and `DROPPED` do not."""
    sampled, tables = sample_patients(truth, analysed + DROPPED, rng), Tables()
    clinical = _clinical(truth, sampled, rng)
    order = rng.permutation(len(sampled.true))
    dropped = dict(zip(order[:DROPPED].tolist(), _reasons(), strict=True))
    rescanned = set(order[DROPPED : DROPPED + 60].tolist())
    for place in range(len(sampled.true)):
        _add_patient(place, truth, sampled, clinical[place], dropped.get(place, ""), place in rescanned, tables, rng)
    _add_comparator(truth, sampled, tables, rng)
    _add_readers(truth, sampled, order[DROPPED : DROPPED + 80].tolist(), tables, rng)
    _add_calibration(truth, tables, rng)
    training = _add_training(truth, tables, rng)
    _add_embeddings(truth, tables, [*tables.predictions, *training], rng)
    return tables


def _reasons() -> list[str]:
    counts = {
        "primary tumour": PRIMARY_TUMOUR,
        "no slide": WITHOUT_SLIDE,
        "refused": REFUSED_SLIDE,
        "failed": FAILED_SLIDE,
        "no reference": WITHOUT_REFERENCE,
    }
    return [reason for reason, count in counts.items() for _ in range(count)]


def _clinical(truth: Truth, sampled: Sampled, rng: np.random.Generator) -> list[dict[str, str]]:
    count = len(sampled.true)
    times = {outcome: sample_times(truth, sampled, outcome, rng) for outcome in truth.median}
    age = rng.normal(64, 10, count).clip(30, 88)
    columns = {
        "age": [f"{value:.0f}" for value in age],
        "age_band": np.where(age < 60, "under 60", np.where(age < 70, "60 to 69", "70 and over")).tolist(),
        "sex": rng.choice(["female", "male"], count, p=(0.4, 0.6)).tolist(),
        "side": rng.choice(["left", "right"], count, p=(0.68, 0.32)).tolist(),
        "pre_treated": rng.choice(["yes", "no"], count, p=(0.7, 0.3)).tolist(),
        "msi": rng.choice(["MSS", "MSI", ""], count, p=(0.88, 0.05, 0.07)).tolist(),
        "risk_score": [str(value) for value in sampled.risk_score],
        "arm": np.where(sampled.arm == 1, "chemotherapy and cetuximab", "chemotherapy").tolist(),
        "ref_method": rng.choice(["array", "RNA-seq"], count, p=(0.7, 0.3)).tolist(),
        "ref_confidence": sampled.confidence.tolist(),
        "second_call": [
            CLASSES[k] if known else "" for k, known in zip(sampled.other, rng.random(count) > 0.08, strict=True)
        ],
    }
    for outcome, (time, event) in times.items():
        columns[f"{outcome}_months"] = [f"{value:.2f}" for value in time]
        columns[f"{outcome}_event"] = [str(value) for value in event]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _add_patient(
    place: int,
    truth: Truth,
    sampled: Sampled,
    clinical: dict[str, str],
    dropped: str,
    is_rescanned: bool,
    tables: Tables,
    rng: np.random.Generator,
) -> None:
    """Adds the scans of one patient to the cohort and the predictions: one or two glass slides, of which one is rescanned."""
    case, site = f"SIM-{place + 1:03d}", int(sampled.site[place])
    own = _SCANNER_OF_SITE[site]
    for glass in range(1 + int(rng.random() < 0.4)):
        glass_score = sampled.score[place] + truth.glass_noise * rng.normal(size=len(CLASSES))
        plan = [(own, 1)]
        if is_rescanned and glass == 0:
            plan += [
                (scanner, repeat)
                for scanner in range(len(SCANNERS))
                for repeat in (1, 2)
                if (scanner, repeat) != (own, 1)
            ]
        for scanner, repeat in plan:
            slide = f"{case}-{glass + 1}-{'ABC'[scanner]}{repeat}"
            reference = "" if dropped == "no reference" else CLASSES[sampled.reference[place]]
            row = {"slide_id": slide, "case_id": case, "site": SITES[site], "scanner": SCANNERS[scanner]}
            row |= {"subtype": reference, "glass_slide": f"{case}-{glass + 1}", "repeat": str(repeat)}
            row |= {"scan_date": _date(2020, place)}
            row |= {"primary_scan": "yes" if (scanner, repeat) == (own, 1) else "no"}
            row |= {"specimen_site": "primary tumour" if dropped == "primary tumour" else "liver metastasis"}
            tables.cohort.append(row | clinical)
            if dropped == "no slide":
                continue
            noise = truth.scan_noise * rng.normal(size=len(CLASSES))
            for rows, shifts in (
                (tables.predictions, truth.scanner_shift),
                (tables.without_normalisation, truth.scanner_shift_without),
            ):
                score = glass_score + np.array(shifts[scanner]) + noise
                rows.append(_prediction(slide, case, truth, score, row, dropped))


def _prediction(
    slide: str, case: str, truth: Truth, score: Float[np.ndarray, " class"], row: dict[str, str], dropped: str
) -> PredictionRow:
    ids: dict[str, Any] = {
        "site": row["site"],
        "scanner": row["scanner"],
        "target": row["subtype"],
        "slide_sha256": _sha256(slide),
    }
    ids |= {"bundle_id": _sha256("bundle"), "model": "simulated", "pipeline_id": _sha256("pipeline")[:12]}
    if dropped == "refused":
        reason = "no_tissue: no stained tissue was found"
        qc: dict[str, Any] = {"qc_verdict": REFUSED, "qc_coverage": 0.0, "qc_reasons": "no stained tissue was found"}
        return PredictionRow(slide, case, NOT_EVALUABLE, reason=reason, synthetic=True, **ids, **qc)
    if dropped == "failed":
        return PredictionRow(slide, case, FAILED, reason="corrupt: the file ends early", synthetic=True, **ids)
    probs = truth.probabilities(score)
    evidence = 40 * np.exp(-((np.sort(score)[-1] - truth.separation) ** 2) / 4) + 2
    alpha = 1 + evidence * probs
    entropy = float(-(probs * np.log(np.maximum(probs, 1e-15))).sum())
    # Half of the entropy beyond certainty is the disagreement of an ensemble.
    mutual_information = 0.25 * entropy
    return PredictionRow(
        *(slide, case, OK),
        call=CLASSES[int(probs.argmax())],
        probs=tuple(probs.tolist()),
        alpha=tuple(alpha.tolist()),
        vacuity=float(len(CLASSES) / alpha.sum()),
        entropy=entropy,
        expected_entropy=entropy - mutual_information,
        mutual_information=mutual_information,
        qc_verdict="accept",
        qc_coverage=0.9,
        synthetic=True,
        seconds={"total": 40.0},
        regions=120,
        **ids,
    )


def _add_comparator(truth: Truth, sampled: Sampled, tables: Tables, rng: np.random.Generator) -> None:
    """One prediction for each patient, by a system of less separation."""
    score = weaker_calls(sampled, truth, truth.comparator_separation, 0.6, rng)
    logits = score * truth.comparator_separation + np.log(truth.prevalence)
    probs = np.exp(logits - logits.max(axis=1, keepdims=True))
    probs /= probs.sum(axis=1, keepdims=True)
    for place, of_patient in enumerate(probs):
        case = f"SIM-{place + 1:03d}"
        tables.comparator.append(
            PredictionRow(
                case, case, OK, call=CLASSES[int(of_patient.argmax())], probs=tuple(of_patient.tolist()), synthetic=True
            )
        )


def _add_readers(
    truth: Truth, sampled: Sampled, cases: Sequence[int], tables: Tables, rng: np.random.Generator
) -> None:
    """Five readers read 80 patients, and half of these again."""
    for reader in READERS:
        score = weaker_calls(sampled, truth, truth.reader_separation, 0.5, rng)
        for repeat in (1, 2):
            read = cases if repeat == 1 else cases[: len(cases) // 2]
            noisy = score + 0.5 * rng.normal(size=score.shape)
            for place in read:
                call = CLASSES[int(noisy[place].argmax())]
                row = {"case_id": f"SIM-{place + 1:03d}", "reader": reader, "repeat": str(repeat), "call": call}
                tables.readers.append(row)


def _add_calibration(truth: Truth, tables: Tables, rng: np.random.Generator, count: int = 160) -> None:
    """Patients that are not evaluated, for the temperature and for sets of classes."""
    sampled = sample_patients(truth, count, rng)
    noise = np.hypot(truth.glass_noise, truth.scan_noise)
    for place in range(count):
        slide, site = f"CAL-{place + 1:03d}", int(sampled.site[place])
        scanner = _SCANNER_OF_SITE[site]
        score = sampled.score[place] + np.array(truth.scanner_shift[scanner]) + noise * rng.normal(size=len(CLASSES))
        row = {"site": SITES[site], "scanner": SCANNERS[scanner], "subtype": CLASSES[sampled.reference[place]]}
        tables.calibration.append(_prediction(slide, slide, truth, score, row, ""))


def _add_training(truth: Truth, tables: Tables, rng: np.random.Generator) -> list[PredictionRow]:
    """Patients whom the model was developed on, a year before the trial; their predictions are for their embeddings."""
    sampled, rows = sample_patients(truth, TRAINING, rng), []
    noise = np.hypot(truth.glass_noise, truth.scan_noise)
    for place in range(TRAINING):
        slide, site = f"DEV-{place + 1:03d}", int(sampled.site[place])
        scanner = _SCANNER_OF_SITE[site]
        score = sampled.score[place] + np.array(truth.scanner_shift[scanner]) + noise * rng.normal(size=len(CLASSES))
        row = {"site": SITES[site], "scanner": SCANNERS[scanner], "subtype": CLASSES[sampled.reference[place]]}
        rows.append(_prediction(slide, slide, truth, score, row, ""))
        facts = {"split": "val" if place % 5 == 4 else "train", "label": row["subtype"], "block_id": f"{slide}-1"}
        facts |= {"site": row["site"], "scanner": row["scanner"], "date": _date(2018, place)}
        tables.training.append({"slide_id": slide, "case_id": slide, **facts, "content_hash": _sha256(slide)})
    return rows


def _add_embeddings(truth: Truth, tables: Tables, rows: Sequence[PredictionRow], rng: np.random.Generator) -> None:
    """Embeddings that hold what the probabilities say, the scanner, and noise."""
    directions = rng.normal(size=(len(CLASSES), EMBEDDING)) / np.sqrt(len(CLASSES))
    of_scanner = truth.embedding_scanner_shift * rng.choice([-1, 1], (len(SCANNERS), EMBEDDING))
    for row in rows:
        if row.is_ok:
            logs = np.log(np.maximum(row.probs, 1e-15))
            embedding = 0.3 * (logs - logs.mean()) @ directions + of_scanner[SCANNERS.index(row.scanner)]
            tables.embeddings[row.slide_id] = (embedding + rng.normal(size=EMBEDDING)).round(4)


def _date(year: int, place: int) -> str:
    """One of 336 days of a year, by the patient's place."""
    return f"{year}-{place // 28 % 12 + 1:02d}-{place % 28 + 1:02d}"


def _sha256(text: str) -> str:
    return hashlib.sha256(f"simulated {text}".encode()).hexdigest()
