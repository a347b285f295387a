"""The registry: versions, two people, evidence, rollback, and a log that cannot be forged unnoticed."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from crcjax.errors import InputError
from crcjax.lifecycle.policy import parse_policy
from crcjax.lifecycle.registry import add_bundle, add_evidence, adopt_policy, promote, roll_back
from crcjax.lifecycle.registry_state import LOG, read_registry
from crcjax.monitor.event_log import EventLog, verify


def test_a_version_knows_its_lineage_and_the_bundle_is_a_checked_copy(registry: Callable, crcjax: Callable) -> None:
    made = registry(2)
    first, second = read_registry(made.path).versions
    assert (first.number, second.number) == (1, 2)
    [member] = second.lineage["members"]
    assert (member["config_sha256"], member["data_sha256"], member["step"]) == ("c" * 64, "d" * 64, 10)
    assert second.lineage["code"] == {"crcjax": "0.1.0", "commit": "abc"}
    assert second.lineage["parent"] == first.bundle_id
    shown = json.loads(crcjax("models", "show", made.path, second.bundle_id[:8]).stdout)
    assert (Path(shown["folder"]) / "weights-0.safetensors").read_text() == "weights 2"
    assert shown["alias"] == "candidate"
    listed = crcjax("models", "list", made.path).stdout.splitlines()
    assert [line.split()[:2] for line in listed[1:]] == [["1", "production"], ["2", "candidate"]]


def test_what_cannot_be_added_changes_nothing(registry: Callable, campaign: ModuleType, tmp_path: Path) -> None:
    made = registry(1)
    before = (made.path / LOG).read_bytes()
    with pytest.raises(InputError, match="is version 1 of"):
        add_bundle(made.path, tmp_path / "bundle-1", "A. Frost")
    campaign.write_bundle(tmp_path / "other", 5, "msi")
    with pytest.raises(InputError, match=r"must predict subtype .* got msi"):
        add_bundle(made.path, tmp_path / "other", "A. Frost")
    (tmp_path / "other" / "weights-0.safetensors").write_text("changed")
    with pytest.raises(InputError, match=r"weights-0\.safetensors is changed"):
        add_bundle(tmp_path / "new", tmp_path / "other", "A. Frost")
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="is not a model registry"):
        promote(tmp_path / "none", "1", "shadow")
    assert not (tmp_path / "none").exists()
    assert (made.path / LOG).read_bytes() == before


def test_a_promotion_needs_two_different_people_and_one_key_is_one_person(registry: Callable) -> None:
    made = registry(2)
    frost, winter = made.keys
    assert made.promote("2", "canary", frost) == f"1 of 2 approvals (by {frost})"
    assert made.promote("2", "canary", frost) == f"1 of 2 approvals (by {frost})"
    with pytest.raises(InputError, match=f"must be the private key of {winter}"):
        promote(made.path, "2", "canary", winter, made.keys[frost])
    with pytest.raises(InputError, match=r"'C\. Snow' may not approve"):
        promote(made.path, "2", "canary", "C. Snow", made.keys[frost])
    assert "canary" not in read_registry(made.path).aliases
    assert made.promote("2", "canary", winter) == ""
    assert read_registry(made.path).version("canary").number == 2
    # The approvals are used up: after a rollback both have to approve again.
    roll_back(made.path, "canary", winter, "a test")
    assert made.promote("2", "canary", winter) == f"1 of 2 approvals (by {winter})"


def test_a_promotion_needs_the_evidence_of_the_policy_about_this_bundle(
    registry: Callable, write_evidence: Callable, write_policy: Callable
) -> None:
    made = registry(1)
    adopt = [adopt_policy(made.path, write_policy(("validation",)), name, key) for name, key in made.keys.items()]
    assert [bool(result.missing) for result in adopt] == [True, False]
    second, third = made.add(2), made.add(3)
    with pytest.raises(InputError, match="evidence 'validation' is missing"):
        made.promote(second, "canary")
    with pytest.raises(InputError, match="must be about the bundle"):
        add_evidence(made.path, second, "validation", write_evidence(third))
    add_evidence(made.path, second, "validation", write_evidence(second, False, "accuracy 0.71, must be above 0.80"))
    with pytest.raises(InputError, match=r"did not pass: accuracy 0\.71, must be above 0\.80"):
        made.promote(second, "canary")
    add_evidence(made.path, second, "validation", write_evidence(second))
    assert made.promote(second, "canary") == ""


def test_results_of_a_study_are_evidence_if_the_plan_is_locked_and_its_primary_gates_passed(registry: Callable) -> None:
    made = registry(1)
    gate = {"title": "accuracy", "role": "primary", "verdict": "passed", "sentence": "0.9"}
    results = {"predicted_by": {"bundle_id": [made.add(2)]}, "plan": {"is_locked": True}, "gates": [gate]}
    for changed, reason in (
        ({}, "every primary gate passed"),
        ({"plan": {"is_locked": False}}, "not locked"),
        ({"gates": [gate | {"verdict": "failed"}]}, "accuracy: failed"),
        ({"gates": []}, "no primary gate"),
    ):
        file = made.folder / "results.json"
        file.write_text(json.dumps(results | changed))
        evidence = add_evidence(made.path, "2", "validation", file).evidence[results["predicted_by"]["bundle_id"][0]]
        assert reason in evidence["validation"].reason
        assert evidence["validation"].passed == (not changed)


def test_a_locked_policy_lets_nothing_through_but_a_rollback(registry: Callable, write_policy: Callable) -> None:
    made = registry(2)
    made.promote("2", "production")
    [*_, adopted] = [adopt_policy(made.path, write_policy(start="locked = true\n"), n, k) for n, k in made.keys.items()]
    assert adopted.state.policy.locked
    with pytest.raises(InputError, match="the policy is locked: nothing is promoted"):
        made.promote("1", "shadow")
    assert roll_back(made.path, "production", "A. Frost", "a test").version("production").number == 1


def test_rollbacks_go_back_through_what_was_in_production_and_never_to_what_was_withdrawn(registry: Callable) -> None:
    made = registry(3)
    for number in ("2", "3"):
        made.promote(number, "production")
    state = roll_back(made.path, "production", "guard rails", "failures")
    assert state.version("production").number == 2
    assert state.withdrawn == {state.version("3").bundle_id}
    assert roll_back(made.path, "production", "A. Frost", "again").version("production").number == 1
    with pytest.raises(InputError, match="production had no other bundle before"):
        roll_back(made.path, "production", "A. Frost", "once more")
    made.promote("3", "production")
    assert read_registry(made.path).withdrawn == {state.version("2").bundle_id}


def test_a_forged_promotion_is_found_although_its_hashes_are_right(registry: Callable) -> None:
    made = registry(2)
    bundle_id = read_registry(made.path).version("2").bundle_id
    log = EventLog(made.path / LOG)
    log.append("promoted", bundle_id=bundle_id, alias="production", by=list(made.keys))
    assert verify(made.path / LOG) is None
    with pytest.raises(InputError, match=r"\(promoted\) is not valid: 0 of 2 approvals"):
        read_registry(made.path)


def test_an_edited_log_is_refused(registry: Callable, crcjax: Callable) -> None:
    made = registry(1)
    text = (made.path / LOG).read_text()
    (made.path / LOG).write_text(text.replace("A. Frost", "C. Snow", 1))
    done = crcjax("models", "history", made.path)
    assert done.returncode == 2
    assert "was changed: its hash is not that of its text" in done.stderr


def test_mistakes_in_a_policy_are_one_line_that_names_the_field(made, tmp_path: Path) -> None:
    for text, words in (
        ("locked = 3", "locked: "),
        ("[canary]\nshare = 2", r"canary\.share: "),
        ("[canary]\npeople = 1", r"canary\.people: "),
        ("[canary]\nshar = 0.1", r"canary\.shar: "),
        (f'[people]\na = "{"0" * 64}"\nb = "{"0" * 64}"', "one key twice"),
        ("locked", "is not TOML"),
    ):
        policy = tmp_path / "bad.toml"
        policy.write_text(text)
        with pytest.raises(InputError, match=words):
            made.add(1, policy=policy)
        (tmp_path / "bundle-1").rename(tmp_path / f"used-{len(words)}-{len(text)}")


def test_processes_that_change_a_registry_at_the_same_time_lose_nothing(
    registry: Callable, write_evidence: Callable
) -> None:
    made = registry(1)
    made.add(2)
    code = (
        "import sys; from pathlib import Path; from crcjax.lifecycle.registry import add_evidence\n"
        "for n in range(15): add_evidence(Path(sys.argv[1]), '2', f'{sys.argv[3]}-{n}', Path(sys.argv[2]))"
    )
    bundle_id = read_registry(made.path).version("2").bundle_id
    evidence = write_evidence(bundle_id)
    command = [sys.executable, "-c", code, str(made.path), str(evidence)]
    processes = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(read_registry(made.path).evidence[bundle_id]) == 45


def test_the_commands_say_what_is_still_needed(registry: Callable, crcjax: Callable) -> None:
    made = registry(2)
    (frost, frost_key), (winter, winter_key) = made.keys.items()
    promotion = ("models", "promote", made.path, "2", "--to", "production")
    assert (
        crcjax(*promotion, "--by", frost, "--key", frost_key).stdout
        == f"approved; still needed: 1 of 2 approvals (by {frost})\n"
    )
    assert crcjax(*promotion, "--by", winter, "--key", winter_key).stdout == "promoted to production\n"
    done = crcjax("models", "rollback", made.path, "--by", frost, "--reason", "wrong on mucinous tumours")
    assert done.stdout == "production: version 1\n"
    lines = crcjax("models", "history", made.path).stdout.splitlines()
    assert [line.split()[2] for line in lines[-3:]] == ["approved:", "promoted:", "rolled_back:"]
    assert "reason wrong on mucinous tumours" in lines[-1]


def test_the_policy_of_the_page_is_one() -> None:
    page = (Path(__file__).parents[2] / "docs" / "lifecycle.md").read_text()
    policy = parse_policy(page.split("```toml\n")[1].split("```")[0], "docs/lifecycle.md")
    assert list(policy.people) == ["A. Frost", "B. Winter"]
    assert policy.model_copy(update={"people": {}}) == parse_policy("", "the defaults")
