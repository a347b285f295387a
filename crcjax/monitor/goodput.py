"""The goodput ledger: where the wall time of a run went, over all of its attempts.

RUN/goodput.jsonl has one line for each attempt, which is the training from one restored checkpoint to the next restore. A
thread replaces the file every second, so that a killed attempt loses no more than that. What happens between the last
line of an attempt and the start of the next process counts as `down`, and the accounts always add up to the wall time.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType

# The accounts in which an attempt records its seconds. Those of steps are divided later into kept and lost ones.
START, COMPILE, RESTORE, DATA_WAIT, STEPS = "start", "compile", "restore", "data_wait", "steps"
EVALUATE, SAVE, STALLED = "evaluate", "save", "stalled"
_RECORDED = (START, COMPILE, RESTORE, DATA_WAIT, STEPS, EVALUATE, SAVE, STALLED)
FILE = "goodput.jsonl"
_FLUSH_S = 1.0
# A step that takes this many times as long as the median, and at least a second, stalled.
_STALL_FACTOR = 10.0
_STALL_S = 1.0
_MIN_STEPS_OF_MEDIAN = 5
_MEDIAN_STEPS = 101
# Marks of an attempt, from which the time of its lost steps is computed.
_MAX_MARKS = 128


@dataclass(frozen=True)
class Attempt:
    """One attempt; a line of goodput.jsonl.

    Attributes:
      began_s: its start, in seconds since 1970.
      start_step: the step of the checkpoint that it restored.
      last_step: its last finished step.
      seconds: by account.
      marks: pairs of a step and the seconds of all steps of the attempt up to it.
    """

    began_s: float
    start_step: int
    last_step: int
    seconds: dict[str, float]
    marks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def ended_s(self) -> float:
        """The time of its last line, in seconds since 1970."""
        return self.began_s + sum(self.seconds.values())

    def step_seconds_until(self, step: int) -> float:
        """The seconds of its steps up to `step`, interpolated between marks."""
        if step <= self.start_step:
            return 0.0
        before, seconds_before = self.start_step, 0.0
        for mark, seconds in [*self.marks, (self.last_step, self.seconds[STEPS])]:
            if before < step <= mark:
                share = (step - before) / (mark - before)
                return seconds_before + share * (seconds - seconds_before)
            before, seconds_before = mark, seconds
        return self.seconds[STEPS]


@dataclass(frozen=True)
class Goodput:
    """The wall time of a run by account, in seconds.

    Attributes:
      start: from the start of a process to compiling: imports, rendezvous, opening the data.
      compile: compiling the step.
      restore: initialising or restoring the state.
      data_wait: steps could have run, but had no bags.
      steps_kept: steps that the run has not lost.
      steps_lost: steps after the checkpoint that the next attempt resumed from.
      evaluate: evaluation on the validation slides.
      save: the loop waited for a save.
      stalled: the excess of steps that took more than ten times the median: a stopped process, a hanging network.
      down: no process ran, or it was killed before it recorded its last seconds.
      attempts: the number of restores.
      lost_steps: the number of steps that were computed and lost.
    """

    start: float
    compile: float
    restore: float
    data_wait: float
    steps_kept: float
    steps_lost: float
    evaluate: float
    save: float
    stalled: float
    down: float
    attempts: int
    lost_steps: int

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds by account."""
        return {name: value for name, value in asdict(self).items() if name not in ("attempts", "lost_steps")}

    @property
    def wall_s(self) -> float:
        """The wall time from the first start of the run to its last record, in seconds."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """The goodput: the fraction of the wall time in steps that were kept."""
        return self.steps_kept / self.wall_s if self.wall_s else 0.0

    @property
    def scalars(self) -> dict[str, float]:
        """The goodput and the fraction of each account of the wall time, for TensorBoard."""
        wall_s = self.wall_s or 1.0
        shares = {f"goodput/{name}": seconds / wall_s for name, seconds in self.seconds.items()}
        return {"goodput/share": self.share, **shares}

    def __str__(self) -> str:
        wall_s = max(self.wall_s, 1e-9)
        largest = sorted(self.seconds.items(), key=lambda item: -item[1])
        accounts = ", ".join(
            f"{name.replace('_', ' ')} {seconds:.1f} s ({seconds / wall_s:.1%})" for name, seconds in largest if seconds
        )
        attempts = f"{self.attempts} attempt{'s' if self.attempts > 1 else ''}"
        return (
            f"goodput {self.share:.1%} of {self.wall_s:.1f} s in {attempts}, {self.lost_steps} steps lost: {accounts}"
        )


class Ledger:
    """Records the attempts of this process; a context manager, which ends with the last record.

    The first account is `start`.
    """

    def __init__(self, age_s: float = 0.0, writes: bool = True):
        """`age_s`: how long ago the attempt began (`process_age_s`). `writes`: False records nothing."""
        self._attempt = Attempt(time.time() - age_s, 0, 0, dict.fromkeys(_RECORDED, 0.0))
        # Durations are measured by the monotonic clock, which nobody sets.
        self._account, self._since = START, time.monotonic() - age_s
        # The running step's seconds, and the data wait up to its start.
        self._running_s, self._waited_s = 0.0, 0.0
        self._step_durations: deque[float] = deque(maxlen=_MEDIAN_STEPS)
        # By run directory: its earlier attempts.
        self._earlier: dict[Path, list[Attempt]] = {}
        self._writes = writes
        self._lock = threading.RLock()
        self._ended = threading.Event()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ended.set()
        self.flush()

    def open(self, runs: Iterable[Path]) -> None:
        """Continues the ledgers of the run directories that this process trains, and starts to write to them."""
        if self._writes and not self._earlier:
            self._earlier = {run: read_attempts(run) for run in runs}
            threading.Thread(target=self._flush_regularly, daemon=True, name="goodput").start()

    def restored(self, step: int) -> None:
        """A checkpoint of `step` was restored. The second call of a process, which went back, begins another attempt."""
        with self._lock:
            current = self._current()
            self._running_s = self._waited_s = 0.0
            if current.last_step == current.start_step:
                self._attempt = replace(current, start_step=step, last_step=step)
                return
            for attempts in self._earlier.values():
                attempts.append(current)
            self._attempt = Attempt(current.ended_s, step, step, dict.fromkeys(_RECORDED, 0.0))

    @contextmanager
    def account(self, name: str) -> Iterator[None]:
        """Records the seconds of the block under the account `name`, without those of accounts within the block."""
        with self._lock:
            self._settle()
            outer, self._account = self._account, name
        try:
            yield
        finally:
            with self._lock:
                self._settle()
                self._account = outer

    def finished_step(self, step: int, waited_s: float, before_checkpoint: bool = False) -> None:
        """The seconds in the account `steps` since the last call were those of `step`.

        Args:
          step: the finished step, counted from 1.
          waited_s: the total time in which steps waited for bags since the restore.
          before_checkpoint: whether a checkpoint of this step follows.
        """
        with self._lock:
            self._settle()
            duration_s = self._running_s
            wait_s = min(max(waited_s - self._waited_s, 0.0), duration_s)
            stalled_s = self._stalled(duration_s - wait_s)
            self._running_s, self._waited_s = 0.0, waited_s
            self._step_durations.append(duration_s - wait_s)
            seconds, marks = self._attempt.seconds, self._attempt.marks
            seconds[DATA_WAIT] += wait_s
            seconds[STALLED] += stalled_s
            seconds[STEPS] += duration_s - wait_s - stalled_s
            if before_checkpoint:
                # Where there are many marks, every second one is enough: the times between two are interpolated.
                marks = [*(marks[1::2] if len(marks) >= _MAX_MARKS else marks), (step, seconds[STEPS])]
            self._attempt = replace(self._attempt, last_step=step, marks=marks)

    def attempts(self) -> list[Attempt]:
        """The attempts of the (first) run up to now, oldest first."""
        with self._lock:
            earlier = next(iter(self._earlier.values()), [])
            return [*earlier, self._current()]

    def goodput(self) -> Goodput:
        """The goodput of the (first) run up to now."""
        return goodput_of(self.attempts())

    def flush(self) -> None:
        """Writes goodput.jsonl. A ledger that cannot be written does not end the training; the next flush tries again."""
        with self._lock:
            current = self._current()
            for run, attempts in self._earlier.items():
                lines = [json.dumps(asdict(attempt)) + "\n" for attempt in (*attempts, current)]
                partial = run / f".{FILE}.partial"
                with suppress(OSError):
                    partial.write_text("".join(lines))
                    os.replace(partial, run / FILE)

    def _settle(self) -> None:
        """Adds the seconds since the last call to the current account."""
        now = time.monotonic()
        seconds, self._since = now - self._since, now
        if self._account == STEPS:
            self._running_s += seconds
        else:
            self._attempt.seconds[self._account] += seconds

    def _current(self) -> Attempt:
        """The attempt up to now, with the running step."""
        self._settle()
        seconds, stalled_s = dict(self._attempt.seconds), self._stalled(self._running_s)
        seconds[STALLED] += stalled_s
        seconds[STEPS] += self._running_s - stalled_s
        return replace(self._attempt, seconds=seconds)

    def _stalled(self, step_s: float) -> float:
        """The seconds in which a step of `step_s` seconds stalled."""
        if len(self._step_durations) < _MIN_STEPS_OF_MEDIAN:
            return 0.0
        median_s = statistics.median(self._step_durations)
        return step_s - median_s if step_s > max(_STALL_FACTOR * median_s, _STALL_S) else 0.0

    def _flush_regularly(self) -> None:
        while not self._ended.wait(_FLUSH_S):
            self.flush()


def read_attempts(run: Path) -> list[Attempt]:
    """The attempts of a run, oldest first; empty if it has recorded none. Damaged lines are left out."""
    try:
        lines = (run / FILE).read_text().splitlines()
    except FileNotFoundError:
        return []
    attempts = []
    for line in lines:
        with suppress(ValueError, TypeError, KeyError):
            values = json.loads(line)
            seconds = {name: float(values["seconds"][name]) for name in _RECORDED}
            marks = [(int(step), float(step_s)) for step, step_s in values["marks"]]
            steps = int(values["start_step"]), int(values["last_step"])
            attempts.append(Attempt(float(values["began_s"]), *steps, seconds, marks))
    return attempts


def read_goodput(run: str | Path) -> Goodput | None:
    """The goodput of a run up to its last record; None if it has recorded nothing."""
    attempts = read_attempts(Path(run))
    return goodput_of(attempts) if attempts else None


def goodput_of(attempts: Sequence[Attempt]) -> Goodput:
    """Adds up the attempts of a run (at least one), oldest first: a step is lost if a later attempt began before it."""
    total = {name: sum(attempt.seconds[name] for attempt in attempts) for name in _RECORDED}
    *earlier, last = attempts
    kept_s, lost_steps, resumed_from = last.seconds[STEPS], 0, last.start_step
    for attempt in reversed(earlier):
        kept_step = min(max(resumed_from, attempt.start_step), attempt.last_step)
        kept_s += attempt.step_seconds_until(kept_step)
        lost_steps += attempt.last_step - kept_step
        resumed_from = min(resumed_from, attempt.start_step)
    gaps_s = [after.began_s - before.ended_s for before, after in pairwise(attempts)]
    others = {name: total[name] for name in _RECORDED if name != STEPS}
    return Goodput(
        **others,
        steps_kept=kept_s,
        steps_lost=total[STEPS] - kept_s,
        # A clock that was set back would make a gap negative.
        down=sum((max(0.0, gap_s) for gap_s in gaps_s), 0.0),
        attempts=len(attempts),
        lost_steps=lost_steps,
    )


def process_age_s() -> float:
    """The seconds since the start of this process, to a hundredth."""
    # The fields after the program's name, which may contain spaces; the 22nd of all is the start, in ticks since boot.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
