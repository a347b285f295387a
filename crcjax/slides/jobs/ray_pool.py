"""`run_jobs` on a Ray cluster: the same workers, limits and retries, on every machine of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from crcjax.errors import InputError
from crcjax.slides.jobs.worker_pool import (
    NO_LIMITS,
    WATCH_S,
    Answer,
    Done,
    JobFailed,
    JobLimits,
    Schedule,
    Ticket,
    Worker,
)


def run_jobs_on_ray(
    function: Callable[[Any], Any], jobs: Iterable[Any], processes: int | None, limits: JobLimits = NO_LIMITS
) -> Iterator[Done]:
    """Like `run_jobs`, with at most `processes` CPUs of the running cluster (all by default).

    Its machines need crcjax and must have slides and store under the same paths. The cluster is the one that this process
    has joined, else the one at RAY_ADDRESS, else this machine's. Raises InputError if there is none.
    """
    with joined_cluster() as ray:
        actor_class = ray.remote(num_cpus=1)(_RayWorker)
        processes = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
        yield from run_jobs_on_actors(ray, lambda: actor_class.remote(function, limits), jobs, processes, limits)


def run_jobs_on_actors(
    ray: Any,
    start: Callable[[], Any],
    jobs: Iterable[Any],
    actors: int,
    limits: JobLimits = NO_LIMITS,
    at_once: int = 1,
) -> Iterator[Done]:
    """Yields the results of jobs from at most `actors` Ray actors that `start` starts, each with at most `at_once` jobs.

    An actor answers `do(job)` with an Answer. If it or its machine dies, its jobs are done again by others, each without another
    job beside it, so that a job that kills its actors fails alone.
    """
    schedule = Schedule(jobs, limits)
    working: dict[Any, tuple[Ticket, Any]] = {}
    jobs_of: dict[Any, int] = {}
    ticket: Ticket | None = None
    try:
        while working or ticket or schedule.unfinished:
            while ticket := ticket or schedule.next():
                places = at_once if ticket.attempt > 1 else 1
                if len(jobs_of) < actors and all(jobs_of.values()):
                    jobs_of[start()] = 0
                actor = min(jobs_of, key=jobs_of.__getitem__)
                if jobs_of[actor] + places > at_once:
                    break
                jobs_of[actor] += places
                working[actor.do.remote(ticket.job)] = ticket, actor
                ticket = None
            if not working:
                time.sleep(schedule.wait_s or 0)
                continue
            for reference in ray.wait(list(working), timeout=None if ticket else schedule.wait_s)[0]:
                done_ticket, actor = working.pop(reference)
                try:
                    answer = ray.get(reference)
                    jobs_of[actor] -= at_once if done_ticket.attempt > 1 else 1
                except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError) as error:
                    jobs_of.pop(actor, None)
                    failed = JobFailed(f"its worker or machine died ({type(error).__name__}); run the command again")
                    answer = Answer(failed, again=True, seconds=0.0, worker="")
                if done := schedule.settle(done_ticket, answer):
                    yield done
    finally:
        for actor in jobs_of:
            ray.kill(actor)


class _RayWorker:
    """Reserves one CPU of the cluster; a separate process does the work, so that it can be watched and ended."""

    def __init__(self, function: Callable[[Any], Any], limits: JobLimits):
        self._worker = Worker(function, limits)

    def do(self, job: Any) -> Answer:
        pipe = self._worker.begin(job)
        while not (answer := self._worker.answer()):
            wait([pipe], WATCH_S)
        return answer


@contextmanager
def joined_cluster() -> Iterator[Any]:
    """Joins the Ray cluster as `run_jobs_on_ray` does, and gives the module ray. Raises InputError."""
    ray = _imported()
    if ray.is_initialized():
        yield ray
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError) as error:
        raise InputError(
            "--executor ray: no Ray cluster answers; start one (ray start --head) or set RAY_ADDRESS to its address"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--executor ray needs Ray: pip install 'crcjax[ray]'") from error
    return ray
