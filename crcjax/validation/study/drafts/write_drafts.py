"""Writes the drafts: one self-contained page a document, an index, the file of open items, and the lists of software."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from crcjax.errors import InputError
from crcjax.pages.render import render_page
from crcjax.validation.predictions_table import table_text
from crcjax.validation.study.drafts.answers import NAME, answers_text, read_answers
from crcjax.validation.study.drafts.claims import forbidden_claims
from crcjax.validation.study.drafts.documents import load_documents
from crcjax.validation.study.drafts.evidence import Evidence
from crcjax.validation.study.drafts.fill import Draft, fill
from crcjax.validation.study.drafts.software_list import sbom, soup_rows
from crcjax.validation.study.drafts.traceability import load_traceability, matrix_rows, read_test_report
from crcjax.validation.study.report import SYNTHETIC
from crcjax.validation.whole_files import write_whole

INDEX, SBOM, SOUP, MATRIX = "index.html", "sbom.cdx.json", "soup.csv", "traceability.csv"
# Open items that a refusal names.
_NAMED = 5
_PACKAGE = "crcjax.validation.study.drafts"


def write_drafts(
    evidence: Evidence,
    out: Path,
    date: str,
    *,
    answers: Path | None = None,
    tests: Path | None = None,
    final: bool = False,
) -> tuple[Draft, ...]:
    """Writes OUT/DOCUMENT.html, OUT/index.html, OUT/open_items.toml, OUT/traceability.html and .csv, OUT/sbom.cdx.json and
    OUT/soup.csv.

    Args:
      evidence: the sources.
      out: the folder.
      date: on every page.
      answers: a file of what a person wrote, whose texts replace those of OUT/open_items.toml.
      tests: the report of the tests of this version (pytest --junitxml), for the matrix of requirements.
      final: whether to refuse while items are open, and to leave the word draft out of the stamp.

    Raises:
      InputError: a file is not usable, a text makes a claim that software cannot support, or `final` is asked for while items
        are open or tests are not known to have passed. Nothing is written then.
      OutputError: the folder cannot be written.
    """
    documents = load_documents()
    written = read_answers(out / NAME, answers, documents)
    drafts = tuple(fill(document, evidence, written.get(document.id, {})) for document in documents)
    _check_claims(drafts)
    rows = matrix_rows(load_traceability(), evidence, None if tests is None else read_test_report(tests))
    if final:
        _check_final(drafts, rows, answers or out / NAME)
    texts = {out / f"{draft.document.id}.html": _page(draft, evidence, date, final) for draft in drafts}
    texts[out / INDEX] = _index(drafts, evidence, date, final)
    texts[out / NAME] = answers_text(drafts)
    texts[out / MATRIX] = table_text(rows)
    texts[(out / MATRIX).with_suffix(".html")] = _matrix_page(rows, evidence, date, final)
    if evidence.packages:
        texts[out / SBOM] = sbom(evidence.packages, date)
        texts[out / SOUP] = table_text(soup_rows(evidence.packages))
    write_whole(texts)
    return drafts


def _check_claims(drafts: tuple[Draft, ...]) -> None:
    for draft in drafts:
        for each in draft.items:
            texts = (each.answer, *(fact.text for fact in each.facts), *each.gaps)
            for text in texts:
                if claims := forbidden_claims(text):
                    raise InputError(
                        f"{draft.document.id}, item {each.item.id!r}: claims {claims[0]!r}, which software cannot support; "
                        "say what was measured, or what it was designed to support"
                    )


def _check_final(drafts: tuple[Draft, ...], rows: list[dict[str, str]], answers: Path) -> None:
    """Raises InputError while an item is open, or a test of the matrix is not known to have passed."""
    still_open = [(draft, item) for draft in drafts for item in draft.open_items]
    if still_open:
        named = (f"{draft.document.id} {item.item.id} ({item.item.topic})" for draft, item in still_open[:_NAMED])
        raise InputError(
            f"--final: {len(still_open)} items are open, such as {'; '.join(named)}; write them into {answers}"
        )
    if failed := [row for row in rows if row["outcome"] != "passed"]:
        raise InputError(
            f"--final: {len(failed)} of {len(rows)} tests of requirements are not known to have passed, such as "
            f"{failed[0]['test']} ({failed[0]['outcome']}); give --test-report of a run of all tests"
        )


def _page(draft: Draft, evidence: Evidence, date: str, final: bool) -> str:
    sections = [(name, list(items)) for name, items in groupby(draft.items, key=lambda each: each.item.section)]
    values = {"draft": draft, "sections": sections} | _common(evidence, date, final)
    return render_page(_PACKAGE, "draft.html", values, title=draft.document.title, stamp=_stamp(evidence, final))


def _index(drafts: tuple[Draft, ...], evidence: Evidence, date: str, final: bool) -> str:
    values = {"drafts": drafts} | _common(evidence, date, final)
    title = f"Drafts: {evidence.plan.title}"
    return render_page(_PACKAGE, "index.html", values, title=title, stamp=_stamp(evidence, final))


def _matrix_page(rows: list[dict[str, str]], evidence: Evidence, date: str, final: bool) -> str:
    still_open = sum(row["outcome"] != "passed" for row in rows)
    values = {"rows": rows, "traceability": load_traceability(), "open_count": still_open, "item_count": len(rows)}
    title = "Hazards, requirements, tests and results"
    return render_page(
        _PACKAGE,
        "traceability.html",
        values | _common(evidence, date, final),
        title=title,
        stamp=_stamp(evidence, final),
    )


def _common(evidence: Evidence, date: str, final: bool) -> dict[str, object]:
    return {"evidence": evidence, "date": date, "final": final}


def _stamp(evidence: Evidence, final: bool) -> str:
    words = ([] if final else ["DRAFT"]) + ([SYNTHETIC] if evidence.results["synthetic"] else [])
    return ", ".join(words)
