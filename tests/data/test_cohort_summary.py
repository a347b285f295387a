from dataclasses import replace
from pathlib import Path

from crcjax.data.cohort import Cohort, SlideRow, load_cohort
from crcjax.data.cohort_summary import content_hashes, duplicated_slides, summarise_cohort

CLASSES = ("canonical", "immune", "stromal")


def _cohort(sizes: dict[str, tuple[int, int, int]], site: str = "north") -> Cohort:
    """Cases of one slide each; the numbers of train, val and test cases by class."""
    rows = []
    for name, counts in sizes.items():
        for split, count in zip(("train", "val", "test"), counts, strict=True):
            for i in range(count):
                case = f"{name}-{split}-{i}"
                rows.append(SlideRow(f"{case}-1", case, label=name, split=split, site=site))
    return Cohort(tuple(rows), CLASSES)


BALANCED = _cohort({"canonical": (4, 2, 1), "immune": (3, 1, 1), "stromal": (2, 1, 1)})


def test_the_table_counts_cases_and_slides_per_split_class_and_site() -> None:
    second = replace(BALANCED.rows[0], slide_id="second", site="south")
    summary = summarise_cohort(replace(BALANCED, rows=(*BALANCED.rows, second)))
    assert str(summary).splitlines() == [
        "cases (slides)   train    val   test",
        "class",
        "  canonical      4 (5)  2 (2)  1 (1)",
        "  immune         3 (3)  1 (1)  1 (1)",
        "  stromal        2 (2)  1 (1)  1 (1)",
        "site",
        "  north          9 (9)  4 (4)  3 (3)",
        "  south          1 (1)  0 (0)  0 (0)",
        "all             9 (10)  4 (4)  3 (3)",
    ]
    assert summary.warnings == summary.problems == []


def test_a_class_without_cases_of_a_split_is_a_warning_and_no_problem() -> None:
    summary = summarise_cohort(_cohort({"canonical": (4, 2, 1), "immune": (3, 1, 0), "stromal": (0, 0, 1)}))
    assert summary.problems == []
    assert summary.warnings == [
        "class stromal has no training case; the model cannot learn it",
        "class stromal has no validation case; validation metrics leave it out",
        "class immune has no test case; test metrics leave it out",
    ]


def test_cohorts_that_cannot_be_trained_on_are_problems() -> None:
    def problem(cohort: Cohort) -> str:
        (sentence,) = summarise_cohort(cohort).problems
        return sentence

    assert problem(_cohort({"immune": (9, 3, 6)})).startswith("all 9 training cases are immune;")
    assert problem(_cohort({"immune": (9, 0, 6), "stromal": (2, 0, 0)})).startswith("no labelled case has split val,")
    assert problem(_cohort({"immune": (0, 2, 6)})).startswith("no labelled case has split train;")
    assert problem(_cohort({"immune": (0, 0, 6)})).startswith(
        "no labelled case has split train or val (all labelled cases have split test); correct the column split"
    )
    unlabelled = tuple(replace(row, label=None) for row in BALANCED.rows)
    assert problem(replace(BALANCED, rows=unlabelled)) == (
        "the cohort has no labelled slide; fill in the column subtype"
    )


def test_small_classes_sites_of_one_class_and_unused_slides_are_warnings() -> None:
    rows = [*_cohort({"canonical": (20, 1, 0), "stromal": (3, 1, 0)}).rows]
    rows += [
        replace(row, slide_id=f"s{row.slide_id}", case_id=f"s{row.case_id}", site="south")
        for row in rows
        if row.label == "canonical"
    ][:6]
    rows += [
        SlideRow("a", "A"),
        SlideRow("b", "B"),
        SlideRow("c", "C", label="immune"),
        replace(rows[0], split="val", slide_id="d"),
    ]
    warnings = summarise_cohort(Cohort(tuple(rows), ("canonical", "stromal"))).warnings
    assert warnings == [
        "class stromal has 3 training cases, canonical has 26; expect a low sensitivity for it",
        "all 6 training cases of site south are canonical; the model could learn the site instead",
        "training and validation leave out 2 slides (a, b) without a subtype",
        "training and validation leave out 1 slide (c) without a split",
        "case canonical-train-0 has slides in train and val; give all of its slides one split",
    ]


def test_one_file_under_two_cases_is_detected_by_content_hash_and_by_path() -> None:
    first, second, third = (replace(row, path=Path(f"{i}.svs")) for i, row in enumerate(BALANCED.rows[3:6]))
    third = replace(third, path=second.path)
    assert duplicated_slides([first, second], {first.slide_id: "f00d", second.slide_id: "beef"}) == []
    (by_hash,) = duplicated_slides(
        [first, replace(second, split="test")], {first.slide_id: "f00d", second.slide_id: "f00d"}
    )
    assert by_hash.startswith(
        "slides canonical-train-3-1 (case canonical-train-3, train) and canonical-val-0-1 (case canonical-val-0, test) "
        "have the same content_hash; the model would be tested on slides that it was trained on; keep one"
    )
    (by_path,) = duplicated_slides([first, second, third])
    assert "canonical-val-0-1 (case canonical-val-0, val) and canonical-val-1-1" in by_path
    assert "have the same path; keep one" in by_path


def test_the_stores_content_hashes_find_a_slide_that_was_tiled_under_two_ids(painted: Path) -> None:
    cohort = load_cohort(painted / "cohort.csv", None)
    hashes = content_hashes(painted / "store", [*cohort.rows, SlideRow("absent", "A")])
    assert len(hashes) == len(set(hashes.values())) == len(cohort.rows)
    assert summarise_cohort(cohort, hashes).warnings == []
    doubled = {**hashes, cohort.rows[-1].slide_id: hashes[cohort.rows[0].slide_id]}
    (sentence,) = summarise_cohort(cohort, doubled).warnings
    assert cohort.rows[0].slide_id in sentence
    assert cohort.rows[-1].slide_id in sentence
