"""The sections of the analysis, one module each: a function that fills a `Section` from a trial and its primary cases."""

from __future__ import annotations

from collections.abc import Callable

from crcjax.validation.study.section import Section
from crcjax.validation.study.sections.agreement import agreement
from crcjax.validation.study.sections.calibration import calibration
from crcjax.validation.study.sections.clustering import clustering
from crcjax.validation.study.sections.comparison import comparison
from crcjax.validation.study.sections.decisions import decisions
from crcjax.validation.study.sections.leakage import leakage
from crcjax.validation.study.sections.planning import planning
from crcjax.validation.study.sections.ranking import ranking
from crcjax.validation.study.sections.scanners import scanners
from crcjax.validation.study.sections.site_signal import site_signal
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
    ("4", "clustering", "Several scans of a patient", clustering),
    ("5", "leakage", "Leakage from the model's development", leakage),
    ("6", "comparison", "Comparison with another system", comparison),
    ("7", "sites", "Sites", sites),
    ("8", "site_signal", "Signal of site and scanner", site_signal),
    ("9", "scanners", "Scanners and stain normalisation", scanners),
    ("10", "calibration", "Calibration", calibration),
    ("11", "uncertainty", "Usefulness of uncertainty", uncertainty),
    ("12", "survival", "Survival", survival),
    ("13", "usefulness", "Clinical usefulness", usefulness),
    ("14", "subgroups", "Subgroups", subgroups),
    ("15", "planning", "Sample size, and errors of the reference", planning),
)
