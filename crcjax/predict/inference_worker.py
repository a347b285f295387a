"""The prediction engine as a Ray actor, and the prediction of bags by one such worker for each device of a cluster."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from crcjax.errors import CrcjaxError, InputError
from crcjax.predict.attribution_method import Method
from crcjax.predict.engine import Engine, EngineWork, SlideInWork, SlideSource, default_memory_bytes
from crcjax.predict.predictor import Predictor
from crcjax.runs.code_id import code_id
from crcjax.runs.trained_model import TrainedModel
from crcjax.slides.jobs.ray_pool import joined_cluster, run_jobs_on_actors
from crcjax.slides.jobs.worker_pool import NO_LIMITS, Answer, Done, JobFailed, JobLimits

B = TypeVar("B")


@dataclass(frozen=True)
class WorkerSetup(Generic[B]):
    """All that a worker needs; it is sent to every machine.

    Attributes:
      models: the trained models. Their files must be under the same paths on every machine.
      dropout_samples: as in `Predictor`.
      attribution: as in `Predictor`.
      model_id: the id of the models (`Predictor.model_id`) in the command, which the workers must have too.
      code_id: likewise, the id of the code.
      sources: the slides of a bag.
      finish: predicts an encoded bag and writes its files; the result goes back to the command.
      memory_bytes: the limit for the slides in work (see `Engine`).
      region_share: as in `Predictor`.
    """

    models: Sequence[TrainedModel]
    dropout_samples: int
    attribution: Method
    model_id: str
    code_id: str
    sources: Callable[[B], Sequence[SlideSource]]
    finish: Callable[[Predictor, B, list[SlideInWork]], Any]
    memory_bytes: int | None = None
    region_share: float = 1.0


class DistributedInferenceWorker(Generic[B]):
    """The engine of one device, which is given bags by several calls of `do` at once.

    Args:
      setup: what predicts.
      threads: threads that decode tiles.
    """

    def __init__(self, setup: WorkerSetup[B], threads: int):
        self._setup, self._threads = setup, threads
        self._starting = threading.Lock()
        self._work: EngineWork | None = None
        self._bags: dict[int, tuple[B, Future[Any]]] = {}
        self._error: BaseException | None = None

    def do(self, bag: B) -> Answer:
        """Predicts one bag; the result is that of `finish`, or an error that concerns all bags."""
        start = time.monotonic()
        try:
            result = self._add(bag).result()
        except CrcjaxError as error:
            # It is raised in the command; an exception here would reach it as one of Ray.
            result = error
        seconds = time.monotonic() - start
        return Answer(result, again=False, seconds=seconds, worker=f"{socket.gethostname()}:{os.getpid()}")

    def _add(self, bag: B) -> Future[Any]:
        future: Future[Any] = Future()
        # The lock also keeps `_finish_bags` from taking a bag before it stands in `_bags`.
        with self._starting:
            if self._error is not None:
                raise self._error
            if self._work is None:
                self._start()
            assert self._work is not None
            self._bags[self._work.add(self._setup.sources(bag))] = bag, future
        return future

    def _start(self) -> None:
        """Loads the models. Raises InputError if they, or the code, are not those of the command."""
        setup = self._setup
        predictor = Predictor(
            *setup.models,
            dropout_samples=setup.dropout_samples,
            attribution=setup.attribution,
            region_share=setup.region_share,
        )
        if (predictor.model_id, code_id()) != (setup.model_id, setup.code_id):
            raise InputError(
                f"{socket.gethostname()}: has model {predictor.model_id} and code {code_id()}, and the command has "
                f"{setup.model_id} and {setup.code_id}; give all machines the same models and the same crcjax"
            )
        # Workers of one machine share its memory as they share its cores.
        share = min(1.0, self._threads / (os.cpu_count() or 1))
        memory_bytes = setup.memory_bytes or int(default_memory_bytes() * share)
        self._work = Engine(predictor, self._threads, memory_bytes).begin()
        threading.Thread(target=self._finish_bags, args=(predictor, self._work), name="finish", daemon=True).start()

    def _finish_bags(self, predictor: Predictor, work: EngineWork) -> None:
        try:
            while True:
                for number, slides in work.next_finished():
                    with self._starting:
                        bag, future = self._bags[number]
                    future.set_result(self._setup.finish(predictor, bag, slides))
                    # Only now: an error of `finish` must reach this bag too.
                    with self._starting:
                        del self._bags[number]
        except BaseException as error:
            with self._starting:
                self._error = error
                waiting = [future for _, future in self._bags.values()]
            for future in waiting:
                future.set_exception(error)


def predict_on_ray(
    setup: WorkerSetup[B], bags: Iterable[B], threads: int | None = None, limits: JobLimits = NO_LIMITS
) -> Iterator[Done]:
    """Predicts bags by workers on a Ray cluster, the first bags first, and yields them as they are finished.

    There is one worker for each GPU of the cluster, or for each machine if it has no GPU. The result of a bag is that of
    `setup.finish`, or JobFailed if every worker that had it died.

    Args:
      setup: what predicts.
      bags: the bags.
      threads: threads that decode tiles, by worker; by default the machine's CPUs divided by its GPUs.
      limits: how often, and after which time, a bag whose worker died is tried again.

    Raises:
      InputError: there is no cluster, or a machine has other models or another code; OutputError: the folder cannot be written.
    """
    with joined_cluster() as ray:
        alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        workers, threads, gpus = worker_layout(alive, threads)
        # As many bags as the engine opens at once.
        at_once = threads + 1
        actor_class = ray.remote(num_cpus=threads, num_gpus=gpus, max_concurrency=at_once)(DistributedInferenceWorker)
        start = partial(actor_class.remote, ray.put(setup), threads)
        for done in run_jobs_on_actors(ray, start, bags, workers, limits, at_once):
            if isinstance(done.result, CrcjaxError) and not isinstance(done.result, JobFailed):
                raise done.result
            yield done


def worker_layout(machines: Sequence[Mapping[str, float]], threads: int | None = None) -> tuple[int, int, int]:
    """How many workers a cluster has room for, the threads of each, and its GPUs (0 or 1).

    Args:
      machines: the resources `CPU` and `GPU` of every machine.
      threads: the threads of a worker; by default, the CPUs of the smallest machine divided by its workers.

    Raises:
      InputError: no machine has that many CPUs.
    """
    gpu = int(any(machine.get("GPU", 0) >= 1 for machine in machines))
    cpus_and_workers = [
        (int(machine["CPU"]), int(machine["GPU"]) if gpu else 1)
        for machine in machines
        if machine.get("CPU", 0) >= 1 and machine.get("GPU", 0) >= gpu
    ]
    threads = threads or max(1, min((cpus // workers for cpus, workers in cpus_and_workers), default=1))
    workers = sum(min(cpus // threads, workers) for cpus, workers in cpus_and_workers)
    if not workers:
        raise InputError(f"--executor ray: no machine of the cluster has {threads} CPUs; give a smaller --workers")
    return workers, threads, gpu
