"""The analysis plan: everything that is decided before the results are seen, as typed values of one TOML file.

Every field states its meaning here; docs/validation.md shows a whole plan. Paths are relative to the plan's folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from crcjax.validation.leakage import SIMILARITY

Share = Annotated[float, Field(ge=0, le=1)]
InnerShare = Annotated[float, Field(gt=0, lt=1)]
# A column's values that a population keeps.
Values = str | list[str]


class _Part(BaseModel):
    """A part of the plan; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Part):
    """The tables.

    Attributes:
      predictions: one row per scan (docs/validation.md).
      cohort: one row per scan with slide_id, case_id, the reference, and all further columns that the plan names.
      comparator: predictions of another system, or of clinical practice, for the same cases.
      without_normalisation: predictions of the same scans without stain normalisation.
      calibration: predictions of cases that the study does not evaluate, with their `target`: for temperature and sets.
      readers: one row per reading: case_id, reader, call, and optionally repeat.
      training: one row per slide that the model was developed on, such as a run's data_manifest.csv: slide_id, case_id, and
        optionally split (`calibration`; any other is development), slide_sha256 or content_hash, block_id, date, label.
      embeddings: a .npz of slide_id [slide] and embedding [slide, feature], of evaluated and, for near-duplicates, of training
        slides.
    """

    predictions: Path
    cohort: Path
    comparator: Path | None = None
    without_normalisation: Path | None = None
    calibration: Path | None = None
    readers: Path | None = None
    training: Path | None = None
    embeddings: Path | None = None


class Columns(_Part):
    """Columns that the tables predictions, cohort, comparator, without_normalisation, calibration, readers and training call
    otherwise.

    For each table, its name of a column by crcjax's name.
    """

    predictions: dict[str, str] = {}
    cohort: dict[str, str] = {}
    comparator: dict[str, str] = {}
    without_normalisation: dict[str, str] = {}
    calibration: dict[str, str] = {}
    readers: dict[str, str] = {}
    training: dict[str, str] = {}


class Patients(_Part):
    """How the scans of a patient are combined before any primary statistic.

    `mean_log_probability`, `mean_probability`, or `first_scan` in the order of the table. A case-level model predicts the same
    for all scans of a case, and any of these returns that.
    """

    aggregation: Literal["mean_log_probability", "mean_probability", "first_scan"] = "mean_log_probability"


class OtherReference(_Part):
    """A further molecular call.

    Attributes:
      name: as the report calls it.
      column: the cohort's column, which is empty where there is no call; or
      file: a table of CMScaller or CMSclassifier, whose first column holds the case_id.
    """

    name: str
    column: str | None = None
    file: Path | None = None


class Reference(_Part):
    """The molecular reference, which is itself a classifier.

    Attributes:
      name: as the report calls it.
      column: the cohort's column of the reference classes; by default the target that the predictions name, or `subtype`.
      assay: the cohort's column that says how each case was called (RNA-seq, array, IHC).
      confidence: the cohort's column with the reference's confidence in words, such as high and low.
      reliability: how often the reference names the true class, if that is known.
      others: further calls to compare with.
    """

    name: str = "reference"
    column: str | None = None
    assay: str | None = None
    confidence: str | None = None
    reliability: Annotated[float, Field(gt=0, le=1)] | None = None
    others: list[OtherReference] = []


class Population(_Part):
    """A population of analysis; the plan's first is the primary one.

    Attributes:
      id, title: name it.
      where: for columns of the cohort, the value or values of the scans that belong to it.
    """

    id: str
    title: str = ""
    where: dict[str, Values] = {}


class Gate(_Part):
    """A criterion that the study must meet, on one number of one estimate of results.json.

    Attributes:
      id: names the gate.
      title: in words, for the first lines of the report.
      estimate: the estimate's or test's id.
      limit: which number is compared.
      above, below: the bound; exactly one.
      role: `primary` and `co_primary` gates share the error of the study (`Multiplicity`); others are described.
      rationale: why this bound.
    """

    id: str
    title: str
    estimate: str
    limit: Literal["ci_low", "ci_high", "value", "p_value"] = "ci_low"
    above: float | None = None
    below: float | None = None
    role: Literal["primary", "co_primary", "secondary", "exploratory"] = "secondary"
    rationale: str = ""


class Hypothesis(_Part):
    """A figure that was expected, to be compared with the study's estimate; it is no result.

    Attributes:
      estimate: the estimate's id.
      expected: the figure.
      source, comment: where it comes from.
    """

    estimate: str
    expected: float
    source: str
    comment: str = ""


class Multiplicity(_Part):
    """How primary and co-primary gates share the error.

    `fixed_sequence` tests them in the plan's order and stops at the first that fails; `holm` tests them together; `none` is for
    a single gate.
    """

    method: Literal["fixed_sequence", "holm", "none"] = "none"


