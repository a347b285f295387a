import hashlib
import json
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.validation.study.plan_lock import lock_file, lock_plan, plan_state
from crcjax.validation.study.read_plan import PlanFile, read_plan

TEXT = 'title = "t"\nversion = "1"\nclasses = ["a", "b"]\nseed = 0\n[data]\npredictions = "p.csv"\ncohort = "c.csv"\n'


@pytest.fixture
def plan(tmp_path: Path) -> PlanFile:
    path = tmp_path / "plan.toml"
    path.write_text(TEXT)
    return read_plan(path)


def _changed(plan: PlanFile, before: str, after: str) -> PlanFile:
    plan.path.write_text(plan.text.replace(before, after))
    return read_plan(plan.path)


def test_a_lock_records_the_plan_and_the_files_that_existed(plan: PlanFile, tmp_path: Path) -> None:
    assert "was not locked" in plan_state(plan).sentence
    (tmp_path / "c.csv").write_text("cohort")
    (tmp_path / "bundle.json").write_text("{}")
    state = lock_plan(plan, [tmp_path / "bundle.json"])
    assert state.is_current
    assert state.changes == ()
    (version,) = state.versions
    assert version.sha256 == hashlib.sha256(TEXT.encode()).hexdigest()
    assert version.files["cohort"] == hashlib.sha256(b"cohort").hexdigest()
    assert version.files[str(tmp_path / "bundle.json")] == hashlib.sha256(b"{}").hexdigest()
    assert "predictions" not in version.files
    assert "has not changed since. The cohort existed then." in state.sentence
    assert lock_plan(plan) == plan_state(plan) == state, "locking again changes nothing"


def test_every_later_change_is_shown_line_by_line(plan: PlanFile) -> None:
    lock_plan(plan)
    changed = _changed(plan, "seed = 0", "seed = 7")
    state = plan_state(changed)
    assert not state.is_current
    assert state.changes == (("in use, not locked", ("-seed = 0", "+seed = 7")),)
    assert "has changed once since, as listed" in state.sentence
    lock_plan(changed)
    state = plan_state(_changed(changed, 'version = "1"', 'version = "2"'))
    assert [lines for _, lines in state.changes] == [
        ("-seed = 0", "+seed = 7"),
        ('-version = "1"', '+version = "2"'),
    ]
    assert state.changes[0][0].startswith("locked again on 20")
    assert "has changed 2 times since" in state.sentence


def test_a_rewritten_log_is_a_fault_and_is_not_written_to(plan: PlanFile) -> None:
    lock_plan(plan)
    log = lock_file(plan.path)
    event = json.loads(log.read_text())
    event["facts"]["text"] = TEXT.replace("seed = 0", "seed = 1")
    log.write_text(json.dumps(event) + "\n")
    assert "log of the plan's lock is damaged: line 1 was changed" in plan_state(plan).sentence
    with pytest.raises(InputError, match=r"plan\.lock\.jsonl: line 1 was changed.*restore it from a copy"):
        lock_plan(plan)


def test_the_commands_lock_and_check(crcjax, plan: PlanFile, tmp_path: Path) -> None:
    assert crcjax("plan", "check", plan.path).returncode == 1
    done = crcjax("plan", "lock", plan.path)
    assert done.returncode == 0
    assert plan.sha256 in done.stderr
    assert crcjax("plan", "check", plan.path).returncode == 0
    _changed(plan, "seed = 0", "seed = 7")
    done = crcjax("plan", "check", plan.path)
    assert (done.returncode, "+seed = 7" in done.stderr) == (1, True)
    example = tmp_path / "example.toml"
    assert crcjax("plan", "example", "--out", example).returncode == 0
    assert read_plan(example).plan.hypotheses
    again = crcjax("plan", "example", "--out", example)
    assert (again.returncode, "exists; give another --out" in again.stderr) == (2, True)
