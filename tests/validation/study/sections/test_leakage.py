"""Leaks that are put into the tables of a study are found, put first, and decide a gate."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.validation.study.validator import EPOCValidator

Write = Callable[..., Path]
DATA = 'training = "t.csv"\nembeddings = "e.npz"\n'
PLAN = """
[leakage]
block = "block"
date = "scanned"
pretraining = "none"
[[gates]]
id = "leak"
title = "No leak"
estimate = "leakage.leaks"
limit = "value"
below = 1
"""


@pytest.fixture
def study(small_trial: Write, write_csv, tmp_path: Path) -> Callable[..., EPOCValidator]:
    """study(change, rows): a trial whose development has 30 slides; `change` edits these rows, `alike` an embedding."""

    def write(change: Callable[[dict], dict] = lambda row: row, alike: bool = False) -> EPOCValidator:
        rng = np.random.default_rng(0)
        ids = [f"s{number}" for number in range(60)] + [f"t{number}" for number in range(30)]
        embedding = rng.normal(size=(90, 24))
        if alike:
            embedding[70] = embedding[3] + 0.01 * rng.normal(size=24)
        np.savez(tmp_path / "e.npz", slide_id=np.array(ids), embedding=embedding)
        rows = [
            {"slide_id": f"t{n}", "case_id": f"d{n}", "split": "train", "block_id": f"tb{n}", "date": "2019-05-01"}
            | {"content_hash": f"{n + 100:064x}", "label": "a"}
            for n in range(30)
        ]
        write_csv(tmp_path / "t.csv", [change(row) for row in rows])
        plan = small_trial(
            plan=PLAN,
            data=DATA,
            predictions=lambda row: row | {"slide_sha256": f"{int(row['slide_id'][1:]):064x}"},
            cohort=lambda row: row | {"block": f"b{row['slide_id']}", "scanned": "2020-03-01"},
        )
        return EPOCValidator(plan)

    return write


def _change(of_slide: str, **values: str) -> Callable[[dict], dict]:
    return lambda row: row | values if row["slide_id"] == of_slide else row


def test_a_clean_study_has_no_leak_and_says_what_was_not_checked(study) -> None:
    results = study().run()
    assert results.estimates["leakage.leaks"].value == 0
    assert results.estimates["leakage.not_checked"].value == 1
    assert np.isnan(results.estimates["leakage.near_duplicates_by_thumbnail"].value)
    assert results.messages == ()
    assert [gate.verdict for gate in results.gates] == ["passed"]


@pytest.mark.parametrize(
    ("change", "alike", "name"),
    [
        (_change("t4", case_id="c7"), False, "patients_in_two_roles"),
        (_change("t4", slide_id="s7", case_id="c7"), False, "slides_in_two_roles"),
        (_change("t4", block_id="bs7"), False, "blocks_or_specimens_in_two_roles"),
        (_change("t4", content_hash=f"{7:064x}"), False, "identical_files"),
        (_change("t4", case_id="c7", split="calibration"), False, "fitted_on_evaluation_cases"),
        (_change("t4", date="2020-04-01"), False, "evaluation_before_development"),
        (lambda row: row, True, "near_duplicates_by_embedding"),
    ],
)
def test_a_leak_is_found_and_put_first(study, change, alike: bool, name: str, tmp_path: Path) -> None:
    validator = study(change, alike)
    results = validator.run()
    estimate = results.estimates[f"leakage.{name}"]
    assert estimate.value >= 1
    assert estimate.warnings[0].startswith("found: ")
    assert results.messages[0].startswith("Leakage: ")
    assert [gate.verdict for gate in results.gates] == ["failed"]
    page = validator.write(tmp_path / "out").read_text()
    assert page.index("Leakage: ") < page.index('id="flow"')


def test_without_a_table_of_the_development_nothing_is_called_clear(small_trial: Write) -> None:
    results = EPOCValidator(small_trial()).run()
    (section,) = (section for section in results.sections if section.id == "leakage")
    assert section.missing.startswith("The plan names no table of the slides that the model was developed on")
    assert not section.estimates


def test_bad_tables_of_the_development_are_one_message_each(study, tmp_path: Path) -> None:
    for change, message in (
        (_change("t4", slide_id="t5"), r"t\.csv, line 7: slide t5 is there twice"),
        (_change("t4", case_id=""), r"t\.csv, line 6: slide_id and case_id must not be empty"),
        (_change("t4", date="1/4/2020"), r"t\.csv, line 6: a date must be written as YYYY-MM-DD, got '1/4/2020'"),
    ):
        with pytest.raises(InputError, match=message):
            study(change).run()
    validator = study()
    for arrays, message in (
        ({"slide_id": np.array(["s1"])}, r"e\.npz: has no array 'embedding', only slide_id"),
        ({"slide_id": np.array(["s1", "s1"]), "embedding": np.ones((2, 3))}, "slide s1 is there twice"),
        ({"slide_id": np.array(["s1"]), "embedding": np.ones((2, 3))}, "must hold slide_id"),
        ({"slide_id": np.array([{}]), "embedding": np.ones((1, 3))}, "cannot be read as a .npz"),
    ):
        np.savez(tmp_path / "e.npz", **arrays)
        with pytest.raises(InputError, match=message):
            validator.run()
    for content in (b"text", b""):
        (tmp_path / "e.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"e\.npz: cannot be read as a \.npz"):
            validator.run()
    with open(tmp_path / "e.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(InputError, match=r"e\.npz: cannot be read as a \.npz"):
        validator.run()