class Comparison(_Part):
    """The paired comparison with `data.comparator`.

    Attributes:
      name: the comparator's.
      margin: the largest loss of accuracy that would be accepted; non-inferiority.
      rationale: why this margin.
    """

    name: str = "comparator"
    margin: InnerShare | None = None
    rationale: str = ""


class Scanners(_Part):
    """The scanner study: scans of the same glass slide.

    Attributes:
      glass_slide: the cohort's column that names the glass slide of a scan.
      repeat: the cohort's column that counts repeated scans on one scanner.
      agreement: the agreement that the lower limit must reach.
    """

    glass_slide: str
    repeat: str | None = None
    agreement: InnerShare = 0.9


class Calibration(_Part):
    """Calibration: `bins` of the expected calibration error, over confidence."""

    bins: Annotated[int, Field(ge=2, le=100)] = 15


class Uncertainty(_Part):
    """Uncertainty.

    Attributes:
      measure: the uncertainty by which cases are set aside.
      coverages: the shares of cases that are kept.
      error: the share of conformal sets that may miss the reference.
    """

    measure: Literal["entropy", "expected_entropy", "mutual_information", "vacuity"] = "entropy"
    coverages: list[InnerShare] = [0.7, 0.8, 0.9]
    error: InnerShare = 0.1


class Survival(_Part):
    """A time to an event, by subtype.

    Attributes:
      id, title: name it.
      time: the cohort's column of the time from `time_zero`, in `unit`.
      event: the cohort's column that is 1 for an event and 0 for censoring.
      time_zero: where the time begins, such as resection; analysing resected patients from randomisation is biased.
      unit: of the time.
      horizon: up to which the restricted mean is taken.
      reference_class: the class that hazards are compared with; by default the first.
      strata: columns by which the log-rank test is stratified.
      adjust: columns, numbers or texts, of the adjusted model.
      score: the column of the clinical risk score, for added value.
      arm: the column of the treatment; treatment by subtype is exploratory.
    """

    id: str
    title: str
    time: str
    event: str
    time_zero: str
    unit: str = "months"
    horizon: Annotated[float, Field(gt=0)]
    reference_class: str | None = None
    strata: list[str] = []
    adjust: list[str] = []
    score: str | None = None
    arm: str | None = None


class Decision(_Part):
    """A clinical decision that a predicted class would lead to, for a decision curve.

    Attributes:
      class: the class.
      decision: in words.
      thresholds: the lowest and the highest probability of the class at which one would act.
      rationale: why this range.
    """

    target: str = Field(alias="class")
    decision: str
    thresholds: Annotated[list[InnerShare], Field(min_length=2, max_length=2)]
    rationale: str


class Subgroups(_Part):
    """Subgroups by columns of the cohort: groups in words, such as bands of age."""

    columns: Annotated[list[str], Field(min_length=1)]


class Leakage(_Part):
    """What the evaluated slides are compared by with those of `data.training` and `data.calibration`.

    Attributes:
      block: the cohort's column of the block, specimen or glass slide, which scans of the same tissue share.
      date: the cohort's column of the date of the scan or of the enrolment, as YYYY-MM-DD.
      pretraining: what is known of the overlap with the data that the encoder was pre-trained on.
      similarity: the centred cosine of embeddings from which slides of two patients are near-duplicates.
    """

    block: str | None = None
    date: str | None = None
    pretraining: str = ""
    similarity: InnerShare = SIMILARITY


class Precision(_Part):
    """The precision that the study was planned for.

    Attributes:
      estimate: the quantity.
      expected: its expected value.
      half_width: half of the width of its interval.
      class: the class, for a sensitivity or an AUROC.
    """

    estimate: Literal["accuracy", "sensitivity", "auroc"]
    expected: InnerShare
    half_width: InnerShare
    target: str | None = Field(default=None, alias="class")


class Plan(_Part):
    """The whole plan.

    Attributes:
      title, version: of the study and of this plan.
      question: the study's question in a sentence.
      classes: in the order of all tables and figures.
      seed: of every random number.
      resamples: of every bootstrap.
      prevalence: the shares of the classes for which predictive values are stated; without them, only the study's own.
    """

    title: str
    version: str
    question: str = ""
    classes: Annotated[list[str], Field(min_length=2)]
    seed: Annotated[int, Field(ge=0)]
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    prevalence: dict[str, InnerShare] = {}
    data: Data
    columns: Columns = Columns()
    patients: Patients = Patients()
    reference: Reference = Reference()
    populations: Annotated[list[Population], Field(min_length=1)] = [Population(id="all", title="all patients")]
    gates: list[Gate] = []
    hypotheses: list[Hypothesis] = []
    multiplicity: Multiplicity = Multiplicity()
    comparison: Comparison | None = None
    scanners: Scanners | None = None
    calibration: Calibration = Calibration()
    uncertainty: Uncertainty = Uncertainty()
    survival: list[Survival] = []
    decisions: list[Decision] = []
    subgroups: Subgroups | None = None
    leakage: Leakage = Leakage()
    precision: list[Precision] = []
