"""Tiles many slides, the largest first, in worker processes or on a Ray cluster, and reports the outcome of each."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crcjax.errors import InputError, SlideError
from crcjax.slides.jobs.read_ahead import read_ahead
from crcjax.slides.jobs.shards import largest_first, names_of_shard
from crcjax.slides.jobs.usable_cores import usable_cores
from crcjax.slides.jobs.worker_pool import NO_LIMITS, Done, JobFailed, JobLimits, run_jobs
from crcjax.slides.preprocess.manifest import Outcome, append_outcome, tiled_in_manifest
from crcjax.slides.store.features import feature_names
from crcjax.slides.store.locks import slide_lock
from crcjax.slides.store.tile_pixels import check_mode, shard_regions
from crcjax.slides.store.tile_store import StoreWriter, TileStore, open_store, remove_partials, tiled_slides
from crcjax.slides.store.zarr_arrays import UnreadableError, store_path
from crcjax.slides.tiling.plan import EVERYWHERE, TilePlan, TilingParams, Transform, plan_tiles
from crcjax.slides.tiling.quality_control import ABSENT, REASONS
from crcjax.slides.tiling.read import Pack, RegionTiles, read_regions
from crcjax.slides.tiling.regions_of_interest import Areas
from crcjax.slides.wsi.discovery import bytes_of, slide_id_fault, without_names
from crcjax.slides.wsi.slide import Slide, SlideInfo, check_mpp, open_slide

if TYPE_CHECKING:
    from crcjax.slides.stain.normalisation import SlideStain

EXECUTORS = ("processes", "ray")


@dataclass(frozen=True)
class TileJob:
    """One slide to tile; `mpp` (µm per level-0 px) overrides the file's, `fallback_mpp` is used if the file states none.

    Stores and outcomes name its path only if `names_path`: a path often contains a person's identifier.
    """

    slide_id: str
    path: Path
    mpp: float | None = None
    names_path: bool = True
    areas: Areas = EVERYWHERE
    fallback_mpp: float | None = None

    @property
    def name(self) -> str:
        """The slide's name in outcomes: its path, or its id if the path must not be named."""
        return str(self.path) if self.names_path else self.slide_id

    @cached_property
    def size_bytes(self) -> int:
        """The bytes of all files of the slide when first asked for; 0 if it is missing or cannot be read."""
        return bytes_of(self.path)


