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
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, cast

import cv2

from crcjax.errors import CrcjaxError, InputError, SlideError
from crcjax.slides.reader import Slide, SlideInfo, open_slide
from crcjax.slides.pixels import check_mode, shard_regions
from crcjax.slides.store import StoreWriter, open_store, remove_partials, tiled_slides
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
    pixels: str = "jpeg",
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Tiles slides into a store, the largest first; what is already there with the same content is left as it is.

    `workers` is the number of cores to use (all by default): processes over slides, and threads within a slide when
    there are fewer slides than workers. A slide that cannot be used is an outcome. Raises InputError if the store holds
    tiles of other parameters, two jobs share a slide id or one cannot name a file, OutputError if the store cannot be
    written.
    """
    check_mode(pixels)
    check_slide_ids([(job.slide_id, job.path) for job in jobs])
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
    """Yields (job, result) as results come, from at most `processes` worker processes that do job after job.

    A result may be a CrcjaxError that `function` raised, or JobFailed: a dead worker loses its own job alone, and
    another takes its place. Jobs, results and `function` (a module's own) are pickled. Workers end with the process that
    started them.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, __name__])
    waiting = deque(jobs)
    working: dict[Connection, tuple[Any, Any]] = {}
    idle: list[tuple[Connection, Any]] = []
    try:
        while waiting or working:
            while waiting and len(working) < processes:
                pipe, worker = idle.pop() if idle else _start_worker(context, function)
                job = waiting.popleft()
                # A worker that died meanwhile is met below, as the end of its pipe.
                with suppress(BrokenPipeError):
                    pipe.send(job)
                working[pipe] = job, worker
            for pipe in cast(list[Connection], wait(list(working))):
                job, worker = working.pop(pipe)
                try:
                    result = pipe.recv()
                    idle.append((pipe, worker))
                except (EOFError, ConnectionResetError):
                    worker.join()
                    pipe.close()
                    result = JobFailed(f"its worker died (exit status {worker.exitcode}); run the command again")
                yield job, result
    finally:
        for pipe, worker in [*idle, *((pipe, worker) for pipe, (_, worker) in working.items())]:
            worker.kill()
            worker.join()
            pipe.close()


def _start_worker(context: Any, function: Callable[[Any], Any]) -> tuple[Connection, Any]:
    pipe, other = context.Pipe()
    worker = context.Process(target=_work, args=(function, other), daemon=True)
    worker.start()
    other.close()
    return pipe, worker


def _work(function: Callable[[Any], Any], pipe: Connection) -> None:
    # Processes and threads over slides fill the cores; OpenCV's own threads would only compete.
    cv2.setNumThreads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            result = function(job)
        except CrcjaxError as error:
            result = error
        except Exception as error:
            traceback.print_exc()
            result = JobFailed(f"{type(error).__name__}: {error}; a fault of crcjax, please report it")
        pipe.send(result)


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
    pixels: str
    threads: int


def _tile_slide(task: _TileTask) -> Outcome:
    start, job = time.monotonic(), task.job
    with open_slide(job.path, job.mpp) as slide:
        done = _already_tiled(task, slide.info)
        if done:
            return done
        plan = plan_tiles(slide, task.params)
        kept = 0
        with StoreWriter(task.store, job.slide_id, slide, plan, task.pixels, task.threads) as writer:
            for first, tiles in read_ahead(slide, plan, task.threads):
                writer.write(first, tiles)
                kept += int(tiles.mask.sum())
            writer.commit()
    seconds = time.monotonic() - start
    return Outcome(job.slide_id, str(job.path), "tiled", "", len(plan.origin), kept, seconds)


def read_ahead(slide: Slide, plan: TilePlan, threads: int) -> Iterator[tuple[int, RegionTiles]]:
    """Yields (first region, tiles) shard by shard in order, decoded by `threads` threads, a few shards ahead.

    Raises SlideError: `corrupt`, and at the end `no_tissue` if not one tile passed quality control.
    """
    step, kept = shard_regions(plan.params), False
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
                tiles = future.result()
                kept = kept or bool(tiles.mask.any())
                yield first, tiles
        finally:
            pool.shutdown(cancel_futures=True)
    if not kept:
        reason = "has no tile that is stained and sharp enough"
        raise SlideError(slide.info.path, "no_tissue", reason, "look at the slide; scan it again if it is out of focus")


def _already_tiled(task: _TileTask, info: SlideInfo) -> Outcome | None:
    try:
        found = open_store(task.store, task.job.slide_id)
    except InputError:
        return None
    same_slide = replace(found.info, path="") == replace(info, path="")
    # Without pixels of its own, a store must know where the slide is now.
    moved = task.pixels == "none" and found.info.path != os.path.abspath(info.path)
    if not same_slide or found.pixels != task.pixels or moved:
        return None
    counts = len(found.origin), int(found.mask.sum())
    return Outcome(task.job.slide_id, info.path, "already tiled", "", *counts)


def check_slide_ids(slides: Sequence[tuple[str, Path]]) -> None:
    """Raises InputError if a slide id cannot name a file, or two slides share one."""
    paths: dict[str, Path] = {}
    for slide_id, path in slides:
        if not slide_id or slide_id.startswith(".") or "/" in slide_id:
            raise InputError(f"{path}: the slide id {slide_id!r} cannot name a file; give it another")
        if slide_id in paths:
            raise InputError(f"{path}: has the slide id {slide_id!r}, as {paths[slide_id]} has; name them in a cohort")
        paths[slide_id] = path


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
