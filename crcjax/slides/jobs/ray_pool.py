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
    ray = _imported()
    with _joined(ray):
        schedule = Schedule(jobs, limits)
        actor_class = ray.remote(num_cpus=1)(_RayWorker)
        processes = processes or max(1, int(ray.cluster_resources().get("CPU", 1)))
        idle: list[Any] = []
        working: dict[Any, tuple[Ticket, Any]] = {}
        try:
            while working or schedule.unfinished:
                while len(working) < processes and (ticket := schedule.next()):
                    actor = idle.pop() if idle else actor_class.remote(function, limits)
                    working[actor.do.remote(ticket.job)] = ticket, actor
                if not working:
                    time.sleep(schedule.wait_s or 0)
                    continue
                for reference in ray.wait(list(working), timeout=schedule.wait_s)[0]:
                    ticket, actor = working.pop(reference)
                    try:
                        answer = ray.get(reference)
                        idle.append(actor)
                    except ray.exceptions.RayActorError as error:
                        failed = JobFailed(
                            f"its worker or machine died ({type(error).__name__}); run the command again"
                        )
                        answer = Answer(failed, again=True, seconds=0.0, worker="")
                    if done := schedule.settle(ticket, answer):
                        yield done
        finally:
            for actor in [*idle, *(actor for _, actor in working.values())]:
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


def _imported() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError("--executor ray needs Ray: pip install 'crcjax[ray]'") from error
    return ray


@contextmanager
def _joined(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    try:
        ray.init(address="auto", log_to_driver=False, logging_level="error")
    except (ConnectionError, RuntimeError) as error:
        raise InputError(
            "--executor ray: no Ray cluster answers; start one (ray start --head) or set RAY_ADDRESS to its address"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