def tile_slides(
    jobs: Sequence[TileJob],
    store: Path,
    params: TilingParams,
    *,
    workers: int | None = None,
    pixels: str = "jpeg",
    executor: str = "processes",
    limits: JobLimits = NO_LIMITS,
    replace_features: bool = False,
    on_outcome: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Tiles slides into a store, the largest first; slides that are already there with the same content are skipped.

    `workers` is the number of cores to use (all by default): processes over slides, and threads within a slide when
    there are fewer slides than workers; with the `executor` "ray" CPUs of a cluster, one per slide. A slide that cannot be
    used, or exceeds the `limits`, has an outcome too; every outcome is also a line of STORE/manifest.jsonl. Several runs may
    tile into one store at once; each waits for slides that another is tiling. A slide whose stored features would no longer fit its tiles is
    refused, unless `replace_features` allows their deletion. Raises InputError if the store holds tiles of other
    parameters, two jobs share a slide id, one has an impossible mpp, or there is no such executor, OutputError if the store
    cannot be written.
    """
    check_mode(pixels)
    if params.stain and pixels == "none":
        raise InputError("--stain changes the tiles, which --no-pixels does not keep; set config.stain in training")
    if executor not in EXECUTORS:
        raise InputError(f"executor {executor!r}: choose {' or '.join(EXECUTORS)}")
    _check_distinct([(job.slide_id, job.name) for job in jobs])
    for mpp in {given for job in jobs for given in (job.mpp, job.fallback_mpp)}:
        check_mpp(mpp)
    store = store_path(store)
    remove_partials(store)
    _check_same_params(store, params)
    in_manifest = tiled_in_manifest(store)
    outcomes: dict[str, Outcome] = {}
    try:
        for job in jobs:
            if fault := slide_id_fault(job.slide_id):
                outcomes[job.slide_id] = Outcome(job.slide_id, job.name, "failed", fault)
                append_outcome(store, outcomes[job.slide_id])
                on_outcome(outcomes[job.slide_id])
        usable = [job for job in jobs if job.slide_id not in outcomes]
        tasks = [_TileTask(job, store, params, pixels, replace_features) for job in _largest_first(usable)]
        for done in _run(executor, tasks, workers, limits):
            outcome = _outcome(done)
            outcomes[outcome.slide_id] = outcome
            if outcome.status == "already tiled" and outcome.slide_id not in in_manifest:
                in_manifest = tiled_in_manifest(store)  # another run may have tiled it meanwhile
            if outcome.status != "already tiled" or outcome.slide_id not in in_manifest:
                append_outcome(store, outcome)
            on_outcome(outcome)
    finally:
        remove_partials(store)
    return [outcomes[job.slide_id] for job in jobs]


def _run(executor: str, tasks: Sequence[_TileTask], workers: int | None, limits: JobLimits) -> Iterator[Done]:
    if executor == "ray":
        from crcjax.slides.jobs.ray_pool import run_jobs_on_ray

        return run_jobs_on_ray(_tile_slide, tasks, workers, limits)
    workers = workers or usable_cores()
    processes = max(1, min(workers, len(tasks)))
    tasks = [replace(task, threads=max(1, workers // processes)) for task in tasks]
    return run_jobs(_tile_slide, tasks, processes, limits)


def _outcome(done: Done) -> Outcome:
    """Converts a job's result to an outcome; raises an error that stops the run: wrong arguments or unwritable output."""
    job, result = done.job.job, done.result
    if isinstance(result, SlideError | JobFailed):
        parts = [result.reason, result.remedy] if isinstance(result, SlideError) else [str(result)]
        if not job.names_path:
            parts = [without_names(part, job.path) for part in parts]
        elif isinstance(result, JobFailed):
            sys.stderr.write(result.trace)
        outcome = Outcome(job.slide_id, job.name, result.status, "; ".join(parts))
    elif isinstance(result, BaseException):
        raise result
    else:
        outcome = result
    return replace(outcome, seconds=done.seconds, attempts=done.attempts, worker=done.worker)


@dataclass(frozen=True)
class _TileTask:
    job: TileJob
    store: Path
    params: TilingParams
    pixels: str
    replace_features: bool
    threads: int = 1


def _tile_slide(task: _TileTask) -> Outcome:
    job = task.job
    path_in_store = os.path.abspath(job.path) if job.names_path else ""
    with (
        slide_lock(task.store, job.slide_id),
        open_slide(job.path, job.mpp, job.fallback_mpp, info_path=path_in_store) as slide,
    ):
        outcome = Outcome(job.slide_id, job.name, "already tiled", content_hash=slide.info.content_hash)
        with _region_files_of(job):
            done = _already_tiled(task, slide.info)
            if done:
                outcome = replace(outcome, regions=len(done.origin), tiles=int(done.mask.sum()))
                return with_qc_result(outcome, slide.info, done.attributes)
            if not task.replace_features:
                _check_without_features(task.store, job)
            plan = plan_tiles(slide, task.params, job.areas)
        stain = _stain_of(slide, plan)
        kept_tiles = 0
        with StoreWriter(task.store, job.slide_id, slide, plan, task.pixels, locked=True) as writer:
            for first, tiles in read_shards(slide, plan, task.threads, writer.pack, stain):
                writer.write(first, tiles)
                kept_tiles += int(tiles.mask.sum())
            if stain:
                writer.keep(stain.files())
            attributes = writer.commit()
    outcome = replace(outcome, status="tiled", regions=len(plan.origin), tiles=kept_tiles)
    return with_qc_result(outcome, slide.info, attributes)


def with_qc_result(outcome: Outcome, info: SlideInfo, attributes: Mapping[str, Any]) -> Outcome:
    """Adds the QC result and its reasons to the outcome of a slide in the store."""
    verdict = attributes["verdict"]
    return replace(
        outcome, verdict=verdict["verdict"], reason="; ".join(filter(None, [info.warning, *verdict["reasons"]]))
    )


@contextmanager
def _region_files_of(job: TileJob) -> Iterator[None]:
    """Turns a fault of a slide's region files into a fault of that slide alone."""
    try:
        yield
    except InputError as error:
        reason, _, remedy = str(error).rpartition("; ")
        raise SlideError(job.path, "failed", reason, remedy) from error


def _stain_of(slide: Slide, plan: TilePlan) -> SlideStain | None:
    if plan.params.stain is None:
        return None
    os.environ["JAX_PLATFORMS"] = "cpu"  # workers of one machine would each take the GPU's memory
    from crcjax.slides.stain.normalisation import slide_stain  # loads JAX

    return slide_stain(slide, plan)


def read_shards(
    slide: Slide,
    plan: TilePlan,
    threads: int,
    pack: Pack | None = None,
    transform: Transform | None = None,
    submit: Callable[[Callable[[], Any]], Future] | None = None,
) -> Iterator[tuple[int, RegionTiles]]:
    """Yields (first region, tiles) shard by shard in order, decoded and packed by `threads` threads, a few shards ahead.

    The threads are those of another pool if `submit` is given (see `read_ahead`).

    Raises SlideError: `corrupt`, and at the end `no_tissue` if not one tile passed quality control.
    """
    regions, step, reason_counts, kept_tiles = len(plan.origin), shard_regions(plan.params), Counter[int](), 0
    firsts = range(0, regions, step)
    reads = (partial(read_regions, slide, plan, first, min(first + step, regions), pack, transform) for first in firsts)
    with closing(read_ahead(reads, threads, ahead=threads, submit=submit)) as shards:
        for first, tiles in zip(firsts, shards, strict=True):
            reason_counts.update(tiles.reason.ravel().tolist())
            kept_tiles += int(tiles.mask.sum())
            yield first, tiles
    if not kept_tiles:
        faults = ", ".join(f"{count} {REASONS[code]}" for code, count in reason_counts.most_common() if code != ABSENT)
        reason = f"has no tile that passed quality control ({faults})"
        raise SlideError(slide.info.path, "no_tissue", reason, "look at the slide; scan it again if it is out of focus")


def _already_tiled(task: _TileTask, info: SlideInfo) -> TileStore | None:
    try:
        stored = open_store(task.store, task.job.slide_id)
    except UnreadableError as error:
        reason, _, remedy = str(error).rpartition("; ")
        raise SlideError(task.job.path, "storage", reason, remedy) from error
    except InputError:
        return None
    same_slide = replace(stored.info, path="") == replace(info, path="")
    # A store without pixels must have the slide's current path.
    moved = task.pixels == "none" and stored.info.path != info.path
    same_areas = stored.attributes.get("areas", "") == task.job.areas.id
    return stored if same_slide and same_areas and stored.pixels == task.pixels and not moved else None


def _check_without_features(store: Path, job: TileJob) -> None:
    """Raises SlideError if tiling the slide again would delete its features."""
    if names := feature_names(store, job.slide_id):
        reason = f"tiling it again would delete its features of {', '.join(names)}"
        remedy = "choose another --out, or add --replace to delete them"
        raise SlideError(job.path, "failed", reason, remedy)


def check_slide_ids(slides: Sequence[tuple[str, str | Path]]) -> None:
    """Checks slides' ids and names. Raises InputError if an id cannot name a file, or two slides share one."""
    for slide_id, path in slides:
        if fault := slide_id_fault(slide_id):
            raise InputError(f"{path}: {fault}")
    _check_distinct(slides)


def _check_distinct(slides: Sequence[tuple[str, str | Path]]) -> None:
    paths: dict[str, str | Path] = {}
    for slide_id, path in slides:
        if slide_id in paths:
            raise InputError(f"{path}: has the slide id {slide_id!r}, as {paths[slide_id]} has; name them in a cohort")
        paths[slide_id] = path


def _check_same_params(store: Path, params: TilingParams) -> None:
    for slide_id in tiled_slides(store)[:1]:
        try:
            stored = open_store(store, slide_id).params.to_json()
        except InputError:
            return
        for name, value in params.to_json().items():
            if stored[name] != value:
                raise InputError(
                    f"{store}: its slides were tiled with {name} {stored[name]}, not {value}; choose another --out"
                )


def _largest_first(jobs: Sequence[TileJob]) -> list[TileJob]:
    job_of = {job.slide_id: job for job in jobs}
    return [job_of[name] for name in largest_first({name: job.size_bytes for name, job in job_of.items()})]


def shard_of(jobs: Sequence[TileJob], shard: str) -> list[TileJob]:
    """The jobs of shard I/N (1/N to N/N): every job is in one shard, and shards have similar sizes in bytes.

    The jobs' sizes and ids alone decide, so that the tasks of a SLURM array agree without communicating.
    Raises InputError, also if two jobs share a slide id.
    """
    _check_distinct([(job.slide_id, job.name) for job in jobs])
    job_of = {job.slide_id: job for job in jobs}
    return [job_of[name] for name in names_of_shard({name: job.size_bytes for name, job in job_of.items()}, shard)]
