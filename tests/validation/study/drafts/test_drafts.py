"""Drafts state what the results state, name what is open, refuse to be final while items are open, and make no claims."""

import hashlib
import json
import re
import tomllib
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.runs import model_card
from crcjax.validation.study.drafts.answers import NAME
from crcjax.validation.study.drafts.claims import forbidden_claims
from crcjax.validation.study.drafts.documents import load_documents
from crcjax.validation.study.drafts.evidence import read_evidence
from crcjax.validation.study.drafts.fill import fill
from crcjax.validation.study.drafts.records import RECORDS, facts
from crcjax.validation.study.drafts.traceability import load_traceability
from crcjax.validation.study.drafts.write_drafts import write_drafts
from crcjax.validation.study.simulation.simulate_trial import simulate_trial
from crcjax.validation.study.validator import EPOCValidator

DATE = "2026-01-31"
CARD = "# Model card\n\n## Prediction target\n\n* Target: subtype.\n\n## Models\n\n* Aggregator x.\n\n## Training data\n\n* 240 ids.\n"


# A full study takes twenty seconds.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a simulated trial with few resamples, and its results under REPORT."""
    folder = tmp_path_factory.mktemp("trial")
    plan = simulate_trial(folder)
    plan.write_text(plan.read_text().replace("resamples = 2000", "resamples = 100"))
    EPOCValidator(plan).write(folder / "REPORT")
    return folder


@pytest.fixture
def sources(trial: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """results.json, plan and bundle of one study; the results are copied, so that tests may change them."""
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "model_card.md").write_text(CARD)
    (bundle / "bundle.json").write_text(json.dumps({"files": {"model_card.md": _sha256(bundle / "model_card.md")}}))
    results = json.loads((trial / "REPORT" / "results.json").read_text())
    results["predicted_by"]["bundle_id"] = [_sha256(bundle / "bundle.json")]
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path / "results.json", trial / "plan.toml", bundle


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _report_of_passed_tests(path: Path) -> Path:
    names = [test.split(".py::") for each in load_traceability().requirements for test in each.tests]
    cases = "".join(f'<testcase classname="{file.replace("/", ".")}" name="{name}"/>' for file, name in names)
    path.write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    return path


def _text(page: Path) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", page.read_text().partition("<body>")[2]).split())


def test_every_fact_of_every_document_exists_in_a_full_study(sources) -> None:
    evidence = read_evidence(*sources)
    for document in load_documents():
        ids = [item.id for item in document.items]
        assert len(ids) == len(set(ids)), document.id
        draft = fill(document, evidence, {})
        for each in draft.items:
            gaps = [each.item.person] if each.item.person else []
            assert list(each.gaps) == gaps, (document.id, each.item.id)
            assert each.item.person or each.facts, "an item without sources must ask a person"
    assert not facts(evidence, "messages"), "the only facts that a study without problems lacks"
    assert [name for name in RECORDS if name != "messages" and not facts(evidence, name)] == []


def test_the_headings_that_documents_take_from_a_model_card_are_those_of_bundles() -> None:
    headings = set(re.findall(r'"## (.+?)"', Path(model_card.__file__).read_text()))
    records = {name for document in load_documents() for item in document.items for name in item.records}
    assert {name.removeprefix("card ") for name in records if name.startswith("card ")} <= headings


def test_figures_are_those_of_the_results_and_change_with_them(sources, tmp_path: Path) -> None:
    results = json.loads(sources[0].read_text())
    write_drafts(read_evidence(*sources), tmp_path / "one", DATE)
    accuracy = next(each for each in results["estimates"] if each["id"] == "decisions.accuracy")
    before = f"decisions.accuracy: {accuracy['value']:.3f} ({accuracy['ci_low']:.3f} to {accuracy['ci_high']:.3f})"
    accuracy["value"] = 0.12345
    sources[0].write_text(json.dumps(results))
    write_drafts(read_evidence(*sources), tmp_path / "two", DATE)
    for name in ("tripod_ai", "stard_ai", "claim", "model_card", "performance_evaluation"):
        assert before in _text(tmp_path / "one" / f"{name}.html"), name
        assert "decisions.accuracy: 0.123 (" in _text(tmp_path / "two" / f"{name}.html"), name


def test_documents_state_no_result_of_their_own() -> None:
    for document in load_documents():
        for item in document.items:
            for text in (item.topic, item.asks, item.person):
                assert not re.search(r"\d+[.,]\d+|\d ?%", text), (document.id, item.id)
                assert forbidden_claims(text) == []


def test_every_page_carries_what_a_reviewer_must_know(sources, tmp_path: Path) -> None:
    evidence = read_evidence(*sources)
    drafts = write_drafts(evidence, tmp_path / "out", DATE)
    assert {path.stem for path in (tmp_path / "out").glob("*.html")} == {
        "index",
        "traceability",
        *(d.document.id for d in drafts),
    }
    for draft in drafts:
        text = _text(tmp_path / "out" / f"{draft.document.id}.html")
        for words in (
            *(
                "DRAFT, SYNTHETIC DATA",
                "Research use only",
                "Not a regulatory determination",
                DATE,
                evidence.data_sha256,
            ),
            f"{len(draft.open_items)} of {len(draft.items)} items open",
        ):
            assert words in text, (draft.document.id, words)
        assert text.count("OPEN:") == sum(len(each.gaps) for each in draft.open_items)
        assert forbidden_claims(text) == []


