"""The supervisor around real processes that end as a training can end."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.monitor.event_log import read_events, verify
from crcjax.parallel.supervisor import RestartPolicy, ending, supervise

QUICK = RestartPolicy(max_restarts=20, max_failures=4, first_delay_s=0.01, max_delay_s=0.02)


def _command(folder: Path, *endings: str) -> list[str]:
    """A program whose nth start ends as the nth statement says, and whose further starts end with 0."""
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"starts = pathlib.Path({str(folder / 'starts')!r})\n"
        "n = len(starts.read_text()) if starts.exists() else 0\n"
        "starts.write_text('x' * (n + 1))\n"
        f"endings = {list(endings)!r}\n"
        "exec(endings[n] if n < len(endings) else '')"
    )
    return [sys.executable, "-S", "-c", code]


def _starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"


def test_failures_of_the_machine_are_restarted_until_the_command_succeeds_and_the_log_names_each(
    tmp_path: Path,
) -> None:
    command = _command(tmp_path, KILLED, "sys.exit(4)", "sys.exit(1)")
    assert supervise(command, QUICK, tmp_path) == 0
    assert _starts(tmp_path) == 4
    assert verify(tmp_path / "events.jsonl") is None
    events = read_events(tmp_path / "events.jsonl")
    assert [event.kind for event in events] == ["restarted"] * 3
    assert [event.facts["status"] for event in events] == [137, 4, 1]
    assert events[0].facts["cause"] == "killed by SIGKILL"


@pytest.mark.parametrize("status", [2, 3, 5, 126, 127, 130])
def test_an_error_that_a_restart_cannot_cure_is_not_restarted(tmp_path: Path, status: int) -> None:
    assert supervise(_command(tmp_path, f"sys.exit({status})"), QUICK) == status
    assert _starts(tmp_path) == 1


def test_preemptions_are_restarted_at_once_and_do_not_count_as_failures(tmp_path: Path) -> None:
    slow = RestartPolicy(max_failures=2, first_delay_s=60.0, max_delay_s=60.0)
    began = time.monotonic()
    assert supervise(_command(tmp_path, *["sys.exit(85)"] * 5), slow, tmp_path) == 0
    assert _starts(tmp_path) == 6
    assert time.monotonic() - began < 30


def test_it_gives_up_after_a_series_of_failures_with_the_last_status(tmp_path: Path) -> None:
    assert supervise(_command(tmp_path, *[KILLED] * 9), QUICK, tmp_path) == 137
    assert _starts(tmp_path) == QUICK.max_failures
    last = read_events(tmp_path / "events.jsonl")[-1]
    assert (last.kind, last.facts["failures"], last.facts["cause"]) == ("gave_up", 4, "killed by SIGKILL")


def test_a_long_attempt_ends_a_series_of_failures_but_not_the_count_of_restarts(tmp_path: Path) -> None:
    always_healthy = RestartPolicy(max_restarts=6, max_failures=2, first_delay_s=0.0, healthy_s=0.0)
    assert supervise(_command(tmp_path, *["sys.exit(1)"] * 9), always_healthy) == 1
    assert _starts(tmp_path) == 7


def _supervised_until_ready(folder: Path, number: signal.Signals) -> subprocess.Popen:
    """A supervisor in a process of its own, whose command saves and ends with 85 when it gets the signal."""
    saves = (
        f"signal.signal({int(number)}, lambda *_: (starts.with_name('saved').touch(), sys.exit(85)));"
        "starts.with_name('ready').touch(); time.sleep(60)"
    )
    code = (
        "import sys; from crcjax.parallel.supervisor import RestartPolicy, supervise;"
        f"sys.exit(supervise({_command(folder, saves)!r}, RestartPolicy()))"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code])
    _wait_for(folder / "ready")
    return supervisor


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_and_the_command_that_saved_is_not_restarted(
    tmp_path: Path, number: signal.Signals
) -> None:
    supervisor = _supervised_until_ready(tmp_path, number)
    supervisor.send_signal(number)
    assert supervisor.wait(60) == 85
    assert (tmp_path / "saved").exists()
    assert _starts(tmp_path) == 1


def test_the_command_of_a_killed_supervisor_saves_and_ends(tmp_path: Path) -> None:
    supervisor = _supervised_until_ready(tmp_path, signal.SIGTERM)
    supervisor.kill()
    supervisor.wait()
    _wait_for(tmp_path / "saved")


def test_a_signal_during_the_delay_ends_the_supervisor_at_once(tmp_path: Path) -> None:
    wakes = f"import subprocess; subprocess.Popen(['sh', '-c', 'sleep 0.5; kill -TERM {os.getpid()}']); sys.exit(1)"
    began = time.monotonic()
    patient = RestartPolicy(first_delay_s=100.0, max_delay_s=100.0)
    assert supervise(_command(tmp_path, wakes), patient) == 1
    assert time.monotonic() - began < 20
    assert _starts(tmp_path) == 1


def test_delays_double_up_to_the_cap_and_jitter_covers_their_upper_half() -> None:
    policy = RestartPolicy(first_delay_s=1.0, max_delay_s=10.0)
    assert [policy.delay_s(failures, 0.0) for failures in (1, 2, 3, 4, 5, 10_000)] == [0.5, 1, 2, 4, 5, 5]
    assert policy.delay_s(3, 0.5) == 3


def test_the_words_of_an_ending() -> None:
    assert ending(-signal.SIGSEGV).cause == "killed by SIGSEGV"
    assert ending(137).cause == "killed by SIGKILL"
    assert ending(255).cause == "ended with status 255"
    assert not ending(255).is_permanent


def test_a_missing_command_and_wrong_limits_are_one_clear_error() -> None:
    with pytest.raises(InputError, match="needs a command after --"):
        supervise([], QUICK)
    with pytest.raises(InputError, match="no-such-program: is not a program that can be started"):
        supervise(["/no-such-program"], QUICK)
    with pytest.raises(InputError, match="max_failures must be 1 or more, got 0"):
        RestartPolicy(max_failures=0)
    with pytest.raises(InputError, match="max_delay_s must be first_delay_s"):
        RestartPolicy(first_delay_s=5.0, max_delay_s=1.0)
