"""A trial's tables, joined by scan, and combined to one row per patient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from crcjax.data.cohort import SlideRow
from crcjax.data.csv_table import is_missing, parse_number
from crcjax.errors import InputError
from crcjax.validation.leakage import StudySlide
from crcjax.validation.load_predictions import Predictions
from crcjax.validation.predictions_table import PredictionRow
from crcjax.validation.statistics import aggregate_cases
from crcjax.validation.study.plan import Plan, Population
from crcjax.validation.study.readings import Readings

# Splits of the model's development, whose cases prove nothing.
DEVELOPMENT = ("train", "val")


@dataclass(frozen=True)
class Scan:
    """A scan's row in the cohort, and its prediction; None if the table of predictions does not have it."""

    slide: SlideRow
    row: PredictionRow | None = None

    @property
    def is_ok(self) -> bool:
        """Whether the scan has a prediction."""
        return self.row is not None and self.row.is_ok

    @property
    def target(self) -> str:
        """The reference class; empty if it is unknown."""
        return self.slide.label or (self.row.target if self.row else "")

    def value(self, column: str) -> str:
        """What the cohort says in a column; empty if it says nothing."""
        known = {"case_id": self.slide.case_id, "site": self.slide.site, "scanner": self.slide.scanner}
        text = known[column] if column in known else self.slide.extra.get(column)
        text = text or (getattr(self.row, column, "") if column in ("site", "scanner") else "") or ""
        return "" if is_missing(text) else text


@dataclass(frozen=True)
class Patient:
    """The scans of a patient that a population holds."""

    case_id: str
    scans: tuple[Scan, ...]

    @property
    def evaluable(self) -> tuple[Scan, ...]:
        """The scans with a prediction."""
        return tuple(scan for scan in self.scans if scan.is_ok)

    @property
    def target(self) -> str:
        """The reference class; empty if it is unknown."""
        return next((scan.target for scan in self.scans if scan.target), "")

    def value(self, column: str) -> str:
        """The first of the scans' values that says something."""
        return next((value for scan in self.scans if (value := scan.value(column))), "")

    @property
    def is_of_development(self) -> bool:
        """Whether the model was fitted or chosen on the patient; cross-validation predicts its cases by other runs."""
        if any(scan.row.fold for scan in self.scans if scan.row):
            return any(scan.row.split in DEVELOPMENT for scan in self.scans if scan.row)
        splits = [scan.slide.split for scan in self.scans]
        return any(split in DEVELOPMENT for split in (*splits, *(scan.row.split for scan in self.scans if scan.row)))


@dataclass(frozen=True)
class Cases:
    """Patients with a prediction and a reference, as arrays in one order.

    Attributes:
      patients: the patients.
      classes: the names of the classes.
      label: the reference classes.
      probs: the probabilities, combined over the scans of each patient.
      call: the predicted classes: the table's call of a patient with one scan, otherwise the most probable class.
    """

    patients: tuple[Patient, ...]
    classes: tuple[str, ...]
    label: Int[np.ndarray, " case"]
    probs: Float[np.ndarray, "case class"]
    call: Int[np.ndarray, " case"]

    def __len__(self) -> int:
        return len(self.patients)

    @property
    def case_ids(self) -> list[str]:
        """The patients' ids."""
        return [patient.case_id for patient in self.patients]

    def values(self, column: str) -> np.ndarray:
        """A column of the cohort, as texts; empty where it says nothing."""
        return np.array([patient.value(column) for patient in self.patients], dtype=str)

    def numbers(self, column: str) -> Float[np.ndarray, " case"]:
        """A column of the cohort, as numbers; NaN where it says nothing. Raises InputError for other text."""
        return np.array([number_of(patient, column) for patient in self.patients], float)

    def measure(self, name: str) -> Float[np.ndarray, " case"]:
        """The mean of an uncertainty over the scans of each patient; NaN where a scan lacks it."""
        values = [
            [np.nan if getattr(scan.row, name) is None else getattr(scan.row, name) for scan in patient.evaluable]
            for patient in self.patients
        ]
        return np.array([np.mean(of_patient) for of_patient in values], float)

    def subset(self, chosen: np.ndarray) -> Cases:
        """The chosen patients, by a mask or by indices."""
        places = np.arange(len(self))[chosen]
        patients = tuple(self.patients[place] for place in places)
        return Cases(patients, self.classes, self.label[places], self.probs[places], self.call[places])


