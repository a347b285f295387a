"""The queue in Redis: for workers of several machines."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

import redis
from redis.backoff import ExponentialBackoff
from redis.retry import Retry

from crcjax.errors import InputError
from crcjax.serve.queue import (
    DEFAULT_JOB_S,
    Job,
    JobRequest,
    Lease,
    LeaseLostError,
    Priority,
    QueueFullError,
    QueueLimits,
    QueueStats,
    QueueUnavailableError,
    Status,
    WorkerState,
)

# The settings without which Redis forgets accepted jobs when it is killed, its machine loses power, or its memory is full.
_SETTINGS = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
_TIMEOUT_S = 5.0
# Pauses between the tries of a call while Redis cannot be reached.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 1.0


class RedisQueue:
    """The queue in a Redis server; any number of processes and machines may open it.

    All times are the server's, so that the clocks of the machines need not agree. If the server's clock is set forward, leases
    expire early; their jobs are tried again. If it is set back, a dead worker's job waits for one lease more.

    Args:
      url: such as redis://HOST:6379/0, or rediss:// for TLS; the number is the database.
      limits: the queue's.
      patience: times that a call is tried again while Redis cannot be reached.
      now: the Unix time, in place of the server's.
      prefix: of all keys.

    Raises:
      InputError: the URL is none, or a setting would let it forget accepted jobs.
      QueueUnavailableError: Redis cannot be reached.
    """

    def __init__(
        self,
        url: str,
        limits: QueueLimits | None = None,
        patience: int = 1,
        now: Callable[[], float] | None = None,
        prefix: str = "crcjax:",
    ):
        self.limits = limits or QueueLimits()
        self._now, self._prefix = now, prefix
        # Without the password that the URL may hold.
        self._name = f"redis at {urlsplit(url).hostname or urlsplit(url).path}"
        try:
            self._redis = redis.Redis.from_url(
                url,
                decode_responses=True,
                socket_timeout=_TIMEOUT_S,
                retry=Retry(ExponentialBackoff(_LONGEST_PAUSE_S, _FIRST_PAUSE_S), patience),
            )
        except ValueError as error:
            raise InputError(
                f"redis must be a URL such as redis://HOST:6379/0, got one that is not: {error}"
            ) from error
        self._check_settings()
        self._script = self._redis.register_script((files("crcjax.serve") / "redis_queue.lua").read_text())

    def _check_settings(self) -> None:
        try:
            settings = self._redis.config_get(*_SETTINGS)
        except redis.ResponseError as error:
            raise InputError(f"{self._name}: does not show its settings ({error}); permit CONFIG GET") from error
        except redis.RedisError as error:
            raise self._unreachable(error) from error
        wrong = [f"{name} must be {value}, got {settings.get(name)}" for name, value in _SETTINGS.items()]
        wrong = [text for text, name in zip(wrong, _SETTINGS, strict=True) if settings.get(name) != _SETTINGS[name]]
        if wrong:
            raise InputError(f"{self._name} would lose accepted jobs: {'; '.join(wrong)}; correct its redis.conf")

    def _unreachable(self, error: Exception) -> QueueUnavailableError:
        return QueueUnavailableError(f"{self._name}: cannot be reached ({error}); start it, or correct the URL")

    def belong_to(self, owner: str) -> None:
        """Binds the database to the state folder with this id. Raises InputError if it belongs to another, QueueUnavailableError."""
        try:
            self._redis.set(f"{self._prefix}owner", owner, nx=True)
            first = self._redis.get(f"{self._prefix}owner")
        except redis.RedisError as error:
            raise self._unreachable(error) from error
        if first != owner:
            raise InputError(
                f"{self._name}: holds the jobs of another state folder; give that --state, or the URL of another database, "
                "such as redis://HOST:6379/1"
            )

    def _call(self, operation: str, *arguments: str | int | float) -> Any:
        now = "" if self._now is None else repr(float(self._now()))
        try:
            return self._script(keys=[self._prefix], args=[operation, now, *arguments])
        except redis.RedisError as error:
            raise QueueUnavailableError(f"{self._name}: {error}") from error

    def submit(self, request: JobRequest) -> Job:
        outcome, *values = self._call(
            "submit",
            *(str(uuid.uuid4()), request.result_key, request.owner, request.site, int(request.priority)),
            *(json.dumps(request.payload), self.limits.max_queued),
        )
        if outcome == "full":
            raise QueueFullError(int(values[0]), max(1, math.ceil(float(values[1] or DEFAULT_JOB_S))))
        job = self.job(values[0])
        assert job is not None
        return job

    def job(self, job_id: str) -> Job | None:
        values = _pairs(self._call("job", job_id))
        return _job(values) if values else None

    def cancel(self, job_id: str) -> Job | None:
        self._call("cancel", job_id)
        return self.job(job_id)

    def claim(self, worker: str) -> Lease | None:
        limits = self.limits
        claimed = self._call("claim", worker, limits.lease_s, limits.max_tries, limits.ageing_s)
        if not claimed:
            return None
        return Lease(claimed[0], int(claimed[1]), json.loads(claimed[2]))

    def renew(self, lease: Lease, progress: float, stage: str) -> None:
        self._call_with_lease("renew", lease, self.limits.lease_s, repr(float(progress)), stage)

    def commit(self, lease: Lease, result: Mapping[str, Any]) -> None:
        self._call_with_lease("finish", lease, Status.DONE, json.dumps(result), "", self.limits.max_shared)

    def fail(self, lease: Lease, reason: str) -> None:
        self._call_with_lease("finish", lease, Status.FAILED, "", reason, 0)

    def abandon(self, lease: Lease, reason: str) -> None:
        self._call_with_lease("abandon", lease, self.limits.max_tries, reason)

    def release(self, lease: Lease) -> None:
        self._call_with_lease("release", lease)

    def _call_with_lease(self, operation: str, lease: Lease, *arguments: str | int | float) -> None:
        """An operation that needs the lease."""
        status = self._call(operation, lease.job_id, lease.token, *arguments)
        if status:
            raise LeaseLostError(f"job {lease.job_id} is {status}, and not this worker's any more; drop its result")

    def forget_results(self) -> None:
        self._call("forget_results")

    def worker_died(self, worker: str) -> None:
        self._call("worker_died", worker, self.limits.lease_s, self.limits.max_tries)

    def report_worker(self, worker: str, state: str) -> None:
        self._call("report_worker", worker, state)

    def workers(self) -> list[WorkerState]:
        now, reports = self._call("workers")
        states = {name: text.split(" ", 1) for name, text in _pairs(reports).items()}
        return [WorkerState(name, state, float(now) - float(time)) for name, (time, state) in sorted(states.items())]

    def stats(self) -> QueueStats:
        counts, oldest_s, mean_s = self._call("stats")
        jobs = {Status(status): int(count) for status, count in _pairs(counts).items() if int(count)}
        return QueueStats(jobs, float(oldest_s), float(mean_s) if mean_s else None)

    def close(self) -> None:
        """Closes the connections."""
        self._redis.close()


def _pairs(values: list[str]) -> dict[str, str]:
    return dict(zip(values[::2], values[1::2], strict=True))


def _job(values: Mapping[str, str]) -> Job:
    def time(name: str) -> float | None:
        return float(values[name]) if values.get(name) else None

    return Job(
        id=values["id"],
        priority=Priority(int(values["priority"])),
        status=Status(values["status"]),
        payload=json.loads(values["payload"]),
        submitted_s=float(values["submitted_s"]),
        started_s=time("started_s"),
        ended_s=time("ended_s"),
        tries=int(values["tries"]),
        progress=float(values["progress"]),
        stage=values["stage"],
        position=int(values["position"]) if "position" in values else None,
        result=json.loads(values["result"]) if values.get("result") else None,
        reason=values["reason"],
        revision=int(values["revision"]),
    )
