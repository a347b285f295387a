import pytest

from crcjax.data.cohort import SlideRow
from crcjax.validation.estimate import Estimate
from crcjax.validation.predictions_table import PredictionRow
from crcjax.validation.selective import uncertainty_statistics


def test_sets_are_judged_by_site_on_the_first_slide_of_each_case() -> None:
    rows = [
        PredictionRow("s", "c", "ok", call="a", conformal_set=names, entropy=0.1)
        for names in (("a", "b"), ("b",), (), ("a",), ("b",))  # the last is a second slide of the first case
    ]
    sites = ("north", "north", "south", "south", "north")
    slides = [
        SlideRow(f"s{i}", f"c{i % 4}", label="a" if i % 4 < 3 else "b", site=site) for i, site in enumerate(sites)
    ]
    found = uncertainty_statistics(rows, slides)
    coverage = found["set coverage"]
    assert isinstance(coverage, Estimate)
    assert (coverage.value, coverage.n) == (0.25, 4)
    assert found["set coverage, north"].value == 0.5
    assert found["mean set size"] == 1.0
    assert (found["sets of one"], found["empty sets"]) == (0.5, 0.25)
    assert [name for name in found if "area" in name] == ["area under risk-coverage by entropy"]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_measures_of_several_distributions_are_left_out_where_there_is_one(temperature: float) -> None:
    slides = [SlideRow(f"s{i}", f"c{i}", label="a") for i in range(4)]
    own = [0.1, 0.3, 0.2, 0.6]  # a calibration's temperature changes `entropy` alone

    def areas(mutual_information: list[float]) -> list[str]:
        rows = [
            PredictionRow(
                "s",
                "c",
                "ok",
                call="ab"[i % 2],
                entropy=temperature * own[i],
                expected_entropy=own[i] - mi,
                mutual_information=mi,
                vacuity=0.5,
            )
            for i, mi in enumerate(mutual_information)
        ]
        return [name.removeprefix("area under risk-coverage by ") for name in uncertainty_statistics(rows, slides)]

    assert areas([0.0] * 4) == ["entropy", "vacuity"]
    assert areas([0.0, 0.0, 0.0, 0.1]) == ["entropy", "expected entropy", "mutual information", "vacuity"]