@dataclass(frozen=True)
class Trial:
    """The tables of a study.

    Attributes:
      plan: the analysis plan.
      scans: one for each row of the cohort.
      not_in_cohort: the number of predicted scans that the cohort lacks.
      comparator, without_normalisation, calibration: further tables of predictions, where the plan names them.
      readings: the reader study.
      training: the slides that the model was developed on; None if the plan does not name them.
      embeddings: of slides, by slide id; None if the plan does not name them.
      synthetic: whether any table says that its slides are painted or simulated.
      has_probabilities: False if the system states calls alone.
    """

    plan: Plan
    scans: tuple[Scan, ...]
    not_in_cohort: int = 0
    comparator: Predictions | None = None
    without_normalisation: Predictions | None = None
    calibration: Predictions | None = None
    readings: Readings | None = None
    training: tuple[StudySlide, ...] | None = None
    embeddings: Mapping[str, Float[np.ndarray, " feature"]] | None = None
    synthetic: bool = False
    has_probabilities: bool = True

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes in the plan's order."""
        return tuple(self.plan.classes)

    def patients(self, population: Population | None = None) -> tuple[Patient, ...]:
        """The patients of a population, by default of all rows of the cohort, in the cohort's order."""
        scans: dict[str, list[Scan]] = {}
        for scan in self.scans:
            if population is None or _is_in(scan, population):
                scans.setdefault(scan.slide.case_id, []).append(scan)
        return tuple(Patient(case_id, tuple(of_case)) for case_id, of_case in scans.items())

    def cases(self, population: Population) -> Cases:
        """The evaluable patients of a population that have a reference and played no part in the model's development."""
        patients = [
            patient
            for patient in self.patients(population)
            if patient.target and patient.evaluable and not patient.is_of_development
        ]
        return combine_scans(patients, self.classes, self.plan.patients.aggregation)

    @property
    def primary(self) -> Population:
        """The primary population."""
        return self.plan.populations[0]


def combine_scans(patients: Sequence[Patient], classes: Sequence[str], aggregation: str) -> Cases:
    """Combines the scans of each patient by the plan's rule."""
    names, places = tuple(classes), {name: place for place, name in enumerate(classes)}
    rows = [[scan.row for scan in patient.evaluable if scan.row] for patient in patients]
    if aggregation == "first_scan":
        rows = [of_patient[:1] for of_patient in rows]
    scan_probs = np.array([row.probs for of_patient in rows for row in of_patient]).reshape(-1, len(names))
    of_scan = [str(place) for place, of_patient in enumerate(rows) for _ in of_patient]
    if aggregation == "mean_probability":
        counts = np.array([len(of_patient) for of_patient in rows])
        probs = np.add.reduceat(scan_probs, np.cumsum(counts) - counts) / counts[:, None] if len(rows) else scan_probs
    else:
        probs = aggregate_cases(of_scan, scan_probs)[1] if len(rows) else scan_probs
    call = probs.argmax(axis=1) if len(rows) else np.zeros(0, int)
    for place, of_patient in enumerate(rows):
        if len(of_patient) == 1:
            # A system may decide by thresholds of its own.
            call[place] = places[of_patient[0].call]
            probs[place] = of_patient[0].probs
    label = np.array([places[patient.target] for patient in patients], int)
    return Cases(tuple(patients), names, label, probs, call)


def number_of(patient: Patient, column: str) -> float:
    """A patient's number in a column of the cohort; NaN if it is empty. Raises InputError for other text."""
    text = patient.value(column)
    if not text:
        return np.nan
    try:
        return parse_number(text)
    except ValueError as error:
        raise InputError(
            f"the cohort's column {column} must hold numbers, got {text!r} for case {patient.case_id}; correct it, or leave it "
            "empty"
        ) from error


def _is_in(scan: Scan, population: Population) -> bool:
    return all(
        scan.value(column) in ([values] if isinstance(values, str) else values)
        for column, values in population.where.items()
    )
