import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcjax.monitor import goodput
from crcjax.monitor.goodput import (
    COMPILE,
    FILE,
    RESTORE,
    SAVE,
    START,
    STEPS,
    Attempt,
    Ledger,
    goodput_of,
    process_age_s,
    read_attempts,
    read_goodput,
)

ACCOUNTS = ("start", "compile", "restore", "data_wait", "steps", "evaluate", "save", "stalled")


class Clock:
    """The clocks of the ledger, which the test sets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(goodput.time, "time", lambda: self.now)
        monkeypatch.setattr(goodput.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def _attempt(began_s: float, start_step: int, last_step: int, marks=(), **seconds: float) -> Attempt:
    return Attempt(began_s, start_step, last_step, dict.fromkeys(ACCOUNTS, 0.0) | seconds, list(marks))


def test_every_second_of_an_attempt_is_in_one_account(clock: Clock, tmp_path: Path) -> None:
    ledger = Ledger(age_s=3.0)
    clock.now += 2
    with ledger.account(COMPILE):
        clock.now += 4
    ledger.open([tmp_path])
    with ledger.account(RESTORE):
        clock.now += 1
        ledger.restored(0)
    with ledger.account(STEPS):
        for step in range(1, 11):
            clock.now += 1
            ledger.finished_step(step, waited_s=0.25 * step)
        with ledger.account(SAVE):
            clock.now += 0.5
        clock.now += 1
        ledger.finished_step(11, waited_s=0.25 * 10)
    actual = ledger.goodput()
    assert actual.seconds == pytest.approx(
        {
            "start": 5, "compile": 4, "restore": 1, "data_wait": 2.5, "steps_kept": 8.5, "steps_lost": 0,
            "evaluate": 0, "save": 0.5, "stalled": 0, "down": 0,
        }
    )  # fmt: skip
    assert actual.wall_s == pytest.approx(clock.now - 997)
    assert actual.share == pytest.approx(8.5 / 21.5)
    assert (actual.attempts, actual.lost_steps) == (1, 0)


def test_a_step_that_takes_ten_times_the_median_stalled_for_its_excess_also_while_it_still_runs(
    clock: Clock, tmp_path: Path
) -> None:
    ledger = Ledger()
    with ledger.account(STEPS):
        for step in range(1, 11):
            clock.now += 1
            ledger.finished_step(step, 0.0)
        clock.now += 9
        ledger.finished_step(11, 0.0)
        assert ledger.goodput().stalled == 0
        clock.now += 31
        assert ledger.goodput().stalled == pytest.approx(30)
        ledger.finished_step(12, 0.0)
    assert ledger.goodput().stalled == pytest.approx(30)
    assert ledger.goodput().steps_kept == pytest.approx(20)


def test_steps_after_the_checkpoint_that_the_next_attempt_restores_are_lost(clock: Clock, tmp_path: Path) -> None:
    def train(start: int, steps: int, checkpoint_every: int) -> None:
        ledger = Ledger()
        ledger.open([tmp_path])
        ledger.restored(start)
        with ledger.account(STEPS):
            for step in range(start + 1, start + steps + 1):
                clock.now += 1
                ledger.finished_step(step, 0.0, step % checkpoint_every == 0)
            clock.now += 0.5
            ledger.flush()

    train(0, 7, 5)
    clock.now += 10
    train(5, 4, 5)
    clock.now += 20
    train(5, 3, 5)
    actual = read_goodput(tmp_path)
    assert actual is not None
    # Of the first attempt 5 s of 7.5 are kept, of the second none of 4.5, of the last all of 3.5.
    assert (actual.steps_kept, actual.steps_lost, actual.down) == pytest.approx((8.5, 7.0, 30))
    assert (actual.attempts, actual.lost_steps) == (3, 6)
    assert actual.wall_s == pytest.approx(clock.now - 1000)


def test_going_back_within_a_process_begins_an_attempt_without_a_gap(clock: Clock, tmp_path: Path) -> None:
    ledger = Ledger()
    ledger.open([tmp_path])
    ledger.restored(0)
    with ledger.account(STEPS):
        for step in range(1, 9):
            clock.now += 1
            ledger.finished_step(step, 0.0, step == 4)
        with ledger.account(RESTORE):
            clock.now += 2
            ledger.restored(4)
        clock.now += 1
        ledger.finished_step(5, 0.0)
    actual = ledger.goodput()
    assert (actual.steps_kept, actual.steps_lost, actual.restore, actual.down) == pytest.approx((5, 4, 2, 0))
    assert [attempt.start_step for attempt in read_attempts(tmp_path)] == []
    ledger.flush()
    assert [attempt.start_step for attempt in read_attempts(tmp_path)] == [0, 4]


seconds = st.fixed_dictionaries(dict.fromkeys(ACCOUNTS, st.floats(0, 1000)))


@given(st.lists(st.tuples(seconds, st.integers(0, 50), st.integers(0, 50), st.floats(0, 100)), min_size=1, max_size=5))
def test_the_accounts_add_up_to_the_wall_time(attempts: list) -> None:
    ledger, now = [], 0.0
    for accounts, start, steps, gap in attempts:
        marks = [(start + i, accounts["steps"] * i / steps) for i in range(5, steps, 5)]
        ledger.append(Attempt(now, start, start + steps, accounts, marks))
        now = ledger[-1].ended_s + gap
    actual = goodput_of(ledger)
    assert actual.wall_s == pytest.approx(ledger[-1].ended_s, abs=1e-6)
    assert all(value >= -1e-9 for value in actual.seconds.values())
    assert actual.lost_steps >= 0


def test_the_time_of_steps_between_two_marks_is_interpolated() -> None:
    attempt = _attempt(0.0, 10, 40, [(20, 10.0), (30, 50.0)], steps=80.0)
    assert [attempt.step_seconds_until(step) for step in (5, 10, 15, 20, 25, 30, 40, 50)] == pytest.approx(
        [0, 0, 5, 10, 30, 50, 80, 80]
    )


def test_an_attempt_keeps_a_bounded_number_of_marks(clock: Clock) -> None:
    ledger = Ledger()
    with ledger.account(STEPS):
        for step in range(1, 1001):
            clock.now += 1
            ledger.finished_step(step, 0.0, True)
    attempt = ledger._current()
    assert len(attempt.marks) <= 128
    assert attempt.step_seconds_until(990) == pytest.approx(990)


def test_the_ledger_of_a_run_is_described_in_one_line() -> None:
    line = str(goodput_of([_attempt(0.0, 0, 10, start=2.0, steps=6.0), _attempt(10.0, 10, 20, start=2.0, steps=6.0)]))
    assert line == (
        "goodput 66.7% of 18.0 s in 2 attempts, 0 steps lost: steps kept 12.0 s (66.7%), start 4.0 s (22.2%), "
        "down 2.0 s (11.1%)"
    )


def test_a_run_without_a_ledger_has_no_goodput_and_damaged_lines_are_left_out(tmp_path: Path) -> None:
    assert read_goodput(tmp_path) is None
    complete_line = json.dumps(vars(_attempt(0.0, 0, 10, steps=6.0)))
    (tmp_path / FILE).write_text(f"{complete_line}\n[]\n{{}}\n{complete_line[:40]}\n{complete_line}\n")
    assert len(read_attempts(tmp_path)) == 2


def test_processes_that_do_not_write_leave_no_file_and_a_folder_that_is_gone_is_no_error(tmp_path: Path) -> None:
    with Ledger(writes=False) as ledger:
        ledger.open([tmp_path])
    assert list(tmp_path.iterdir()) == []
    with Ledger() as ledger:
        ledger.open([tmp_path / "gone"])


PROGRAM = """
import sys, time
from pathlib import Path
from crcjax.monitor.goodput import COMPILE, RESTORE, STEPS, Ledger, process_age_s, read_attempts

