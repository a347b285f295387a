"""The sections of the analysis, one module each: a function that fills a `Section` from a trial and its primary cases."""

from __future__ import annotations

from collections.abc import Callable

from crcjax.validation.study.section import Section
from crcjax.validation.study.sections.agreement import agreement
from crcjax.validation.study.sections.calibration import calibration
from crcjax.validation.study.sections.clustering import clustering
from crcjax.validation.study.sections.comparison import comparison
from crcjax.validation.study.sections.decisions import decisions
from crcjax.validation.study.sections.planning import planning
from crcjax.validation.study.sections.ranking import ranking
from crcjax.validation.study.sections.scanners import scanners
from crcjax.validation.study.sections.sites import sites
from crcjax.validation.study.sections.subgroups import subgroups
from crcjax.validation.study.sections.survival import survival
from crcjax.validation.study.sections.uncertainty import uncertainty
from crcjax.validation.study.sections.usefulness import usefulness
from crcjax.validation.study.trial import Cases, Trial

Fill = Callable[[Trial, Cases, Section, str], None]
# Sections that need probabilities.
OF_PROBABILITIES = ("ranking", "calibration", "uncertainty", "usefulness")
NO_PROBABILITIES = "The predictions state calls without probabilities."
# Number, id, title and function, in the order of the report.
SECTIONS: tuple[tuple[str, str, str, Fill], ...] = (
    ("1", "decisions", "Decisions", decisions),
    ("2", "ranking", "Ranking", ranking),
    ("3", "agreement", "Agreement with the molecular reference and with readers", agreement),
    ("4", "clustering", "Several scans of a patient, and leakage", clustering),
    ("5", "comparison", "Comparison with another system", comparison),
    ("6", "sites", "Sites", sites),
    ("7", "scanners", "Scanners and stain normalisation", scanners),
    ("8", "calibration", "Calibration", calibration),
    ("9", "uncertainty", "Usefulness of uncertainty", uncertainty),
    ("10", "survival", "Survival", survival),
    ("11", "usefulness", "Clinical usefulness", usefulness),
    ("12", "subgroups", "Subgroups", subgroups),
    ("13", "planning", "Sample size, and errors of the reference", planning),
)
