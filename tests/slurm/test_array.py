"""launch/slurm/tile.sbatch and predict.sbatch on a real cluster of two nodes: tasks and nodes are lost, the cohort is not."""

import csv
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from crcjax.launching.job import read_job
from crcjax.launching.render import render

ROOT = Path(__file__).parents[2]


def _await(ready: Callable[[], object], what: str, timeout_s: float = 240.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def _tasks(command: str) -> dict[str, psutil.Process]:
    """The running processes of crcjax by the number of their task; "" is a merge."""
    running = {}
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if words[1:4] == ["-m", "crcjax.cli", command] and "SLURM_STEP_ID" in environment:
            running[environment.get("SLURM_ARRAY_TASK_ID", "")] = process
    return running


def _restarts(job: str) -> list[int]:
    """How often each task of an array was started again."""
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return [int(count) for count in re.findall(r"Restarts=(\d+)", shown)]


@pytest.mark.slurm
@pytest.mark.multiprocess
def test_a_cohort_is_tiled_and_predicted_by_arrays_while_a_task_is_killed_and_a_node_is_lost(
    slurm: Path, painted: Path, run: Path, lose_node: Callable[[str], None], tmp_path: Path
) -> None:
    job = read_job(ROOT / "launch" / "job.toml")
    assert job.cohort is not None
    table, store, out = painted / "cohort.csv", tmp_path / "store", tmp_path / "predictions"
    cohort = replace(
        job.cohort,
        tile=(f"--cohort={table}", f"--out={store}", "--mag=10x", "--tile-px=64", "--workers=1"),
        predict=(f"--run={run}", f"--cohort={table}", f"--out={out}", "--workers=1"),
        shards=2,
        cpus=1,
        gpus=0,
    )
    render(replace(job, cohort=cohort), "slurm", tmp_path / "files")
    ours = {"CRCJAX_PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = ["bash", tmp_path / "files" / "cohort.sh", "--mem=0", "--time=60", f"--output={tmp_path}/%x-%A-%a.out"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ours, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    numbers = re.findall(r"(\w+): array (\d+), merge (\d+)", done.stdout)
    assert [stage for stage, _, _ in numbers] == ["tile", "predict"]
    (_, tile_array, _), (_, predict_array, predict_merge) = numbers

    def logs() -> str:
        return "\n".join(f"{path.name}:\n{path.read_text()[-800:]}" for path in sorted(tmp_path.glob("*.out")))

    # One task of tiling is killed, as by the kernel when memory runs out.
    _await(lambda: _tasks("tile"), "no task tiles")
    _, process = _tasks("tile").popitem()
    process.kill()
    # A node is lost while it predicts.
    _await(lambda: "predict" in logs() or _tasks("predict"), "no task predicts", 180)
    _await(
        lambda: [task for task in _tasks("predict").values() if task.environ().get("SLURMD_NODENAME") == "n1"], logs()
    )
    lose_node("n1")

    def state(job: str) -> str:
        shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True).stdout
        return re.findall(r"JobState=(\w+)", shown)[-1]

    _await(lambda: state(predict_merge) in ("COMPLETED", "FAILED", "CANCELLED"), logs())
    assert state(predict_merge) == "COMPLETED", logs()
    assert sum(_restarts(tile_array)) >= 1
    assert sum(_restarts(predict_array)) >= 1
    # Complete: every slide is tiled once, and has one row.
    slides = {row["slide_id"] for row in csv.DictReader(table.read_text().splitlines())}
    outcomes = [json.loads(line) for line in (store / "manifest.jsonl").read_text().splitlines()]
    newest = {outcome["slide_id"]: outcome["status"] for outcome in outcomes}
    assert newest.keys() == slides
    assert set(newest.values()) <= {"tiled", "skipped"}
    rows = list(csv.DictReader((out / "predictions.csv").read_text().splitlines()))
    assert sorted(row["slide_id"] for row in rows) == sorted(slides)
    assert {row["status"] for row in rows} == {"ok"}


def _run_script(script: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """A rendered script with programs in `folder` in place of SLURM's; Python prints its arguments."""
    programs = {
        "srun": 'while [ "${1#--}" != "$1" ]; do shift; done\nexec "$@"',
        "scontrol": f"echo $* >> {folder}/requeued",
        "apptainer": f'echo "apptainer $*" >> {folder}/image\nwhile [ "$1" != image.sif ]; do shift; done\nshift\nexec "$@"',
        "python": f'echo "$*" >> {folder}/called\nif [ "$1" = - ]; then cat >/dev/null; echo run; exit 0; fi\nexit ${{STATUS:-0}}',
    }
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "crcjax", "PATH": f"{folder}:/usr/bin:/bin"}
    path = ROOT / "launch" / "slurm" / script
    return subprocess.run(["bash", path], cwd=folder, env=slurm | environment, capture_output=True, text=True)


def test_a_task_runs_its_shard_and_the_merge_all_of_them(tmp_path: Path) -> None:
    assert _run_script("tile.sbatch", tmp_path, SLURM_ARRAY_TASK_ID="3").returncode == 0
    called = (tmp_path / "called").read_text()
    assert called == "-m crcjax.cli tile --cohort=cohort.csv --out=stores/epoc --mag=10x,20x,40x --shard 3/16\n"
    assert _run_script("predict.sbatch", tmp_path, CRCJAX_SHARDS="2").returncode == 0
    assert [line[-11:] for line in (tmp_path / "called").read_text().splitlines()[1:]] == ["--shard 1/2", "--shard 2/2"]
    wrong = _run_script("tile.sbatch", tmp_path, SLURM_ARRAY_TASK_ID="17")
    assert wrong.returncode == 2
    assert "a task of the array must be from 1 to 16, got 17; give --array=1-16" in wrong.stderr


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"), [(0, 0, False), (1, 0, False), (2, 0, False), (137, 2, True), (137, 3, False)]
)
def test_a_task_whose_process_was_killed_is_started_again(
    status: int, restarts: int, requeued: bool, tmp_path: Path
) -> None:
    environment = {"SLURM_ARRAY_TASK_ID": "1", "STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts)}
    assert _run_script("tile.sbatch", tmp_path, **environment).returncode == status
    assert (tmp_path / "requeued").exists() == requeued


@pytest.mark.parametrize("script", ["train.sbatch", "tile.sbatch", "predict.sbatch"])
def test_modules_are_loaded_and_python_runs_in_an_apptainer_image_if_the_job_says_so(
    script: str, tmp_path: Path
) -> None:
    function = {"BASH_FUNC_module%%": f'() {{ echo "$@" >> {tmp_path}/modules; [ $2 != absent ]; }}'}
    options = {"CRCJAX_MODULES": "cuda/12.4 apptainer", "CRCJAX_APPTAINER": "image.sif", "SLURM_ARRAY_TASK_ID": ""}
    done = _run_script(script, tmp_path, CRCJAX_SHARDS="1", **options, **function)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "modules").read_text() == "load cuda/12.4 apptainer\n"
    images = (tmp_path / "image").read_text().splitlines()
    assert f"apptainer exec --bind {tmp_path} image.sif python -m crcjax." in images[-1]
    assert "-m crcjax." in (tmp_path / "called").read_text()
    absent = _run_script(script, tmp_path, CRCJAX_MODULES="absent", **function)
    assert absent.returncode == 2
    assert "the modules absent cannot be loaded" in absent.stderr
