"""A function mapped over slides in processes (`run_jobs`), and the tiling of many slides (`tile_slides`)."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import cv2

from crcjax.errors import CrcjaxError, InputError, SlideError
from crcjax.slides.reader import Slide, SlideInfo, open_slide
from crcjax.slides.store import StoreWriter, open_store, remove_partials, shard_regions, tiled_slides
from crcjax.slides.tiling import RegionTiles, TilePlan, TilingParams, plan_tiles, read_regions


@dataclass(frozen=True)
class TileJob:
    """One slide to tile; `mpp` (µm per level-0 px) overrides what the file says."""

    slide_id: str
    path: Path
    mpp: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of one slide: `status` is `tiled`, `already tiled`, `failed` or a SlideError's."""

    slide_id: str
    path: str
    status: str
    reason: str = ""
    regions: int = 0
    tiles: int = 0
    seconds: float = 0.0

    @property
    def succeeded(self) -> bool:
        return self.status in ("tiled", "already tiled")


def tile_slides(
    jobs: Sequence[TileJob],
    store: Path,
    params: TilingParams,
    *,
    workers: int | None = None,
    pixels: bool = True,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Tiles slides into a store, the largest first; what is already there with the same content is left as it is.

    `workers` is the number of cores to use (all by default): processes over slides, and threads within a slide when
    there are fewer slides than workers. A slide that cannot be used is an outcome. Raises InputError if the store holds
    tiles of other parameters, two jobs share a slide id or one cannot name a file, OutputError if the store cannot be
    written.
    """
    _check_jobs(jobs)
    remove_partials(store)
    _check_same_params(store, params)
    workers = workers or len(os.sched_getaffinity(0))
    processes = max(1, min(workers, len(jobs)))
    tasks = [
        _TileTask(job, store, params, pixels, threads=max(1, workers // processes)) for job in _largest_first(jobs)
    ]
    outcomes: dict[str, Outcome] = {}
    try:
        for task, result in run_jobs(_tile_slide, tasks, processes):
            if isinstance(result, SlideError):
                reason = f"{result.reason}; {result.remedy}"
                result = Outcome(task.job.slide_id, str(task.job.path), result.status, reason)
            elif isinstance(result, JobFailed):
                result = Outcome(task.job.slide_id, str(task.job.path), "failed", str(result))
            elif isinstance(result, BaseException):
                raise result
            outcomes[task.job.slide_id] = result
            on_outcome(result)
    finally:
        remove_partials(store)
    return [outcomes[job.slide_id] for job in jobs]


class JobFailed(CrcjaxError):
    """A job of `run_jobs` ended without an answer: its worker was killed or ran out of memory, or the code failed."""


def run_jobs(function: Callable[[Any], Any], jobs: Sequence[Any], processes: int) -> Iterator[tuple[Any, Any]]:
    """Yields (job, result) as results come; each job runs in a process of its own, at most `processes` at a time.

    A result may be a CrcjaxError that `function` raised, or JobFailed: a dead worker loses its own job alone. Jobs,
    results and `function` (a module's own) are pickled. Workers end with the process that started them.
    """
    context = multiprocessing.get_context("forkserver")
    # The server imports once; each worker is then a fork of it, ready in milliseconds.
    context.set_forkserver_preload([function.__module__])
    waiting = deque(jobs)
    running: dict[Connection, tuple[Any, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                job = waiting.popleft()
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_run, args=(function, job, sender), daemon=True)
                process.start()
                sender.close()
                running[receiver] = job, process
            for receiver in cast(list[Connection], wait(list(running))):
                job, process = running.pop(receiver)
                try:
                    result = receiver.recv()
                except EOFError:
                    process.join()
                    result = JobFailed(f"its worker died (exit status {process.exitcode}); run the command again")
                process.join()
                receiver.close()
                yield job, result
    finally:
        for _, process in running.values():
            process.kill()
            process.join()


def _run(function: Callable[[Any], Any], job: Any, sender: Connection) -> None:
    # Processes and threads over slides fill the cores; OpenCV's own threads would only compete.
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        result = function(job)
    except CrcjaxError as error:
        result = error
    except Exception as error:
        traceback.print_exc()
        result = JobFailed(f"{type(error).__name__}: {error}; a fault of crcjax, please report it")
    sender.send(result)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    # A run that was killed is started again: its orphans must not tile beside it.
    os._exit(1)


@dataclass(frozen=True)
class _TileTask:
    job: TileJob
    store: Path
    params: TilingParams
    pixels: bool
    threads: int


def _tile_slide(task: _TileTask) -> Outcome:
    start, job = time.monotonic(), task.job
    with open_slide(job.path, job.mpp) as slide:
        done = _already_tiled(task, slide.info)
        if done:
            return done
        plan = plan_tiles(slide, task.params)
        kept = 0
        with StoreWriter(task.store, job.slide_id, slide.info, plan, task.pixels) as writer:
            for first, tiles in read_ahead(slide, plan, task.threads):
                writer.write(first, tiles)
                kept += int(tiles.mask.sum())
            writer.commit()
    seconds = time.monotonic() - start
    return Outcome(job.slide_id, str(job.path), "tiled", "", len(plan.origin), kept, seconds)


def read_ahead(slide: Slide, plan: TilePlan, threads: int) -> Iterator[tuple[int, RegionTiles]]:
    """Yields (first region, tiles) shard by shard in order, decoded by `threads` threads, a few shards ahead."""
    step = shard_regions(plan.params)
    starts = deque(range(0, len(plan.origin), step))
    ahead: deque[tuple[int, Future[RegionTiles]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while starts or ahead:
                while starts and len(ahead) <= threads:
                    first = starts.popleft()
                    last = min(first + step, len(plan.origin))
                    ahead.append((first, pool.submit(read_regions, slide, plan, first, last)))
                first, future = ahead.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _already_tiled(task: _TileTask, info: SlideInfo) -> Outcome | None:
    try:
        found = open_store(task.store, task.job.slide_id)
    except InputError:
        return None
    same_slide = replace(found.info, path="") == replace(info, path="")
    if not same_slide or (task.pixels and not found.has_pixels):
        return None
    counts = len(found.origin), int(found.mask.sum())
    return Outcome(task.job.slide_id, info.path, "already tiled", "", *counts)


def _check_jobs(jobs: Sequence[TileJob]) -> None:
    paths: dict[str, Path] = {}
    for job in jobs:
        if not job.slide_id or job.slide_id.startswith(".") or "/" in job.slide_id:
            raise InputError(f"{job.path}: the slide id {job.slide_id!r} cannot name a file; give it another")
        if job.slide_id in paths:
            raise InputError(
                f"{job.path}: has the slide id {job.slide_id!r}, as {paths[job.slide_id]} has; name them in a cohort"
            )
        paths[job.slide_id] = job.path


def _check_same_params(store: Path, params: TilingParams) -> None:
    for slide_id in tiled_slides(store)[:1]:
        try:
            found = open_store(store, slide_id).params.to_json()
        except InputError:
            return
        for name, value in params.to_json().items():
            if found[name] != value:
                raise InputError(
                    f"{store}: its slides were tiled with {name} {found[name]}, not {value}; choose another --out"
                )


def _largest_first(jobs: Sequence[TileJob]) -> list[TileJob]:
    def size(job: TileJob) -> int:
        if job.path.is_dir():
            return sum(file.stat().st_size for file in job.path.iterdir())
        return job.path.stat().st_size if job.path.exists() else 0

    return sorted(jobs, key=size, reverse=True)