run, ends = Path(sys.argv[1]), sys.argv[2] == "ends"
with Ledger(process_age_s()) as ledger:
    ledger.open([run])
    with ledger.account(COMPILE):
        time.sleep(0.5)
    first = len(read_attempts(run)) < 2
    start = 0 if first else 25
    ledger.restored(start)
    with ledger.account(STEPS):
        for step in range(start + 1, 1_000_000):
            time.sleep(0.05)
            ledger.finished_step(step, 0.0, step % 5 == 0)
            if ends and step == 45:
                break
            if step == 40:
                print("step 40", flush=True)
"""


def test_the_ledger_of_a_killed_and_restarted_process_adds_up_to_the_wall_time_within_half_a_percent(
    tmp_path: Path,
) -> None:
    began = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), "runs"], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    time.sleep(1)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path), "ends"], check=True)
    wall_s = time.monotonic() - began
    actual = read_goodput(tmp_path)
    assert actual is not None
    # The end of the interpreter after the last record is not in the ledger; in a run, it is less than 0.5 %.
    assert abs(actual.wall_s - wall_s) < 0.005 * wall_s + 0.1
    assert actual.attempts == 2
    assert 1 <= actual.down <= 1 + 1.5
    assert actual.compile == pytest.approx(1.0, abs=0.3)
    assert 0 < actual.start < 2
    assert actual.steps_lost > 0.2


def test_the_age_of_a_process_is_that_since_its_start() -> None:
    program = "import time; time.sleep(0.5); from crcjax.monitor.goodput import process_age_s; print(process_age_s())"
    began = time.monotonic()
    age_s = float(subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout)
    assert 0.5 < age_s <= time.monotonic() - began + 0.02
    assert process_age_s() > 0
    assert START == "start"
