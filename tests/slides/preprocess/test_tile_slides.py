import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from crcjax.errors import InputError, OutputError, SlideError
from crcjax.slides.jobs.worker_pool import Done, JobFailed, JobLimits, run_jobs
from crcjax.slides.preprocess.manifest import Outcome, read_manifest
from crcjax.slides.preprocess.qc_report import write_overview
from crcjax.slides.preprocess.tile_slides import (
    TileJob,
    _outcome,
    _tile_slide,
    _TileTask,
    check_slide_ids,
    shard_of,
    tile_slides,
)
from crcjax.slides.store.features import feature_names, read_features, write_features
from crcjax.slides.store.locks import slide_lock
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.tiling.plan import TilingParams

pytestmark = pytest.mark.multiprocess
Writer = Callable[..., Path]
PARAMS = TilingParams(("10x", "20x"), tile_px=32)
EIO = "open('/proc/self/mem', 'rb').read(1)"  # the address 0: a true EIO
DIE = "__import__('os').kill(__import__('os').getpid(), 9)"
# What a user's command does, in a process group of its own that can be killed.
COMMAND = """
import sys
from pathlib import Path
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.tiling.plan import TilingParams
if __name__ == "__main__":
    jobs = [TileJob(Path(path).stem, Path(path)) for path in sys.argv[2:]]
    tile_slides(jobs, Path(sys.argv[1]), TilingParams(("10x", "20x"), tile_px=32), workers=2)
"""


