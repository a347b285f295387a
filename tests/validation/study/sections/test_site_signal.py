"""A signal of the site that is put into a study is found, and none where there is none."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from crcjax.validation.study.validator import EPOCValidator

Write = Callable[..., Path]


def _study(small_trial: Write, tmp_path: Path, shift: float, mixed: bool = False) -> EPOCValidator:
    """Embeddings of noise with a shift between the sites; with `mixed`, one site has mostly one class."""
    rng = np.random.default_rng(1)
    numbers = np.arange(60)
    north = numbers % 4 > 0 if not mixed else numbers % 3 > 0
    embedding = rng.normal(size=(60, 8)) + shift * north[:, None]
    np.savez(tmp_path / "e.npz", slide_id=np.array([f"s{n}" for n in numbers]), embedding=embedding)

    def site(row: dict) -> dict:
        return row | {"site": "north" if north[int(row["slide_id"][1:])] else "south"}

    return EPOCValidator(small_trial(data='embeddings = "e.npz"\n', cohort=site))


def test_the_probe_finds_a_site_only_where_there_is_one(small_trial: Write, tmp_path: Path) -> None:
    results = {shift: _study(small_trial, tmp_path, shift).run() for shift in (0.0, 2.0)}
    tests, estimates = results[2.0].tests, results[2.0].estimates
    assert tests["site_signal.embeddings.site.signal"].p_value < 0.01
    assert tests["site_signal.embeddings.site.signal_within_classes"].p_value < 0.01
    assert estimates["site_signal.embeddings.site"].value > 0.9
    assert estimates["site_signal.embeddings.site.by_chance"].value == pytest.approx(0.5, abs=0.1)
    assert results[0.0].tests["site_signal.embeddings.site.signal"].p_value > 0.01
    # Each class has the same share of both sites: nothing is put first.
    assert results[2.0].messages == ()


def test_a_site_that_can_be_told_and_has_other_classes_is_put_first(small_trial: Write, tmp_path: Path) -> None:
    results = _study(small_trial, tmp_path, 2.0, mixed=True).run()
    assert results.tests["site_signal.classes.site.independence"].p_value < 0.01
    assert results.estimates["site_signal.classes.site"].value > 0.9
    assert results.messages[0].startswith(
        "The site can be told from embeddings and probabilities, and the sites have other"
    )
    # No site has both the class that marks it and another.
    assert np.isnan(results.estimates["site_signal.within_site_auroc"].value)


def test_one_site_and_one_scanner_leave_nothing_to_tell_apart(small_trial: Write) -> None:
    results = EPOCValidator(small_trial(cohort=lambda row: row | {"site": "north"})).run()
    (section,) = (section for section in results.sections if section.id == "site_signal")
    assert section.missing == "There is nothing to tell apart: all analysed scans are of one site and one scanner."


def test_a_system_of_calls_alone_is_probed_by_embeddings_and_classes(small_trial: Write, tmp_path: Path) -> None:
    plan = _study(small_trial, tmp_path, 2.0).plan.path
    lines = (tmp_path / "p.csv").read_text().splitlines()
    ids = [",".join(line.split(",")[:2]) for line in lines]
    (tmp_path / "p.csv").write_text("\n".join([f"{ids[0]},call", *(f"{line},a" for line in ids[1:])]) + "\n")
    estimates = EPOCValidator(plan).run().estimates
    names = {id for id in estimates if id.startswith("site_signal.")}
    parts = ("", ".by_chance", ".by_chance_within_classes")
    assert names == {"site_signal.classes.site", *(f"site_signal.embeddings.site{part}" for part in parts)}
