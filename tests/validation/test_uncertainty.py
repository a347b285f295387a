import itertools

import numpy as np
import pytest

from crcjax.data.cohort import SlideRow
from crcjax.validation.metrics import Estimate
from crcjax.validation.uncertainty import doubt_statistics, risk_coverage_area


def test_the_area_is_the_mean_risk_over_coverages_and_ties_stand_in_every_order() -> None:
    wrong = np.array([False, True, False, True, True])
    doubt = np.array([0.1, 0.5, 0.5, 0.5, 0.9])
    areas = []
    for order in itertools.permutations([1, 2, 3]):
        errors = wrong[[0, *order, 4]].cumsum()
        areas.append(np.mean(errors / np.arange(1, 6)))
    assert risk_coverage_area(doubt, wrong) == pytest.approx(np.mean(areas))
    assert risk_coverage_area(-doubt, wrong) > risk_coverage_area(doubt, wrong)


def test_sets_are_judged_by_site_on_the_first_slide_of_each_case() -> None:
    rows = [
        {"subtype": "a", "set": held, "entropy": "0.1", "vacuity": ""}
        for held in ("a|b", "b", "none", "a", "b")  # the last is a second slide of the first case
    ]
    sites = ("north", "north", "south", "south", "north")
    slides = [
        SlideRow(f"s{i}", f"c{i % 4}", subtype="a" if i % 4 < 3 else "b", site=site) for i, site in enumerate(sites)
    ]
    found = doubt_statistics(rows, slides)
    coverage = found["set coverage"]
    assert isinstance(coverage, Estimate)
    assert (coverage.value, coverage.n) == (0.25, 4)
    assert found["set coverage, north"].value == 0.5
    assert found["mean set size"] == 1.0
    assert (found["sets of one"], found["empty sets"]) == (0.5, 0.25)
    assert [name for name in found if "area" in name] == ["area under risk-coverage by entropy"]
