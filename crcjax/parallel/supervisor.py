"""Supervises a training command: restarts it after a failure of the machine, and gives up on errors that a restart cannot cure.

The exit statuses are those of `crcjax train` (`crcjax.main`). Of a command of several processes, such as `srun`, the status is
that of the process that failed. A command whose supervisor is killed gets SIGTERM, so that a new supervisor does not start a
second training beside it.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from crcjax.errors import AGAIN_STATUS, InputError
from crcjax.monitor.event_log import EventLog
from crcjax.monitor.logs import log

# A wrong config or cohort, an output that cannot be written, a diverged loss, a command line that a shell cannot run: the
# next attempt would end in the same way.
PERMANENT = {
    2: "the config, the cohort, the store or the run directory cannot be used",
    3: "the output cannot be written",
    5: "the loss diverged",
    126: "the command cannot be executed",
    127: "the command was not found",
}
_INTERRUPTED = 130
_FORWARDED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class RestartPolicy:
    """When a command is restarted.

    The delay before restart n of a series of failures is random between half and all of `first_delay_s` * 2**(n - 1), at most
    `max_delay_s`, so that many supervisors that fail together do not return together. An attempt that ran for `healthy_s`
    ends the series.

    Attributes:
      max_restarts: restarts in all, preemptions included.
      max_failures: failures in a series after which the supervisor gives up.
      first_delay_s: the longest delay after the first failure.
      max_delay_s: the longest delay.
      healthy_s: the length of an attempt that counts as a success, although it failed in the end.
    """

    max_restarts: int = 1000
    max_failures: int = 10
    first_delay_s: float = 1.0
    max_delay_s: float = 300.0
    healthy_s: float = 600.0

    def __post_init__(self) -> None:
        for name, least in (("max_restarts", 0), ("max_failures", 1), ("first_delay_s", 0), ("healthy_s", 0)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} must be {least} or more, got {getattr(self, name)}")
        if not self.max_delay_s >= self.first_delay_s:
            raise InputError(
                f"max_delay_s must be first_delay_s ({self.first_delay_s}) or more, got {self.max_delay_s}"
            )

    def delay_s(self, failures: int, fraction: float) -> float:
        """The delay after a number of failures in series; `fraction` is uniformly random in [0, 1)."""
        # 2**60 s is beyond any limit, and larger powers overflow.
        longest = min(self.max_delay_s, self.first_delay_s * 2.0 ** min(failures - 1, 60))
        return longest * (1 + fraction) / 2


@dataclass(frozen=True)
class Ending:
    """How one attempt ended: the status as shells report it (128 + a signal's number), and the cause in words."""

    status: int
    cause: str
    is_permanent: bool = False
    is_preemption: bool = False


def ending(returncode: int) -> Ending:
    """Reads the return code of an attempt, negative for a signal as `subprocess` reports it."""
    status = 128 - returncode if returncode < 0 else returncode
    if status == 0:
        return Ending(0, "done", is_permanent=True)
    if status in PERMANENT:
        return Ending(status, PERMANENT[status], is_permanent=True)
    if status == _INTERRUPTED:
        return Ending(status, "interrupted by Ctrl-C", is_permanent=True)
    if status == AGAIN_STATUS:
        return Ending(status, "stopped with everything saved", is_preemption=True)
    if status == 4:
        return Ending(status, "a process of the run failed, was lost or stood still")
    if status > 128:
        try:
            return Ending(status, f"killed by {signal.Signals(status - 128).name}")
        except ValueError:
            pass
    return Ending(status, f"ended with status {status}")


def supervise(command: Sequence[str], policy: RestartPolicy, run: Path | None = None) -> int:
    """Runs a command until it succeeds, is stopped or cannot succeed, and returns the status of its last attempt.

    SIGTERM, SIGUSR1, SIGINT and SIGHUP are passed on to the command, which saves and ends; it is then not restarted. A command
    that ends with status 85 without such a signal was preempted, or needs smaller micro-batches: it is restarted at once, and
    that does not count as a failure. Call it from the main thread.

    Args:
      command: the program and its arguments.
      policy: when it is restarted.
      run: the run directory, whose events.jsonl gets an entry for every failure, restart and surrender; none without it.

    Raises:
      InputError: there is no command, or its program cannot be started.
      OutputError: events.jsonl cannot be written. The first attempt has not begun, or the last one has ended.
    """
    if not command:
        raise InputError("crcjax supervise needs a command after --, such as: crcjax supervise -- crcjax train …")
    events = EventLog(run / "events.jsonl") if run else None

    def record(kind: str, sentence: str, **facts: Any) -> None:
        log.warning(f"crcjax supervise: {sentence}")
        if events:
            events.append(kind, **facts)

    failures = restarts = 0
    with _Signals() as signals:
        while True:
            begun = time.monotonic()
            end = ending(signals.wait_for(command))
            seconds = time.monotonic() - begun
            if signals.received or end.is_permanent:
                if end.status:
                    stop = signals.received.name if signals.received else None
                    sentence = f"the command ended ({end.cause}) and is not restarted" + (
                        f" after {stop}" if stop else ""
                    )
                    record("not_restarted", sentence, status=end.status, cause=end.cause, stopped_by=stop)
                return end.status
            if not end.is_preemption:
                failures = 1 if seconds >= policy.healthy_s else failures + 1
            facts = {"status": end.status, "cause": end.cause, "attempt_s": round(seconds, 3)}
            if failures >= policy.max_failures:
                record(
                    "gave_up", f"gives up after {failures} failures in series ({end.cause})", failures=failures, **facts
                )
                return end.status
            if restarts >= policy.max_restarts:
                record("gave_up", f"gives up after {restarts} restarts ({end.cause})", restarts=restarts, **facts)
                return end.status
            delay_s = 0.0 if end.is_preemption else policy.delay_s(failures, random.random())
            restarts += 1
            sentence = (
                f"restart {restarts} in {delay_s:.1f} s: the command {'was ' if end.status > 128 else ''}{end.cause}"
            )
            record("restarted", sentence, restart=restarts, delay_s=round(delay_s, 3), **facts)
            if signals.sleeps(delay_s):
                return end.status


# Asks the kernel to send SIGTERM to the process when its parent ends, and becomes the command. In the child of a fork that is not
# safe: this process may have threads.
_END_WITH_PARENT = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class _Signals:
    """Passes signals on to the running command, and remembers the first one."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._child: subprocess.Popen | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Signals:
        self._previous = {number: signal.signal(number, self._pass_on) for number in _FORWARDED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def wait_for(self, command: Sequence[str]) -> int:
        """Runs the command to its end, and returns its return code. Raises InputError."""
        if shutil.which(command[0]) is None:
            raise InputError(f"{command[0]}: is not a program that can be started; check the command after --")
        # In a group of its own, it gets a terminal's Ctrl-C only once, from here.
        self._child = subprocess.Popen([sys.executable, "-ISc", _END_WITH_PARENT, *command], process_group=0)
        if self.received:
            self._child.send_signal(self.received)
        return self._child.wait()

    def sleeps(self, seconds: float) -> bool:
        """Sleeps, and returns whether a signal ended that."""
        end = time.monotonic() + seconds
        while not self.received and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
        return self.received is not None

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)
        if self._child and self._child.returncode is None:
            self._child.send_signal(number)
