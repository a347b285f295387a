"""On a real Ray cluster of this machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.slides.jobs.worker_pool import JobLimits
from crcjax.slides.preprocess.manifest import read_manifest
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.tiling.plan import TilingParams

pytestmark = [pytest.mark.ray, pytest.mark.multiprocess]
PARAMS = TilingParams(("10x", "20x"), tile_px=32)
# The worker's grandfather is Ray's own process, which holds a CPU of the cluster for it.
KILL_RAYS = "__import__('psutil').Process().parent().parent().kill()"


def _run(jobs: list[str], **limits: float) -> dict:
    from crcjax.slides.jobs.ray_pool import run_jobs_on_ray

    return {done.job: done for done in run_jobs_on_ray(eval, jobs, 2, JobLimits(**limits))}


def test_a_cluster_gives_the_store_that_one_machine_gives(
    ray_cluster: None, small_slide: Path, write_slide: Callable[..., Path], tissue_picture: Callable, tmp_path: Path
) -> None:
    other = write_slide(tmp_path / "b.svs", tissue_picture(1200, 1200))
    jobs = [TileJob("a", small_slide), TileJob("b", other), TileJob("c", tmp_path / "missing.svs")]
    stores = {executor: tmp_path / executor for executor in ("processes", "ray")}
    for executor, store in stores.items():
        outcomes = tile_slides(jobs, store, PARAMS, executor=executor)
        assert [outcome.status for outcome in outcomes] == ["tiled", "tiled", "missing"]
    contents = [
        {str(path.relative_to(store)): path.read_bytes() for path in store.glob("*.zarr/**/*") if path.is_file()}
        for store in stores.values()
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) > 2
    assert set(read_manifest(stores["ray"])) == {"a", "b", "c"}


def test_limits_and_retries_hold_on_a_cluster(ray_cluster: None) -> None:
    slow, ill = "__import__('time').sleep(60)", "open('/proc/self/mem', 'rb').read(1)"
    done = _run([slow, ill, "1 + 1"], timeout_s=12.0, attempts=2, backoff_s=0.1)
    assert done["1 + 1"].result == 2
    assert (done[slow].result.status, done[slow].attempts) == ("timeout", 1)
    assert (done[ill].result.status, done[ill].attempts) == ("storage", 2)


def test_a_dead_machine_loses_its_own_job_alone_and_it_is_done_elsewhere(ray_cluster: None, tmp_path: Path) -> None:
    seen = repr(str(tmp_path / "seen"))
    job = f"7 if __import__('os').path.exists({seen}) else (open({seen}, 'x').close(), {KILL_RAYS})"
    done = _run([job, "1 + 1", "3 * 3"], backoff_s=0.1)
    assert (done[job].result, done[job].attempts) == (7, 2)
    assert (done["1 + 1"].result, done["3 * 3"].result) == (2, 9)


def test_a_job_that_kills_its_actors_fails_alone_and_those_beside_it_are_done_by_others(
    ray_cluster: None, tmp_path: Path
) -> None:
    import ray

    from crcjax.slides.jobs.ray_pool import run_jobs_on_actors
    from crcjax.slides.jobs.worker_pool import Answer

    class Actor:
        def do(self, job: str) -> Answer:
            import os
            import time

            time.sleep(0.2)
            if job == "ill":
                os._exit(1)
            return Answer(job.upper(), again=False, seconds=0.0, worker=str(os.getpid()))

    started: list[object] = []

    def start() -> object:
        started.append(ray.remote(num_cpus=1, max_concurrency=3)(Actor).remote())
        return started[-1]

    jobs = [*"abc", "ill", *"def"]
    limits = JobLimits(attempts=3, backoff_s=0.1)
    done = {done.job: done for done in run_jobs_on_actors(ray, start, jobs, 2, limits, at_once=3)}
    assert sorted(done) == sorted(jobs)
    assert all(done[job].result == job.upper() for job in "abcdef")
    assert (done["ill"].result.status, done["ill"].attempts) == ("failed", 3)
    assert "machine died" in str(done["ill"].result)
    # Three that it killed, and two at most that live.
    assert 3 <= len(started) <= 5