@pytest.fixture(scope="module")
def slides(write_slide: Writer, tissue_picture: Callable, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three slides of different sizes."""
    folder = tmp_path_factory.mktemp("three")
    sizes = {"a": (1500, 1300), "b": (2000, 1600), "c": (1200, 1200)}
    return [write_slide(folder / f"{name}.svs", tissue_picture(*size)) for name, size in sizes.items()]


@pytest.fixture(scope="module")
def undisturbed(slides: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    store = tmp_path_factory.mktemp("undisturbed")
    tile_slides(_jobs(slides), store, PARAMS, workers=1)
    return _contents(store)


def _jobs(paths: list[Path]) -> list[TileJob]:
    return [TileJob(path.stem, path) for path in paths]


def _contents(store: Path) -> dict[str, bytes]:
    """Everything but the manifest, which tells times."""
    files = [path for path in store.rglob("*") if path.is_file() and path.name != "manifest.jsonl"]
    return {str(path.relative_to(store)): path.read_bytes() for path in files}


def _statuses(store: Path) -> list[tuple[str, str]]:
    lines = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    return sorted((line["slide_id"], line["status"]) for line in lines)


def _results(jobs: list[str], processes: int = 2, **limits: float) -> dict:
    return {done.job: done.result for done in run_jobs(eval, jobs, processes, JobLimits(**limits))}


def test_results_are_the_functions_and_a_dead_worker_loses_its_own_job_alone() -> None:
    results = {
        done.job: done.result for done in run_jobs(eval, ["1 + 1", DIE, "3 * 3", "1 / 0"], 2, JobLimits(attempts=1))
    }
    assert (results["1 + 1"], results["3 * 3"]) == (2, 9)
    assert isinstance(results[DIE], JobFailed)
    assert "exit status -9" in str(results[DIE])
    assert isinstance(results["1 / 0"], JobFailed)
    assert "ZeroDivisionError" in str(results["1 / 0"])
    assert "Traceback" in results["1 / 0"].trace


@pytest.mark.parametrize("named", [True, False])
def test_a_fault_of_the_code_is_traced_unless_paths_are_hidden(
    named: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "John_Doe" / "H12345.vms"
    failed = JobFailed(f"IndexError: of {path}", trace=f"Traceback: {path}")
    done = Done(_TileTask(TileJob("p1", path, names_path=named), tmp_path, PARAMS, "jpeg", False), failed, 1, 0.0, "w")
    told = _outcome(done).reason + capsys.readouterr().err
    assert all((word in told) == named for word in ("John_Doe", "H12345", "Traceback"))
    assert "IndexError" in told


def test_a_job_beyond_its_time_or_memory_is_given_up_and_the_others_go_on() -> None:
    # Longer than the time that pytest gives a test.
    slow, large = "__import__('time').sleep(3600)", "(b'x' * 700_000_000, __import__('time').sleep(3600))"
    results = _results([slow, "1 + 1", large, "3 * 3"], timeout_s=2.0, memory_gib=0.5)
    assert (results["1 + 1"], results["3 * 3"]) == (2, 9)
    assert (results[slow].status, results[large].status) == ("timeout", "memory")
    assert "took more than 2 s" in str(results[slow])
    assert "took more than 0.5 GiB" in str(results[large])
    with pytest.raises(InputError, match=r"timeout_s 0\.0: give a number above 0"):
        JobLimits(timeout_s=0.0)


def test_a_fault_of_storage_is_tried_again_later_and_later_and_a_fault_of_the_data_is_not() -> None:
    begun = time.monotonic()
    done = {done.job: done for done in run_jobs(eval, [EIO, "1 / 0", "1 + 1"], 1, JobLimits(attempts=3, backoff_s=0.2))}
    assert time.monotonic() - begun >= 0.2 + 0.4
    # The other jobs did not wait for it.
    assert list(done)[-1] == EIO
    assert [done[job].attempts for job in (EIO, "1 / 0", "1 + 1")] == [3, 1, 1]
    assert done[EIO].result.status == "storage"


def test_a_worker_that_is_killed_from_outside_does_its_job_again(tmp_path: Path) -> None:
    seen = f"{str(tmp_path / 'seen')!r}"
    job = f"7 if __import__('os').path.exists({seen}) else (open({seen}, 'x').close(), {DIE})"
    (done,) = run_jobs(eval, [job], 1, JobLimits(backoff_s=0.1))
    assert (done.result, done.attempts) == (7, 2)


def test_what_is_busy_is_put_off_and_the_others_go_first(slides: list[Path], tmp_path: Path) -> None:
    order: list[Outcome] = []
    with slide_lock(tmp_path, "b"):
        running = threading.Thread(
            target=tile_slides,
            args=(_jobs(slides), tmp_path, PARAMS),
            kwargs={"workers": 1, "on_outcome": order.append},
        )
        running.start()
        deadline = time.monotonic() + 30
        while len(order) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
    running.join()
    assert [(outcome.slide_id, outcome.status) for outcome in order] == [("a", "tiled"), ("c", "tiled"), ("b", "tiled")]


def test_at_most_so_many_jobs_run_at_once() -> None:
    job = "(__import__('time').time(), __import__('time').sleep(0.2), __import__('time').time())"
    spans = [done.result for done in run_jobs(eval, [job + " " * i for i in range(5)], 2)]
    starts, ends = [span[0] for span in spans], [span[2] for span in spans]
    assert max(sum(s <= start < e for s, e in zip(starts, ends, strict=True)) for start in starts) == 2


def test_the_store_does_not_depend_on_workers_and_threads(
    slides: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for workers in (2, 7):
        tile_slides(_jobs(slides), tmp_path / str(workers), PARAMS, workers=workers)
        assert _contents(tmp_path / str(workers)) == undisturbed


def test_bad_slides_are_outcomes_and_the_rest_goes_through(
    slides: list[Path], undisturbed: dict[str, bytes], tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    bad = {name: tmp_path / f"{name}.svs" for name in ("missing", "empty", "text", "cut", "no_mpp", "glass", "coarse")}
    bad["empty"].touch()
    bad["text"].write_text("this is no slide")
    shutil.copy(slides[0], bad["cut"])
    os.truncate(bad["cut"], slides[0].stat().st_size // 2)
    write_slide(bad["no_mpp"], tissue_picture(600, 600), mpp=None)
    write_slide(bad["glass"], np.full((600, 600, 3), 240, np.uint8))
    write_slide(bad["coarse"], tissue_picture(600, 600), mpp=2.0)
    seen = []
    jobs = _jobs([*bad.values(), *slides])
    outcomes = tile_slides(jobs, tmp_path / "store", PARAMS, workers=2, on_outcome=seen.append)
    assert [outcome.slide_id for outcome in outcomes] == [job.slide_id for job in jobs]
    assert sorted(outcome.slide_id for outcome in seen) == sorted(job.slide_id for job in jobs)
    assert [outcome.status for outcome in outcomes] == [
        *("missing", "corrupt", "unsupported", "corrupt", "mpp_missing", "no_tissue", "too_coarse"),
        *("tiled", "tiled", "tiled"),
    ]
    for outcome in outcomes[:7]:
        assert outcome.reason
        assert "\n" not in outcome.reason
    assert all(outcome.tiles > 0 and outcome.seconds > 0 for outcome in outcomes[7:])
    assert all(outcome.attempts == 1 for outcome in outcomes)
    assert _contents(tmp_path / "store") == undisturbed
    given = tile_slides([TileJob("no_mpp", bad["no_mpp"], mpp=0.5)], tmp_path / "store", PARAMS, workers=1)
    assert given[0].succeeded


def test_the_largest_slide_is_begun_first(slides: list[Path], tmp_path: Path) -> None:
    order: list[str] = []
    tile_slides(_jobs(slides), tmp_path, PARAMS, workers=1, on_outcome=lambda outcome: order.append(outcome.slide_id))
    sizes = {path.stem: path.stat().st_size for path in slides}
    assert order == sorted(sizes, key=lambda slide_id: -sizes[slide_id])


def test_a_second_run_does_only_what_is_missing_or_changed(slides: list[Path], tmp_path: Path) -> None:
    paths = [Path(shutil.copy(path, tmp_path)) for path in slides]
    store = tmp_path / "store"
    tile_slides(_jobs(paths[:2]), store, PARAMS)
    shutil.copy(slides[2], paths[1])
    outcomes = tile_slides(_jobs(paths), store, PARAMS)
    assert [outcome.status for outcome in outcomes] == ["already tiled", "tiled", "tiled"]
    assert outcomes[0].tiles == open_store(store, "a").mask.sum()
    for outcome in outcomes:
        assert outcome.verdict == open_store(store, outcome.slide_id).attributes["verdict"]["verdict"]
    assert open_store(store, "b").info.size == (1200, 1200)


def test_a_slide_is_tiled_again_where_its_pixels_are_to_be_kept_in_another_way(
    slides: list[Path], tmp_path: Path
) -> None:
    jobs = _jobs(slides[2:])
    for pixels in ("none", "jpeg", "lossless"):
        statuses = [tile_slides(jobs, tmp_path, PARAMS, pixels=pixels)[0].status for _ in range(2)]
        assert statuses == ["tiled", "already tiled"]
        assert open_store(tmp_path, "c").pixels == pixels


def test_a_store_of_other_parameters_is_refused_and_kept(slides: list[Path], tmp_path: Path) -> None:
    tile_slides(_jobs(slides[2:]), tmp_path, PARAMS)
    before = _contents(tmp_path)
    with pytest.raises(InputError, match="were tiled with tile_px 32, not 64; choose another --out"):
        tile_slides(_jobs(slides), tmp_path, TilingParams(("10x", "20x"), tile_px=64))
    assert _contents(tmp_path) == before


def test_slide_ids_that_clash_are_refused_and_one_that_cannot_name_a_file_is_one_line(
    slides: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="has the slide id 'x', as"):
        tile_slides([TileJob("x", slides[0]), TileJob("x", slides[1])], tmp_path, PARAMS)
    unusable = ["", ".hidden", "a/b", "a\\b", "a\nb", "x" * 300]
    for slide_id in unusable:
        with pytest.raises(InputError, match="rename the file, or give it another slide_id"):
            check_slide_ids([(slide_id, slides[0])])
    outcomes = tile_slides(
        [*(TileJob(slide_id, slides[0]) for slide_id in unusable), TileJob("y" * 200, slides[2])], tmp_path, PARAMS
    )
    assert [outcome.status for outcome in outcomes] == ["failed"] * len(unusable) + ["tiled"]
    assert all("rename" in outcome.reason for outcome in outcomes[:-1])
    assert "300 bytes long, more than 200" in outcomes[-2].reason
    assert sorted(read_manifest(tmp_path)) == sorted([*unusable, "y" * 200])
    assert write_overview(tmp_path).exists()


def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(slides: list[Path], small_disk: Path) -> None:
    tile_slides(_jobs(slides[2:]), small_disk, PARAMS)
    before = _contents(small_disk)
    used = sum(path.stat().st_size for path in small_disk.rglob("*") if path.is_file())
    (small_disk / "filling").write_bytes(bytes((4 << 20) - used - 500_000))
    with pytest.raises(OutputError, match="No space left on device"):
        tile_slides(_jobs(slides), small_disk, PARAMS)
    (small_disk / "filling").unlink()
    assert _contents(small_disk) == before


def test_a_damaged_tile_fails_its_slide_and_publishes_nothing(slides: list[Path], tmp_path: Path) -> None:
    path = Path(shutil.copy(slides[0], tmp_path / "a.svs"))
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 3000] = bytes(3000)
    path.write_bytes(content)
    outcome = tile_slides(_jobs([path]), tmp_path / "store", PARAMS)[0]
    assert (outcome.status, tiled_slides(tmp_path / "store")) == ("corrupt", [])


def _start(store: Path, slides: list[Path]) -> subprocess.Popen:
    command = [sys.executable, "-c", COMMAND, str(store), *map(str, slides)]
    return subprocess.Popen(command, start_new_session=True)


def test_workers_killed_at_ten_random_moments_lose_nothing_that_is_not_done_again(
    slides: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    moments, kills, rounds = random.Random(0), 0, 0
    while kills < 10:
        store = tmp_path / str(rounds)
        rounds += 1
        running = threading.Thread(target=tile_slides, args=(_jobs(slides), store, PARAMS), kwargs={"workers": 2})
        running.start()
        while running.is_alive() and kills < 10:
            time.sleep(moments.uniform(0.02, 0.3))
            servers = psutil.Process().children()
            workers = [worker for server in servers for worker in server.children() if worker.status() != "zombie"]
            if workers:
                moments.choice(workers).kill()
                kills += 1
        running.join()
        tile_slides(_jobs(slides), store, PARAMS, workers=2)  # for a slide may have been killed too often
        assert _contents(store) == undisturbed


def test_two_runs_on_one_store_at_once_share_the_work(
    slides: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    for running in [_start(tmp_path, slides) for _ in range(2)]:
        assert running.wait(timeout=60) == 0
    assert _contents(tmp_path) == undisturbed
    assert _statuses(tmp_path) == [("a", "tiled"), ("b", "tiled"), ("c", "tiled")]  # none of them twice


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_and_run_again_it_gives_the_same_bytes(
    seed: int, slides: list[Path], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    moments = random.Random(seed)
    for _ in range(5):
        running = _start(tmp_path, slides)
        time.sleep(moments.uniform(0.6, 2.0))
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        for slide_id in tiled_slides(tmp_path):  # what looks finished is whole
            found = {name: content for name, content in _contents(tmp_path).items() if name.startswith(slide_id)}
            assert found == {name: content for name, content in undisturbed.items() if name.startswith(slide_id)}
    tile_slides(_jobs(slides), tmp_path, PARAMS, workers=2)
    assert _contents(tmp_path) == undisturbed


def test_workers_end_with_the_run_that_started_them(slides: list[Path], tmp_path: Path) -> None:
    running = _start(tmp_path, slides)
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".partial/*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    running.kill()
    running.wait()
    while time.monotonic() < deadline:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("a worker lives on")


def test_a_slide_beyond_its_time_is_an_outcome_and_leaves_nothing(slides: list[Path], tmp_path: Path) -> None:
    (outcome,) = tile_slides(_jobs(slides[:1]), tmp_path, PARAMS, limits=JobLimits(timeout_s=0.01))
    assert outcome.status == "timeout"
    assert "--slide-timeout-s" in outcome.reason
    assert _contents(tmp_path) == {}


def test_a_slide_behind_a_fault_of_storage_is_tiled_once_it_has_passed(slides: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "a.svs"
    link.symlink_to("/proc/self/mem")  # can be opened, and gives EIO
    limits = JobLimits(attempts=5, backoff_s=0.5)
    running = threading.Timer(1.0, lambda: (link.unlink(), link.symlink_to(slides[0])))
    running.start()
    (outcome,) = tile_slides([TileJob("a", link)], tmp_path / "store", PARAMS, limits=limits)
    running.join()
    assert (outcome.status, outcome.attempts > 1) == ("tiled", True)
    link.unlink()
    link.symlink_to("/proc/self/mem")
    (outcome,) = tile_slides(
        [TileJob("c", link)], tmp_path / "store", PARAMS, limits=JobLimits(attempts=2, backoff_s=0.1)
    )
    assert (outcome.status, outcome.attempts) == ("storage", 2)


def test_the_manifest_has_the_newest_outcome_of_every_slide(slides: list[Path], tmp_path: Path) -> None:
    store, missing = tmp_path / "store", tmp_path / "b.svs"
    tile_slides([TileJob("a", slides[0]), TileJob("b", missing)], store, PARAMS)
    found = read_manifest(store)
    assert (found["a"]["status"], found["b"]["status"]) == ("tiled", "missing")
    assert found["a"]["content_hash"] == open_store(store, "a").info.content_hash
    assert found["a"]["tiles"] == open_store(store, "a").mask.sum()
    assert found["a"]["worker"]
    with open(store / "manifest.jsonl", "a") as manifest:
        manifest.write('{"slide_id": "c", "sta')  # by a run that lost its power
    tile_slides([TileJob("a", slides[0]), TileJob("b", slides[1])], store, PARAMS)
    again = read_manifest(store)
    assert again["a"] == found["a"]  # it was there already: what made it stays told
    assert again["b"]["status"] == "tiled"
    assert set(again) == {"a", "b"}


def test_shards_are_alike_in_size_and_have_every_slide_once(tmp_path: Path) -> None:
    sizes = random.Random(0)
    jobs = [TileJob(f"s{i}", tmp_path / f"s{i}.svs") for i in range(50)]
    for job in jobs[1:]:  # the first is missing
        job.path.touch()
        os.truncate(job.path, int(sizes.lognormvariate(14, 2)))
    largest = max(job.size_bytes for job in jobs)
    for count in (1, 2, 3, 7, 60):
        shards = [shard_of(jobs, f"{i}/{count}") for i in range(1, count + 1)]
        assert sorted(job.slide_id for shard in shards for job in shard) == sorted(job.slide_id for job in jobs)
        loads = [sum(job.size_bytes for job in shard) for shard in shards]
        assert max(loads) - min(loads) <= largest + len(jobs)
        assert shards[0] == shard_of(jobs[::-1], f"1/{count}")
    for wrong in ("0/2", "3/2", "1", "a/b", "1/0"):
        with pytest.raises(InputError, match="write I/N"):
            shard_of(jobs, wrong)


def test_no_jobs_and_an_unknown_executor(slides: list[Path], tmp_path: Path) -> None:
    assert tile_slides([], tmp_path, PARAMS) == []
    with pytest.raises(InputError, match="choose processes or ray"):
        tile_slides(_jobs(slides), tmp_path, PARAMS, executor="dask")


def _tile(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "crcjax.cli", "tile", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_mpp_is_for_slides_that_state_none_and_the_cohorts_column_for_those_that_state_it_wrongly(
    tmp_path: Path, write_slide: Writer, tissue_picture: Callable
) -> None:
    lines = ["slide_id,case_id,path,mpp"]
    for name, stated, corrected in [("states", 1.0, ""), ("silent", None, ""), ("wrong", 0.25, "1.0")]:
        write_slide(tmp_path / f"{name}.svs", tissue_picture(800, 640), mpp=stated)
        lines.append(f"{name},{name},{name}.svs,{corrected}")
    (tmp_path / "cohort.csv").write_text("\n".join(lines))
    options = ("--cohort", tmp_path / "cohort.csv", "--out", tmp_path / "store", "--mag", "10x", "--tile-px", "64")
    done = _tile(*options, "--mpp", "0.5")
    assert done.returncode == 0, done.stderr
    infos = [open_store(tmp_path / "store", name).info for name in ("states", "silent", "wrong")]
    assert [info.mpp for info in infos] == [(1.0, 1.0), (0.5, 0.5), (1.0, 1.0)]
    assert [info.mpp_source for info in infos] == ["vendor", "given", "given"]
    shown = " ".join(_tile("--help").stdout.replace("│", " ").split())
    assert "of slides that state none; the cohort's column mpp overrides" in shown


def test_tiling_again_never_deletes_features_unless_asked_to(slides: list[Path], tmp_path: Path) -> None:
    (job,) = _jobs(slides[:1])
    assert _tile_slide(_TileTask(job, tmp_path, PARAMS, "none", False)).status == "tiled"
    mask = open_store(tmp_path, "a").mask
    write_features(tmp_path, "a", "uni_v1", np.ones((*mask.shape, 4), np.float32), {"encoder": "uni_v1"})
    assert _tile_slide(_TileTask(job, tmp_path, PARAMS, "none", False)).status == "already tiled"
    zarr_json = tmp_path / "a.zarr" / "zarr.json"
    whole = zarr_json.read_text()
    for content in (whole, "{"):  # other pixels are asked for, or the slide is damaged
        zarr_json.write_text(content)
        with pytest.raises(
            SlideError, match=r"would delete its features of uni_v1; choose another --out, or add --repl"
        ):
            _tile_slide(_TileTask(job, tmp_path, PARAMS, "jpeg", False))
        assert read_features(tmp_path, "a", "uni_v1").any()
    assert _tile_slide(_TileTask(job, tmp_path, PARAMS, "jpeg", True)).status == "tiled"
    assert feature_names(tmp_path, "a") == []


def test_a_slide_that_cannot_be_read_from_its_store_is_not_replaced(
    slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job,) = _jobs(slides[:1])
    _tile_slide(_TileTask(job, tmp_path, PARAMS, "none", False))
    before = _contents(tmp_path)

    def refuse(path: Path, *arguments: object, **others: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(SlideError, match=r"cannot be read \(Permission denied\); check its permissions") as caught:
        _tile_slide(_TileTask(job, tmp_path, PARAMS, "jpeg", True))
    assert caught.value.status == "storage"
    assert _contents(tmp_path) == before
