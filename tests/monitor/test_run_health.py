import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.monitor.goodput import STEPS, Ledger
from crcjax.monitor.heartbeat import COMPUTING, FINISHED, FOLDER, STOPPED, HeartbeatWriter
from crcjax.monitor.run_health import run_health


def _write(run: Path, process: int, count: int = 3, age_s: float = 0.5, **changes: object) -> None:
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    beat = HeartbeatWriter(process, count, f"node-{process}").current()
    changes = {"step": 7, "phase": COMPUTING, "phase_s": 1.7, "time_s": time.time() - age_s} | changes
    (run / FOLDER / f"process-{process}.json").write_text(json.dumps(asdict(replace(beat, **changes))))


def test_a_run_whose_processes_are_alive_is_well(tmp_path: Path) -> None:
    for process in range(3):
        _write(tmp_path, process)
    health = run_health(tmp_path)
    assert health.is_well
    assert [process.state for process in health.processes] == ["computing for 2 s"] * 3
    assert health.goodput is None


def test_a_silent_an_absent_and_a_failed_process_are_not_well(tmp_path: Path) -> None:
    _write(tmp_path, 0)
    _write(tmp_path, 1, age_s=43.0)
    health = run_health(tmp_path)
    assert not health.is_well
    assert [process.is_well for process in health.processes] == [True, False, False]
    assert [process.state for process in health.processes[1:]] == [
        "no heartbeat for 43 s; it was computing",
        "no heartbeat",
    ]
    assert run_health(tmp_path, silence_s=60.0).processes[1].is_well
    _write(tmp_path, 0, ending="process 1 (node-1) was lost")
    assert run_health(tmp_path).processes[0].state == "process 1 (node-1) was lost"
    assert not run_health(tmp_path).processes[0].is_well


@pytest.mark.parametrize("ending", [FINISHED, STOPPED])
def test_a_run_that_has_finished_or_was_stopped_is_well_however_long_ago(tmp_path: Path, ending: str) -> None:
    for process in range(3):
        _write(tmp_path, process, age_s=1e6, ending=ending)
    assert run_health(tmp_path).is_well


def test_stragglers_are_named_and_lost_processes_are_none(tmp_path: Path) -> None:
    for process in range(3):
        _write(tmp_path, process, step_s=1.0, reading_s=0.0, probe_s=0.03 if process == 2 else 0.01)
    assert [straggler.process for straggler in run_health(tmp_path).stragglers] == [2]
    _write(tmp_path, 2, step_s=1.0, reading_s=0.0, probe_s=0.03, age_s=99.0)
    assert run_health(tmp_path).stragglers == []


def test_the_goodput_up_to_now_and_the_first_member_of_an_ensemble_are_shown(tmp_path: Path) -> None:
    member = tmp_path / "seed-1"
    _write(member, 0, count=1)
    with Ledger() as ledger:
        ledger.open([member])
        ledger.restored(0)
        with ledger.account(STEPS):
            ledger.finished_step(1, 0.0)
    health = run_health(tmp_path)
    assert len(health.processes) == 1
    assert health.goodput is not None
    assert health.goodput.attempts == 1


def test_a_folder_without_heartbeats_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no heartbeats; give the --workdir of a training"):
        run_health(tmp_path)