def test_answers_are_kept_and_close_items_and_final_refuses_until_all_are_closed(sources, tmp_path: Path) -> None:
    evidence, out = read_evidence(*sources), tmp_path / "out"
    total = sum(len(draft.open_items) for draft in write_drafts(evidence, out, DATE))
    with pytest.raises(InputError, match=rf"--final: {total} items are open, such as change_control_record change"):
        write_drafts(evidence, out, DATE, final=True)
    answers = tomllib.loads((out / NAME).read_text())
    assert sum(len(items) for items in answers.values()) == total
    text = (out / NAME).read_text().replace('"25" = ""', '"25" = """A \\"text\\"\nof two <b>lines</b>."""')
    (out / NAME).write_text(text)
    drafts = write_drafts(evidence, out, DATE)
    assert sum(len(draft.open_items) for draft in drafts) == total - text.count("of two")
    assert 'A "text"\nof two <b>lines</b>.' in tomllib.loads((out / NAME).read_text())["tripod_ai"]["25"]
    assert "&lt;b&gt;lines" in (out / "tripod_ai.html").read_text()
    (out / NAME).write_text(re.sub(r'= ""$', '= "Answered."', (out / NAME).read_text(), flags=re.M))
    with pytest.raises(InputError, match=r"--final: \d+ of \d+ tests of requirements are not known to have passed"):
        write_drafts(evidence, out, DATE, final=True)
    write_drafts(evidence, out, DATE, tests=_report_of_passed_tests(tmp_path / "report.xml"), final=True)
    page = _text(out / "tripod_ai.html")
    assert "DRAFT" not in page
    assert "SYNTHETIC DATA" in page
    assert "Not a regulatory determination" in page


def test_a_further_file_of_answers_loses_none_of_the_earlier_ones(sources, tmp_path: Path) -> None:
    evidence, out, further = read_evidence(*sources), tmp_path / "out", tmp_path / "a.toml"
    for item, text in (("1", "First."), ("2", "Second.")):
        further.write_text(f'[tripod_ai]\n"{item}" = "{text}"\n"3" = ""\n')
        write_drafts(evidence, out, DATE, answers=further)
    answers = tomllib.loads((out / NAME).read_text())["tripod_ai"]
    assert (answers["1"], answers["2"], answers["3"]) == ("First.", "Second.", "")
    with pytest.raises(InputError, match="cannot be read as TOML"):
        write_drafts(evidence, out, DATE, answers=tmp_path / "absent.toml")


def test_what_a_study_did_not_do_is_a_gap_with_its_reason(small_trial, tmp_path: Path) -> None:
    plan = small_trial()
    EPOCValidator(plan).write(tmp_path / "report")
    drafts = write_drafts(read_evidence(tmp_path / "report" / "results.json", plan), tmp_path / "out", DATE)
    text = _text(tmp_path / "out" / "special_controls.html")
    assert "SYNTHETIC" not in text
    assert "scanners.agreement.*: The plan names no scanner study (scanners)." in text
    assert "no bundle was given" in text
    assert "The plan or the results state no outcomes." in text
    assert all(each.is_open for draft in drafts for each in draft.items if "margin" in each.item.records)


@pytest.mark.parametrize(
    "claim",
    [
        "FDA cleared",
        "CE-marked",
        "ISO 13485 certified",
        "HIPAA compliant",
        "compliant with GDPR",
        "clinically validated",
        "ground truth",
        "510(k) ready",
        "approved by the FDA",
        "Part 11 compliant",
        "conformity with the IVDR",
    ],
)
def test_a_claim_in_an_answer_stops_every_document(sources, claim: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(f'[model_card]\nuse = "The model is {claim}."\n')
    with pytest.raises(InputError, match=r"model_card, item 'use': claims"):
        write_drafts(read_evidence(*sources), tmp_path / "out", DATE, answers=tmp_path / "a.toml")
    assert not (tmp_path / "out").exists()


def test_sources_that_do_not_belong_together_are_refused(sources, tmp_path: Path) -> None:
    results, plan, bundle = sources
    other = tmp_path / "other.toml"
    other.write_text(plan.read_text() + "# a change\n")
    with pytest.raises(InputError, match=r"other\.toml: is not the plan of .*results\.json"):
        read_evidence(results, other)
    (bundle / "model_card.md").write_text("other")
    with pytest.raises(InputError, match=r"model_card\.md: is changed since"):
        read_evidence(results, plan, bundle)
    (bundle / "bundle.json").write_text("{}")
    with pytest.raises(InputError, match="give the bundle that predicted"):
        read_evidence(results, plan, bundle)
    for text, message in (
        ("[", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "must be the results of a plan"),
    ):
        results.write_text(text)
        with pytest.raises(InputError, match=message):
            read_evidence(results, plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "cannot be read as TOML"),
        ("[none]\n", "'none' must be a part for one of the documents"),
        ('[tripod_ai]\n"99" = "x"\n', "tripod_ai has no item '99'"),
        ('[tripod_ai]\n"1" = 1\n', "item '1' must be a text, got 1"),
    ],
)
def test_bad_answers_are_one_message(sources, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(InputError, match=message):
        write_drafts(read_evidence(*sources), tmp_path / "out", DATE, answers=tmp_path / "a.toml")


def test_the_command_writes_pages_that_open_without_an_error(sources, crcjax, browser, tmp_path: Path) -> None:
    results, plan, bundle = sources
    done = crcjax("drafts", results, "--plan", plan, "--bundle", bundle, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert re.search(r"13 documents, \d+ of \d+ items open", done.stderr)
    refused = crcjax("drafts", results, "--plan", plan, "--out", tmp_path / "out", "--final")
    assert (refused.returncode, "items are open" in refused.stderr) == (2, True)
    for name in ("index", "tripod_ai", "model_card", "traceability"):
        with browser(tmp_path / "out" / f"{name}.html") as opened:
            assert opened.errors == []
            assert opened.overflow() == 0
