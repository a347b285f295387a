"""Maps a function over jobs in worker processes (`run_jobs`), with limits, retries and replacement of dead workers."""

from __future__ import annotations

import errno
import heapq
import multiprocessing
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import cv2
import psutil

from crcjax.errors import BusyError, CrcjaxError, InputError, SlideError

WATCH_S = 0.1  # seconds between two checks of a worker that has limits
_BUSY_S = 0.5
# Errors of a failing disk or network file system, not of a bad file.
_STORAGE_FAULTS = (
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.ENOTCONN, errno.EPIPE),
    *(errno.ECONNRESET, errno.ECONNABORTED, errno.ECONNREFUSED, errno.ENETDOWN, errno.ENETUNREACH),
    *(errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOLCK),
)


@dataclass(frozen=True)
class JobLimits:
    """A job is given up after `timeout_s` seconds, or when its worker has more than `memory_gib` GiB resident.

    After a storage error, or if its worker was killed from outside, a job is retried, up to `attempts` attempts in all:
    the first retry waits `backoff_s` seconds, each further one twice as long. Raises InputError.
    """

    timeout_s: float | None = None
    memory_gib: float | None = None
    attempts: int = 4
    backoff_s: float = 1.0

    def __post_init__(self) -> None:
        for name in ("timeout_s", "memory_gib", "attempts"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"limit {name} {value}: give a number above 0")


NO_LIMITS = JobLimits()
NO_MAIN_GUARD = (
    "a worker process runs this script again from its start; put the script's calls under `if __name__ == '__main__':`"
)
NO_MAIN_GUARD_STATUS = 87


class JobFailed(CrcjaxError):
    """A job ended without a result.

    `status` is `timeout`, `memory`, `storage`, or `failed` for a dead worker or a bug. `trace` is the traceback of a bug; it
    may name the job's files.
    """

    def __init__(self, message: str, status: str = "failed", trace: str = ""):
        super().__init__(message)
        self.status = status
        self.trace = trace


@dataclass(frozen=True)
class Done:
    """A job and its result: the function's return value, or a CrcjaxError. `seconds` is the duration of the last attempt."""

    job: Any
    result: Any
    attempts: int
    seconds: float
    worker: str  # machine:process


def run_jobs(
    function: Callable[[Any], Any], jobs: Iterable[Any], processes: int, limits: JobLimits = NO_LIMITS
) -> Iterator[Done]:
    """Yields results as they arrive, from at most `processes` worker processes that take the jobs in order.

    A result may be a CrcjaxError that `function` raised, or JobFailed. A worker that dies or exceeds its limits loses only
    its current job, and a new worker replaces it. A job that raises BusyError is postponed until it does not. Jobs, results
    and `function` (defined at module level) are pickled. Workers end with the process that started them.
    """
    schedule = Schedule(jobs, limits)
    idle = [Worker(function, limits) for _ in range(processes)]
    working: dict[Connection, tuple[Ticket, Worker]] = {}
    watch_s = WATCH_S if limits.timeout_s or limits.memory_gib else None
    try:
        while working or schedule.unfinished:
            while idle and (ticket := schedule.next()):
                worker = idle.pop()
                working[worker.begin(ticket.job)] = ticket, worker
            due_s = schedule.wait_s if idle else None
            wait(list(working), min((s for s in (due_s, watch_s) if s is not None), default=None))
            for pipe, (ticket, worker) in list(working.items()):
                if answer := worker.answer():
                    del working[pipe]
                    idle.append(worker)
                    if done := schedule.settle(ticket, answer):
                        yield done
    finally:
        for worker in [*idle, *(worker for _, worker in working.values())]:
            worker.end()


@dataclass(frozen=True)
class Ticket:
    job: Any
    attempt: int


@dataclass(frozen=True)
class Answer:
    """The result of one attempt; `again` is true if a retry may succeed."""

    result: Any
    again: bool
    seconds: float
    worker: str


