"""The contract of the service's queue: jobs, leases, and what every back end promises.

* An accepted job is durable, and ends in exactly one of `done`, `failed`, `cancelled` or `quarantined`, whatever dies.
* Urgent jobs come first. Within a priority, sites take turns, and at a site its users. Of the jobs that have waited longer
  than `ageing_s`, the oldest gets every second claim, so that none starves.
* A worker holds a job by a lease, which it renews. When the lease expires, another worker may claim the job under a higher
  fencing token; whatever the first one still reports is refused.
* A job with the result key of one that is queued, running, or among the last `max_shared` that were done, is that job.
* A job that was claimed `max_tries` times without an end is quarantined.

`tests/serve/test_queue.py` is the test of this contract for every back end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Any, Protocol, runtime_checkable

from crcjax.errors import CrcjaxError

# Seconds that a job is expected to take before any was done.
DEFAULT_JOB_S = 60.0


class Priority(IntEnum):
    """Smaller comes first."""

    URGENT = 0
    ROUTINE = 1


class Status(StrEnum):
    """Where a job stands."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"
    QUARANTINED = "quarantined"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return self not in (Status.QUEUED, Status.RUNNING)


class QueueFullError(CrcjaxError):
    """The queue takes no more jobs now; `retry_after_s` is the time after which there should be room."""

    def __init__(self, queued: int, retry_after_s: int):
        super().__init__(f"the queue is full ({queued} jobs wait); try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class QueueUnavailableError(CrcjaxError):
    """The queue's server cannot be reached or cannot write; nothing was accepted, and the same call may succeed later."""


class LeaseLostError(CrcjaxError):
    """The job was cancelled, or its lease expired and it belongs to another attempt; nothing was written."""


@dataclass(frozen=True)
class QueueLimits:
    """What bounds the queue.

    Attributes:
      max_queued: jobs that may wait; further ones are refused.
      max_tries: claims of a job without an end after which it is quarantined.
      lease_s: seconds for which a lease lasts unless it is renewed.
      ageing_s: seconds of waiting after which a job takes part in every second claim.
      max_shared: jobs that were done whose results answer further requests with their result keys; the oldest are no longer
        shared, but keep their results.
    """

    max_queued: int = 10_000
    max_tries: int = 3
    lease_s: float = 30.0
    ageing_s: float = 4 * 3600.0
    max_shared: int = 100_000

    def longest_wait_s(self, job_s: float, workers: int) -> float:
        """The longest time for which an accepted job waits, if jobs take at most `job_s` and `workers` are alive."""
        return self.ageing_s + 2 * self.max_queued * job_s / workers


@dataclass(frozen=True)
class JobRequest:
    """A job to be queued.

    Attributes:
      result_key: identifies everything that decides the result.
      owner: the user, who takes turns with the others of the site.
      payload: what the worker needs, as JSON values.
      priority: urgent or routine.
      site: the site, which takes turns with the others.
    """

    result_key: str
    owner: str
    payload: Mapping[str, Any]
    priority: Priority = Priority.ROUTINE
    site: str = ""


@dataclass(frozen=True)
class Job:
    """A job as the queue knows it.

    Attributes:
      position: the jobs that would be claimed before it; None unless it is queued.
      progress: 0 to 1.
      stage: what the worker does now.
      tries: claims so far.
      result: the committed result of a job that is done, as JSON values.
      reason: why it failed or was quarantined.
      revision: grows with every change.
      submitted_s, started_s, ended_s: Unix times.
    """

    id: str
    priority: Priority
    status: Status
    payload: Mapping[str, Any]
    submitted_s: float
    started_s: float | None
    ended_s: float | None
    tries: int
    progress: float
    stage: str
    position: int | None
    result: Mapping[str, Any] | None
    reason: str
    revision: int


@dataclass(frozen=True)
class Lease:
    """A worker's right to one job; `token` is larger than that of every earlier lease."""

    job_id: str
    token: int
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class WorkerState:
    """A worker: what it does (`loading`, `ready`, `busy`), and the seconds since it last said so."""

    name: str
    state: str
    silent_s: float


@dataclass(frozen=True)
class QueueStats:
    """Counts of jobs by status, the age of the oldest queued job, and the mean seconds of recent jobs (None without any)."""

    counts: Mapping[Status, int] = field(default_factory=dict)
    oldest_queued_s: float = 0.0
    mean_job_s: float | None = None


@runtime_checkable
class Queue(Protocol):
    """A back end."""

    limits: QueueLimits

    def submit(self, request: JobRequest) -> Job:
        """Queues a job, or returns the live or finished one of the same result key, raised to the request's priority.

        It is durable when this returns. Raises QueueFullError.
        """

    def job(self, job_id: str) -> Job | None:
        """The job as it stands."""

    def cancel(self, job_id: str) -> Job | None:
        """Cancels a job that has not ended, and returns it as it then stands."""

    def claim(self, worker: str) -> Lease | None:
        """Takes the next job; None if there is none."""

    def renew(self, lease: Lease, progress: float, stage: str) -> None:
        """Extends a lease and records the progress. Raises LeaseLostError."""

    def commit(self, lease: Lease, result: Mapping[str, Any]) -> None:
        """Ends the job with its result. Raises LeaseLostError."""

    def fail(self, lease: Lease, reason: str) -> None:
        """Ends the job with a failure that another try would repeat. Raises LeaseLostError."""

    def abandon(self, lease: Lease, reason: str) -> None:
        """Gives the job back after an error that another try may not have. Raises LeaseLostError."""

    def release(self, lease: Lease) -> None:
        """Gives the job back untried, since the worker stops. Raises LeaseLostError."""

    def forget_results(self) -> None:
        """Shares no result of a job that is done with later requests; the jobs keep their results."""

    def worker_died(self, worker: str) -> None:
        """Expires the leases of a worker that is known to be dead, and forgets the worker."""

    def report_worker(self, worker: str, state: str) -> None:
        """Records what a worker does."""

    def workers(self) -> list[WorkerState]:
        """The workers that reported."""

    def stats(self) -> QueueStats:
        """Counts for metrics."""
