"""Heartbeats: a small file of each process of a run, which says that the process is alive and where it stands.

A thread replaces RUN/heartbeats/process-I.json once a second, so that a disk that hangs does not hold up the training. The files
can be read while the run trains, from any machine that sees the run directory.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import TracebackType

import psutil

from crcjax.errors import CrcjaxError, StoppedError

FOLDER = "heartbeats"
# The phases in which a process is within a step, and whose time is that of a step.
READING, COMPUTING = "reading its bags", "computing"
# The ending of a process that did all of its work, and of one that a signal stopped.
FINISHED, STOPPED = "finished", "stopped with everything saved"
_INTERVAL_S = 1.0
# With more processes each writes less often, so that the file system gets at most this many files a second.
_MOST_FILES_PER_S = 200
# The steps and the device probes that a median is taken of.
_STEPS, _PROBES = 50, 5
# The longest wait for the last heartbeat, which a hanging disk would delay.
_LAST_WAIT_S = 1.0
_ENDING_LENGTH = 300


@dataclass(frozen=True)
class Heartbeat:
    """The state of one process of a run, as the process itself reports it.

    Attributes:
      process: its index.
      process_count: the number of processes of the run.
      host: its machine.
      pid: its id there.
      began_s: when it started to train, in seconds since 1970.
      time_s: when it wrote this, in seconds since 1970.
      step: the step that it computes, counted from 1; 0 before the first one.
      phase: what it does.
      phase_s: for how long it has done that, in seconds.
      step_s: seconds of a step, without evaluation and saving; a median. None before the second step.
      reading_s: seconds of a step in which it waited for its bags; a median.
      probe_s: seconds that its slowest device takes for a fixed computation of its own; None if it was not measured.
      memory_bytes: its resident memory on the host.
      ending: how it ended; empty while it runs.
    """

    process: int
    process_count: int
    host: str
    pid: int
    began_s: float
    time_s: float
    step: int
    phase: str
    phase_s: float
    step_s: float | None
    reading_s: float | None
    probe_s: float | None
    memory_bytes: int
    ending: str


@dataclass(frozen=True)
class StepTotals:
    """A number of steps, their seconds, and the seconds of these in which they waited for their bags."""

    steps: int = 0
    step_s: float = 0.0
    reading_s: float = 0.0

    def plus(self, step_s: float, reading_s: float) -> StepTotals:
        """The totals with one more step."""
        return StepTotals(self.steps + 1, self.step_s + step_s, self.reading_s + reading_s)


class HeartbeatWriter:
    """Writes the heartbeats of this process; a context manager, which ends with a last one that says how the block ended.

    `report` may be called from any thread. Nothing is written before `open`.
    """

    def __init__(self, process: int = 0, process_count: int = 1, host: str = ""):
        self.process, self.process_count, self.host = process, process_count, host or socket.gethostname()
        self.step, self.phase = 0, "starting"
        self._phase_time = time.monotonic()
        # The seconds of the running step by phase, and those of the last steps.
        self._seconds = {READING: 0.0, COMPUTING: 0.0}
        self._steps: deque[tuple[float, float]] = deque(maxlen=_STEPS)
        self._totals = StepTotals()
        self._probes: deque[float] = deque(maxlen=_PROBES)
        self._began_s = time.time()
        self._thread: threading.Thread | None = None
        self._ending, self._ended = "", threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> HeartbeatWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(_ending(error))

    @property
    def phase_s(self) -> float:
        """The seconds since the last report."""
        return time.monotonic() - self._phase_time

    def report(self, step: int, phase: str) -> None:
        """Records that the process is in a phase of a step (counted from 1) from now on."""
        with self._lock:
            now = time.monotonic()
            if self.phase in self._seconds:
                self._seconds[self.phase] += now - self._phase_time
            if phase == READING and self._seconds[COMPUTING]:
                step_s, reading_s = self._seconds[READING] + self._seconds[COMPUTING], self._seconds[READING]
                self._steps.append((step_s, reading_s))
                self._totals = self._totals.plus(step_s, reading_s)
                self._seconds = dict.fromkeys(self._seconds, 0.0)
            self.step, self.phase, self._phase_time = step, phase, now

    @property
    def totals(self) -> StepTotals:
        """The steps that were finished since this object was made."""
        return self._totals

    def forgive(self, seconds: float) -> None:
        """The process was stopped from outside for that long: its phase took no longer for that."""
        with self._lock:
            self._phase_time += seconds

    def probed(self, seconds: float) -> None:
        """Records the seconds that the slowest device of this process took for the fixed computation."""
        self._probes.append(seconds)

    def open(self, runs: Iterable[Path]) -> None:
        """Starts to write heartbeats to these run directories; does nothing while it writes."""
        if self._thread is None:
            self._ending, self._ended = "", threading.Event()
            folders = [run / FOLDER for run in runs]
            self._thread = threading.Thread(
                target=self._write_regularly, args=(folders, self._ended), daemon=True, name="heartbeat"
            )
            self._thread.start()

    def close(self, ending: str) -> None:
        """Writes the last heartbeat, with the reason for the end, and stops. Does nothing if it does not write."""
        thread, self._thread = self._thread, None
        if thread:
            self._ending = " ".join(ending.split())[:_ENDING_LENGTH]
            self._ended.set()
            thread.join(_LAST_WAIT_S)

    def current(self) -> Heartbeat:
        """The heartbeat of now."""
        with self._lock:
            steps = list(self._steps)
            probes = list(self._probes)
            return Heartbeat(
                self.process,
                self.process_count,
                self.host,
                os.getpid(),
                self._began_s,
                time.time(),
                self.step,
                self.phase,
                self.phase_s,
                statistics.median(step_s for step_s, _ in steps) if steps else None,
                statistics.median(reading_s for _, reading_s in steps) if steps else None,
                statistics.median(probes) if probes else None,
                psutil.Process().memory_info().rss,
                self._ending,
            )

    def _write_regularly(self, folders: list[Path], ended: threading.Event) -> None:
        interval_s = max(_INTERVAL_S, self.process_count / _MOST_FILES_PER_S)
        self._write(folders)
        while not ended.wait(interval_s):
            self._write(folders)
        self._write(folders)

    def _write(self, folders: list[Path]) -> None:
        """A heartbeat that cannot be written does not end the training; the next one tries again."""
        text = json.dumps(asdict(self.current())) + "\n"
        for folder in folders:
            path = folder / f"process-{self.process}.json"
            partial = path.with_name(f".{path.name}.partial")
            with suppress(OSError):
                folder.mkdir(exist_ok=True)
                partial.write_text(text)
                os.replace(partial, path)


def read_heartbeats(run: str | Path) -> list[Heartbeat]:
    """The newest heartbeat of each process of a run's last attempt, by index; empty if it has none.

    Files that cannot be read are left out, and so are those of an earlier attempt with more processes.
    """
    heartbeats = []
    for path in (Path(run) / FOLDER).glob("process-*.json"):
        with suppress(OSError, ValueError, TypeError):
            heartbeats.append(_parsed(path.read_text()))
    if not heartbeats:
        return []
    count = max(heartbeats, key=lambda heartbeat: heartbeat.time_s).process_count
    return sorted(
        (heartbeat for heartbeat in heartbeats if heartbeat.process < count), key=lambda heartbeat: heartbeat.process
    )


def _ending(error: BaseException | None) -> str:
    if error is None:
        return FINISHED
    if isinstance(error, StoppedError):
        return STOPPED
    return str(error) if isinstance(error, CrcjaxError) else f"{type(error).__name__}: {error}"


def _parsed(text: str) -> Heartbeat:
    values = json.loads(text)
    # A newer version may have added a field.
    return Heartbeat(**{field.name: values[field.name] for field in fields(Heartbeat) if field.name in values})
