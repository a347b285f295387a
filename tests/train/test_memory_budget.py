import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.data.loader import open_feed, training_slides
from crcjax.errors import InputError
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.train.loop import train
from crcjax.train.memory_budget import (
    Budget,
    MicroBatches,
    _recorded_micro_batches,
    fitting_step,
    halve_micro_batch,
    record_micro_batches,
)
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import abstract_state, build_step

# A step whose activations take most of its memory, in a fresh process: memory that was used before would hide it.
CONFIG = """
import os, resource, sys
from pathlib import Path
from crcjax.config import get_config

config = get_config()
config.data.store, config.data.cohort = sys.argv[1] + "/store", sys.argv[1] + "/cohort.csv"
config.data.regions_per_bag, config.data.batch_size, config.data.region_buckets = 192, 8, (64, 128)
config.model.remat, config.model.width = "none", 32
config.train.steps, config.train.eval_every, config.train.log_every = 4, 4, 1
config.train.checkpoint_every, config.optimizer.warmup_steps = 2, 2
"""
MEASURED = (
    CONFIG
    + """
from crcjax.train import loop, setup
config.train.steps, config.optimizer.warmup_steps = 1, 0  # no more bags are read meanwhile
fitting_step = setup.fitting_step

def peak():
    # Not getrusage's: that one begins with the peak of the process that started this one.
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024

def watched(*arguments):
    step, budget, micro_batches = fitting_step(*arguments)
    def run(state, bag):
        global before
        before = os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])
        state, metrics = step(state, bag)
        metrics["loss"].block_until_ready()
        print(budget.temporary, peak() - before)
        sys.stdout.flush()
        os._exit(0)
    return run, budget, micro_batches

setup.fitting_step = watched
loop.train(config, Path(sys.argv[2]))
"""
)
LIMITED = (
    CONFIG
    + """
import time
from crcjax.train import loop, setup
fitting_step = setup.fitting_step

def data_bytes():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmData"))
    return int(line.split()[1]) * 1024

def settled_data_bytes():
    # While bags are read ahead, the process grows by hundreds of megabytes, which the second attempt needs as well.
    sizes = [data_bytes()]
    while len(sizes) < 10 or len(set(sizes[-10:])) > 1:
        time.sleep(0.2)
        sizes.append(data_bytes())
    return sizes[-1]

def limited(*arguments):
    step, budget, micro_batches = fitting_step(*arguments)
    def run(state, bag):
        # The third step is the first to find that there is less memory than there was.
        if int(state.step) == 2 and micro_batches.count == 1:
            limit = settled_data_bytes() + budget.temporary * 9 // 10
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        return step(state, bag)
    return run, budget, micro_batches

if sys.argv[3] == "limited":
    setup.fitting_step = limited
loop.train(config, Path(sys.argv[2]))
"""
)


def _run(program: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    settings = os.environ | {"JAX_PLATFORMS": "cpu", "PJRT_NPROC": "16"} | settings
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


def _losses(run: Path) -> dict[int, float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.mark.multiprocess
def test_the_budget_of_a_step_is_the_memory_that_it_takes(painted: Path, tmp_path: Path) -> None:
    predicted, measured = map(int, _run(MEASURED, str(painted), str(tmp_path)).stdout.split())
    assert predicted > 300 * 2**20
    np.testing.assert_allclose(measured, predicted, rtol=0.1)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_run_that_runs_out_of_memory_resumes_with_smaller_micro_batches_and_the_same_losses(
    painted: Path, tmp_path: Path
) -> None:
    _run(LIMITED, str(painted), str(tmp_path / "free"), "free")
    # The limit counts what the C library reserves for each thread too, which takes all that is left and is no use of it.
    done = _run(LIMITED, str(painted), str(tmp_path / "limited"), "limited", MALLOC_ARENA_MAX="2")
    # JAX reports the computation that lacked memory, or a later one that waited for it.
    assert "RESOURCE_EXHAUSTED" in done.stderr or "Out of memory allocating" in done.stderr
    assert "Steps are computed in 2 micro-batches from now on" in done.stderr
    assert "resuming from step 2" in done.stderr
    free, limited = _losses(tmp_path / "free"), _losses(tmp_path / "limited")
    assert list(free) == list(limited) == [1, 2, 3, 4]
    np.testing.assert_allclose(list(limited.values()), list(free.values()), rtol=1e-5)


def _fitted(config, run: Path) -> tuple[Budget, int]:
    mesh = device_mesh(config)
    cohort = load_cohort(config.data.cohort, config.data.classes).split("train")
    model = build_model(config.model, 3, 0)
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    bag = open_feed(training_slides(cohort, config), config, mesh).shapes()
    state = abstract_state(model, optimizer, config, mesh)
    _, budget, micro_batches = fitting_step(
        partial(build_step, model, optimizer, mesh=mesh), config, mesh, state, bag, run
    )
    run.mkdir(exist_ok=True)
    record_micro_batches(run, micro_batches)
    return budget, micro_batches.count


def test_the_fewest_micro_batches_that_fit_are_chosen_and_a_step_that_cannot_fit_is_refused_before_anything_is_written(
    small_config, tmp_path: Path
) -> None:
    small_config.data.device_prefetch = 1
    whole, count = _fitted(small_config, tmp_path)
    assert count == 1
    assert whole.total == whole.parameters + whole.optimizer + whole.bags + whole.temporary + whole.program
    small_config.train.memory_gib = (whole.total - 1) / 2**30
    half, count = _fitted(small_config, tmp_path)
    assert count == 2
    assert half.total < whole.total
    assert (half.parameters, half.optimizer, half.bags) == (whole.parameters, whole.optimizer, whole.bags)
    small_config.train.memory_gib = 1e-3
    with pytest.raises(InputError, match=r"does not fit.* 1 of 4 bags .*parameters .*has 1\.0 MiB to use; lower"):
        train(small_config, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_the_run_records_its_micro_batches_and_halves_them_until_they_have_one_bag(
    small_config, tmp_path: Path
) -> None:
    assert _fitted(small_config, tmp_path)[1] == 1
    assert [halve_micro_batch(tmp_path, 1), _fitted(small_config, tmp_path)[1], halve_micro_batch(tmp_path, 2)] == [
        2,
        2,
        4,
    ]
    assert halve_micro_batch(tmp_path, 2) == 4  # another process, of the same step
    with pytest.raises(InputError, match="4 micro-batches, and there can be no more; lower"):
        halve_micro_batch(tmp_path, 4)


@pytest.mark.parametrize("text", ["", '{"count": 2', '{"count": "2", "possible": [1]}', "[1]"])
def test_a_damaged_memory_json_is_set_aside_with_one_line(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "memory.json").write_text(text)
    assert _recorded_micro_batches(tmp_path) == MicroBatches(1, (1,))
    assert (tmp_path / "memory.json.damaged").read_text() == text
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{tmp_path / 'memory.json'}: is damaged (")
    assert "renamed to memory.json.damaged" in lines[0]
    assert _recorded_micro_batches(tmp_path) == MicroBatches(1, (1,))
    assert not capsys.readouterr().err


def test_running_out_of_memory_outside_a_step_is_not_taken_for_the_steps_error(
    small_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nMore.")

    monkeypatch.setattr("crcjax.predict.stored_bags.Evaluation.metrics", lacking)
    with pytest.raises(InputError, match=r"allocating 9 bytes\. That was in an evaluation, not in a step: lower"):
        train(small_config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "memory.json").read_text())["count"] == 1
