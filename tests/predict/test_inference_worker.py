"""Workers of a real Ray cluster of this machine predict what this process predicts."""

import csv
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Queue

import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError, OutputError
from crcjax.predict.inference_worker import DistributedInferenceWorker, WorkerSetup, predict_on_ray, worker_layout
from crcjax.predict.predict_slides import PredictJob, _finish_on_ray, _sources, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.runs.code_id import code_id
from crcjax.slides.jobs.worker_pool import Answer, JobFailed, JobLimits


@pytest.fixture(scope="module")
def predictor(run: Path) -> Predictor:
    return Predictor(run)


@pytest.fixture(scope="module")
def slides(painted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four slides and one that no program can read."""
    folder = tmp_path_factory.mktemp("slides")
    for row in load_cohort(painted / "cohort.csv", None).rows[-4:]:
        shutil.copy(str(row.path), folder / f"{row.slide_id}.svs")
    (folder / "broken.svs").write_bytes(b"II*\0")
    return folder


def _jobs(folder: Path) -> list[PredictJob]:
    return [PredictJob(path.stem, path.stem, path) for path in sorted(folder.glob("*.svs"))]


def test_a_worker_is_on_every_gpu_or_on_every_machine_without_gpus() -> None:
    gpu, large, small = {"CPU": 32.0, "GPU": 4.0}, {"CPU": 16.0}, {"CPU": 8.0}
    assert worker_layout([gpu, gpu, large]) == (8, 8, 1)
    assert worker_layout([large, small, {"CPU": 0.0}]) == (2, 8, 0)
    assert worker_layout([gpu, {"CPU": 8.0, "GPU": 4.0}]) == (8, 2, 1)
    assert worker_layout([gpu], threads=16) == (2, 16, 1)
    with pytest.raises(InputError, match="no machine of the cluster has 64 CPUs; give a smaller --workers"):
        worker_layout([gpu], threads=64)


def test_a_bag_whose_files_cannot_be_written_ends_with_that_error_and_so_do_the_ones_after_it(
    predictor: Predictor, slides: Path
) -> None:
    def finish(predictor: Predictor, bag: list[PredictJob], works: list) -> list:
        raise OutputError("out: cannot be written (No space left on device); free space")

    setup = WorkerSetup(predictor.models, 0, "attention", predictor.model_id, code_id(), _sources, finish)
    worker = DistributedInferenceWorker(setup, 1)
    answers: Queue[Answer] = Queue()
    for job in _jobs(slides)[1:3]:
        # In a thread: the only bag in work would wait for ever if its error were lost.
        threading.Thread(target=lambda bag: answers.put(worker.do(bag)), args=([job],), daemon=True).start()
        assert isinstance(answers.get(timeout=120).result, OutputError)


@pytest.mark.ray
@pytest.mark.multiprocess
def test_a_cluster_predicts_what_this_machine_predicts(
    ray_cluster: None, predictor: Predictor, run: Path, slides: Path, crcjax: Callable, tmp_path: Path
) -> None:
    here = {row.slide_id: row for row in predict_slides(predictor, _jobs(slides), tmp_path / "here")}
    done = crcjax("predict", "--run", run, slides, "--out", tmp_path / "ray", "--executor", "ray")
    assert done.returncode == 1
    assert "4 of 5 slides predicted" in done.stderr
    assert "broken.svs" in done.stderr
    tables = []
    for name in ("here", "ray"):
        with open(tmp_path / name / "predictions.csv", newline="") as file:
            tables.append([
                {column: value for column, value in row.items() if not column.startswith("seconds_")}
                for row in csv.DictReader(file)
            ])  # fmt: skip
    assert [row["slide_id"] for row in tables[1]] == list(here)
    for local, remote in zip(*tables, strict=True):
        for column, value in local.items():
            if column.startswith("p_") and value:
                np.testing.assert_allclose(float(remote[column]), float(value), atol=1e-5)
        assert {
            column: remote[column] for column in ("call", "status", "pipeline_id", "slide_sha256", "qc_verdict")
        } == {column: local[column] for column in ("call", "status", "pipeline_id", "slide_sha256", "qc_verdict")}
    for folder in ("attention", "heatmaps"):
        names = [{path.name for path in (tmp_path / where / folder).iterdir()} for where in ("here", "ray")]
        assert names[0] == names[1]
    # The workers identify the inputs as this process does: nothing is predicted again.
    rows = predict_slides(predictor, _jobs(slides), tmp_path / "ray")
    kept = {row.slide_id: row.seconds for row in rows if row.is_ok}
    assert kept == {row["slide_id"]: kept[row["slide_id"]] for row in tables[1] if row["status"] == "ok"}
    assert rows[0].status == "not_evaluable" or not rows[0].is_ok


@pytest.mark.ray
@pytest.mark.multiprocess
def test_the_slides_of_a_dead_worker_are_predicted_by_another_and_one_that_kills_every_worker_fails_alone(
    ray_cluster: None, predictor: Predictor, slides: Path, tmp_path: Path
) -> None:
    jobs = [[job] for job in _jobs(slides)]
    out, died = tmp_path / "out", tmp_path / "died"
    kills_once, kills_always = jobs[1][0].slide_id, jobs[2][0].slide_id

    def finish(predictor: Predictor, bag: list[PredictJob], works: list) -> list:
        import os

        name = bag[0].slide_id
        if name == kills_always:
            os._exit(1)
        if name == kills_once and not died.exists():
            died.touch()
            os._exit(1)
        return _finish_on_ray(out, None, predictor, bag, works)

    setup = WorkerSetup(predictor.models, 0, "attention", predictor.model_id, code_id(), _sources, finish)
    limits = JobLimits(attempts=2, backoff_s=0.1)
    done = {done.job[0].slide_id: done for done in predict_on_ray(setup, jobs, limits=limits)}
    assert died.exists()
    assert sorted(done) == sorted(bag[0].slide_id for bag in jobs)
    assert isinstance(done.pop(kills_always).result, JobFailed)
    assert done[kills_once].attempts == 2
    assert all(done[name].result[0].is_ok == (name != "broken") for name in done)
    # Machines with another code would mix predictions of two versions.
    other = WorkerSetup(predictor.models, 0, "attention", predictor.model_id, "other", _sources, finish)
    with pytest.raises(InputError, match=f"has model .* and code {code_id()}, and the command has .* and other"):
        list(predict_on_ray(other, jobs[:1]))
