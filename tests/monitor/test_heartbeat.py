"""Heartbeats, written by real threads and processes to real files."""

import json
import os
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from crcjax.errors import InputError, StoppedError
from crcjax.monitor import heartbeat
from crcjax.monitor.heartbeat import (
    COMPUTING,
    FINISHED,
    FOLDER,
    READING,
    STOPPED,
    HeartbeatWriter,
    read_heartbeats,
)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 1000.0
        monkeypatch.setattr(heartbeat.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_heartbeat_has_the_step_the_phase_and_the_medians_of_step_and_reading_without_saving(clock: Clock) -> None:
    writer = HeartbeatWriter(1, 4, "node-7")
    writer.report(0, "restoring")
    clock.now += 100
    writer.report(1, READING)
    for step in range(1, 12):
        clock.now += 0.2 if step != 6 else 5.0
        writer.report(step, COMPUTING)
        clock.now += 0.8
        writer.report(step, "saving")
        clock.now += 30
        writer.report(step + 1, READING)
    clock.now += 3
    current = writer.current()
    assert (current.process, current.process_count, current.host, current.pid) == (1, 4, "node-7", os.getpid())
    assert (current.step, current.phase, current.phase_s) == (12, READING, pytest.approx(3))
    assert (current.step_s, current.reading_s) == (pytest.approx(1.0), pytest.approx(0.2))
    assert current.probe_s is None
    assert current.memory_bytes > 2**20
    writer.forgive(2.0)
    assert writer.phase_s == pytest.approx(1)


def test_the_file_is_replaced_every_second_and_a_reader_never_sees_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_INTERVAL_S", 0.001)
    with HeartbeatWriter() as writer:
        assert not (tmp_path / FOLDER).exists()
        writer.open([tmp_path])
        while not (tmp_path / FOLDER / "process-0.json").exists():
            time.sleep(0.01)
        steps = []
        for step in range(1, 300):
            writer.report(step, COMPUTING)
            (newest,) = read_heartbeats(tmp_path)
            steps.append(newest.step)
            time.sleep(0.001)
    assert steps == sorted(steps)
    assert len(set(steps)) > 3
    (last,) = read_heartbeats(tmp_path)
    assert (last.step, last.ending) == (299, FINISHED)


@pytest.mark.parametrize(
    ("error", "ending"),
    [
        (StoppedError("RUN: stopped at step 5"), STOPPED),
        (InputError("cohort.csv: is\n  absent"), "cohort.csv: is absent"),
        (ValueError("x"), "ValueError: x"),
    ],
)
def test_the_last_heartbeat_says_how_the_training_ended(tmp_path: Path, error: Exception, ending: str) -> None:
    writer, runs = HeartbeatWriter(), [tmp_path / "one", tmp_path / "two"]
    for run in runs:
        run.mkdir()

    def train() -> None:
        with writer:
            writer.open(runs)
            raise error

    with pytest.raises(type(error)):
        train()
    assert [read_heartbeats(tmp_path / run)[0].ending for run in ("one", "two")] == [ending] * 2
    # The next training of the same process begins anew.
    with writer:
        writer.open([tmp_path / "one"])
    assert read_heartbeats(tmp_path / "one")[0].ending == FINISHED


def test_a_disk_that_cannot_be_written_or_hangs_does_not_hold_up_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "hangs" / FOLDER).mkdir(parents=True)
    # To open a pipe without a reader is to wait for ever.
    os.mkfifo(tmp_path / "hangs" / FOLDER / ".process-0.json.partial")
    began = time.monotonic()
    with HeartbeatWriter() as writer:
        writer.open([tmp_path / "file", tmp_path / "hangs"])
        writer.report(1, COMPUTING)
    assert time.monotonic() - began < 30
    assert read_heartbeats(tmp_path / "hangs") == []
    # Frees the thread.
    os.close(os.open(tmp_path / "hangs" / FOLDER / ".process-0.json.partial", os.O_RDONLY | os.O_NONBLOCK))


def _write(run: Path, process: int, **changes: object) -> None:
    (run / FOLDER).mkdir(exist_ok=True)
    beat = replace(HeartbeatWriter(process, 2, "host").current(), **changes)
    (run / FOLDER / f"process-{process}.json").write_text(json.dumps(asdict(beat)))


def test_files_of_an_earlier_attempt_with_more_processes_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    assert read_heartbeats(tmp_path) == []
    _write(tmp_path, 10)
    for process in range(4):
        _write(tmp_path, process, process_count=4, time_s=1000.0)
    for process in (1, 0):
        _write(tmp_path, process, process_count=2, time_s=2000.0)
    _write(tmp_path, 10, process_count=11, time_s=500.0)
    assert [beat.process for beat in read_heartbeats(tmp_path)] == [0, 1]
    path = tmp_path / FOLDER / "process-0.json"
    # A newer version may have more to say.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 40}))
    (tmp_path / FOLDER / "process-1.json").write_text('{"process": 1}')
    assert [beat.process for beat in read_heartbeats(tmp_path)] == [0]


def test_a_thread_may_report_while_another_one_writes() -> None:
    writer = HeartbeatWriter()

    def report() -> None:
        for step in range(2000):
            writer.report(step, COMPUTING)
            writer.report(step + 1, READING)
            writer.probed(0.1)

    threads = [threading.Thread(target=report) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        writer.current()
    assert writer.current().step == 2000