def check_main_guard() -> None:
    """Ends a worker process that is importing a script without a main guard. Functions that scripts call begin with it.

    The worker would otherwise do the script's work again. The process that started it then raises InputError with
    NO_MAIN_GUARD, in place of a traceback of every worker.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        _empty_start_pipe()
        os._exit(NO_MAIN_GUARD_STATUS)


def _empty_start_pipe() -> None:
    """Reads the rest of the data that start a spawned process; its parent would wait forever to write them."""
    if handle := re.search(r"pipe_handle=(\d+)", " ".join(sys.orig_argv)):
        with suppress(OSError):
            while select.select([int(handle[1])], [], [], 1.0)[0] and os.read(int(handle[1]), 2**16):
                pass


class Schedule:
    """Decides which job is next and which are postponed."""

    def __init__(self, jobs: Iterable[Any], limits: JobLimits):
        self._waiting = deque(Ticket(job, 1) for job in jobs)
        self._later: list[tuple[float, int, Ticket]] = []
        self._limits, self._count = limits, 0

    @property
    def unfinished(self) -> bool:
        return bool(self._waiting or self._later)

    @property
    def wait_s(self) -> float | None:
        """Seconds until the first postponed job is due; None if there is none."""
        return max(0.0, self._later[0][0] - time.monotonic()) if self._later else None

    def next(self) -> Ticket | None:
        if self.wait_s == 0:
            return heapq.heappop(self._later)[2]
        return self._waiting.popleft() if self._waiting else None

    def settle(self, ticket: Ticket, answer: Answer) -> Done | None:
        """The job and its final result; None if the job is postponed."""
        attempt, limits = ticket.attempt, self._limits
        if isinstance(answer.result, BusyError):
            self._postpone(ticket, _BUSY_S)
        elif answer.again and attempt < limits.attempts:
            self._postpone(Ticket(ticket.job, attempt + 1), limits.backoff_s * 2 ** (attempt - 1))
        else:
            return Done(ticket.job, answer.result, attempt, answer.seconds, answer.worker)
        return None

    def _postpone(self, ticket: Ticket, seconds: float) -> None:
        self._count += 1  # tickets have no order of their own
        heapq.heappush(self._later, (time.monotonic() + seconds, self._count, ticket))


class Worker:
    """A process that does one job after the other. It is watched from here, started when needed and replaced when dead."""

    def __init__(self, function: Callable[[Any], Any], limits: JobLimits):
        self._function, self._limits = function, limits
        self._process: Any = None
        self._began = 0.0

    def begin(self, job: Any) -> Connection:
        """Starts a job; the returned connection is ready when the answer is, unless a limit is exceeded first."""
        if self._process is None:
            check_main_guard()
            context: Any = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([self._function.__module__, __name__, "numpy.ma"])  # np.median loads it
            pipe, other = context.Pipe()
            self._pipe = cast(Connection, pipe)
            self._process = context.Process(target=_work, args=(self._function, other), daemon=True)
            self._process.start()
            other.close()
        self._began = time.monotonic()
        # If the worker died meanwhile, `answer` finds the end of its pipe.
        with suppress(BrokenPipeError):
            self._pipe.send(job)
        return self._pipe

    def answer(self) -> Answer | None:
        """The result of the job; None while it runs within its limits."""
        seconds, limits = time.monotonic() - self._began, self._limits
        name = f"{socket.gethostname()}:{self._process.pid}"
        if self._pipe.poll():
            result, again = self._received()
        elif limits.timeout_s and seconds > limits.timeout_s:
            text = f"took more than {limits.timeout_s:g} s; look at the slide, or raise --slide-timeout-s"
            result, again = JobFailed(text, "timeout"), False
            self.end()
        elif limits.memory_gib and self._memory_gib() > limits.memory_gib:
            text = f"took more than {limits.memory_gib:g} GiB; raise --slide-memory-gib"
            result, again = JobFailed(text, "memory"), False
            self.end()
        else:
            return None
        # Memory that one job did not free must not count against the next.
        if self._process and limits.memory_gib and self._memory_gib() > limits.memory_gib / 2:
            self.end()
        return Answer(result, again, seconds, name)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _received(self) -> tuple[Any, bool]:
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            status = self._process.exitcode
            self.end()
        if status == NO_MAIN_GUARD_STATUS:
            raise InputError(NO_MAIN_GUARD) from None
        # A slide that crashes its reader would do so again; SIGKILL and SIGTERM come from elsewhere.
        killed = status in (-signal.SIGKILL, -signal.SIGTERM)
        return JobFailed(f"its worker died (exit status {status}); run the command again"), killed

    def _memory_gib(self) -> float:
        try:
            return psutil.Process(self._process.pid).memory_info().rss / 2**30
        except psutil.NoSuchProcess:
            return 0.0


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    # Processes and threads over slides fill the cores; OpenCV's own threads would only compete.
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        pipe.send(_attempt(function, job))


def _attempt(function: Callable[[Any], Any], job: Any) -> tuple[Any, bool]:
    """(result, whether the storage failed)."""
    try:
        return function(job), False
    except Exception as error:
        failed_storage = is_storage_fault(error)
        if isinstance(error, SlideError) and failed_storage:
            return SlideError(error.path, "storage", error.reason, "check the file system that holds it"), True
        if isinstance(error, CrcjaxError):
            return error, failed_storage
        if failed_storage:
            return JobFailed(f"{error}; check the file systems of slides and store", "storage"), True
        message = f"{type(error).__name__}: {error}; a fault of crcjax, please report it"
        return JobFailed(message, trace=traceback.format_exc()), False


def is_storage_fault(error: BaseException | None) -> bool:
    """Whether an error or its cause is a file system or network error that may pass.

    C libraries embed the system's message in their own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno in _STORAGE_FAULTS
        if any(os.strerror(code) in str(error) for code in _STORAGE_FAULTS):
            return True
        error = error.__cause__
    return False


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # Its user starts a killed run again: orphaned workers must not tile at the same time.
    os._exit(1)
