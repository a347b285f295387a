"""Runs of two real processes, started by launch/local.py."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import AGAIN_STATUS, PEER_STATUS
from crcjax.models.mil import build_model
from crcjax.monitor.event_log import EVENTS, EventLog, read_events
from crcjax.monitor.run_health import run_health
from crcjax.parallel.liveness import LOST
from crcjax.parallel.supervisor import ending
from crcjax.predict.feature_density import load_density
from crcjax.runs.checkpoint import newest_step, restore_params
from crcjax.runs.run_directory import open_run
from crcjax.slides.store.features import write_features
from crcjax.slides.store.tile_store import open_store
from crcjax.train.health import WENT_BACK
from crcjax.train.loop import train

pytestmark = [pytest.mark.multiprocess, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
SMALL = """
from crcjax.config import get_config as default

def get_config():
    config = default()
    config.data.regions_per_bag, config.data.batch_size, config.data.region_buckets = 4, 4, (64, 128)
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 100_000, 100_000, 100_000
    config.train.log_every, config.train.replica_check_every, config.optimizer.warmup_steps = 1, 2, 2
    return config
"""
LACKING = """
import sys
import jax
from crcjax.train import setup

fitting_step = setup.fitting_step

def lacking(*arguments):
    step, budget, micro_batches = fitting_step(*arguments)
    def run(state, bag):
        if "--process=1" in sys.argv and int(state.step) == 2 and micro_batches.count == 1:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory, by a test.")
        return step(state, bag)
    return run, budget, micro_batches

setup.fitting_step = lacking
"""
DAMAGED = """
import time
from dataclasses import replace
from pathlib import Path

import jax
from crcjax.train.recompute import Recomputation

take_step, damages = Recomputation.__call__, iter([True])

def damaged(self, number, state, batch):
    # With two unfinished saves, that of step 6 would be skipped.
    while number == 6 and not Path("run/checkpoints/4").is_dir():
        time.sleep(0.02)
    if number == 7 and next(damages, False):
        with jax.transfer_guard("allow"):
            state = replace(state, params=jax.tree.map(lambda leaf: leaf * 1e30, state.params))
    return take_step(self, number, state, batch)

Recomputation.__call__ = damaged
"""
NOTICE_TO_PROCESS_1 = """
from crcjax.parallel import preemption_notice

if "--process=1" in sys.argv:
    open_source = preemption_notice.PreemptionNotice.__init__
    preemption_notice.PreemptionNotice.__init__ = lambda self, source: open_source(self, f"{source}-of-process-1")
preemption_notice.INTERVAL_S = 0.1
"""
MEASURES_EVERY_SECOND = """
from crcjax.parallel import device_probe, process_group

process_group._STRAGGLER_CHECK_S = 1.0
process_group.DeviceProbe.__init__.__defaults__ = (1.0,)
"""
HOST = socket.gethostname()


@pytest.fixture
def start(painted: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """Starts two processes that train in tmp_path/run; further arguments go to crcjax.main."""
    (tmp_path / "small.py").write_text(SMALL)

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "launch" / "local.py"), "--processes=2", "--devices=1", "--"]
        command += [*_training(painted, tmp_path), *arguments]
        settings = {"PYTHONPATH": str(ROOT), "PJRT_NPROC": "16"}
        return subprocess.Popen(command, env=os.environ | settings, stdout=subprocess.PIPE, text=True, cwd=tmp_path)

    return start


def _training(painted: Path, tmp_path: Path) -> list[str]:
    """The arguments of crcjax.main that train in tmp_path/run."""
    run = [f"--config={tmp_path / 'small.py'}", f"--workdir={tmp_path / 'run'}"]
    return [*run, f"--config.data.store={painted / 'store'}", f"--config.data.cohort={painted / 'cohort.csv'}"]


def _until_training(launcher: subprocess.Popen) -> str:
    output = ""
    for line in launcher.stdout:
        output += line
        if line.startswith("[0] step 2/"):
            return output
    raise AssertionError(output)


def _process(launcher: subprocess.Popen, index: int) -> psutil.Process:
    children = psutil.Process(launcher.pid).children()
    return next(child for child in children if f"--process={index}" in child.cmdline())


def _end(launcher: subprocess.Popen, within_s: float = 60.0) -> str:
    """The output of the launcher, which must end within `within_s` seconds."""
    began = time.monotonic()
    output = launcher.communicate(timeout=within_s + 60)[0]
    assert time.monotonic() - began < within_s, output
    return output


def _errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.match(r"\[\d\] crcjax: ", line)]


@pytest.mark.slow
def test_two_processes_train_evaluate_and_save_as_one_and_only_the_main_one_logs_progress(
    start, tmp_path: Path, painted: Path
) -> None:
    table, run = tmp_path / "cohort.csv", tmp_path / "run"
    table.write_text((painted / "cohort.csv").read_text().replace(",test\n", ",val\n"))
    launcher = start(
        *("--config.train.steps=4", "--config.train.eval_every=2", "--config.train.checkpoint_every=3"),
        *("--config.model.head=evidential_density", "--config.train.loss=evidential", f"--config.data.cohort={table}"),
    )
    output = _end(launcher, 240)
    assert "[0] step 4: validation loss" in output
    assert "[1] step" not in output
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines if "val/loss" in line] == [2, 4]
    logs = [(run / "logs" / f"process-{process}.log").read_text() for process in (0, 1)]
    for process, log in enumerate(logs):
        assert "trained to step 4" in log
        assert all(f" [{process}] " in line for line in log.splitlines() if line.startswith("20"))
    validation = [re.findall(r"validation loss .*", log) for log in logs]
    assert validation[0] == validation[1]
    density = load_density(run)
    (run / "density.npz").unlink()
    train(open_run(run).config, run)  # by one process
    for name, value in vars(load_density(run)).items():
        np.testing.assert_allclose(getattr(density, name), value, rtol=1e-3, atol=1e-6)


def test_a_killed_process_is_named_by_the_other_at_once(start) -> None:
    launcher = start()
    _until_training(launcher)
    _process(launcher, 1).kill()
    output = _end(launcher, 30)
    (error,) = _errors(output)
    assert f"[0] crcjax: process 1 ({HOST}) was lost: it was killed" in error
    assert launcher.returncode in (128 + signal.SIGKILL, 4)


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_process_is_named_by_the_other_within_the_timeout_and_recorded(
    start, tmp_path: Path, stopped: int
) -> None:
    launcher = start("--config.train.peer_timeout_s=3")
    _until_training(launcher)
    _process(launcher, stopped).suspend()
    # The launcher kills a process that is stopped once another one has failed.
    output = _end(launcher, 3 + 10)
    (error,) = _errors(output)
    reason = rf"process {stopped} \({HOST}\) was lost: no heartbeat for [34] s"
    assert re.match(rf"\[{1 - stopped}\] crcjax: {reason}", error)
    assert launcher.returncode == 4
    event = read_events(tmp_path / "run" / EVENTS)[-1]
    assert (event.kind, event.facts["processes"], event.facts["hosts"]) == (LOST, [stopped], [HOST])
    assert re.match(reason, event.facts["reason"])
    log = (tmp_path / "run" / "logs" / f"process-{1 - stopped}.log").read_text()
    assert "stack of the thread MainThread" in log
    health = run_health(tmp_path / "run", silence_s=0.0)
    assert not health.is_well
    assert re.match(reason, health.processes[1 - stopped].state)


def test_all_processes_go_back_from_damaged_parameters_together_and_end_as_if_they_had_passed_over_the_bags_at_once(
    start, tmp_path: Path
) -> None:
    run, passing = tmp_path / "run", tmp_path / "passing"
    steps = ["--config.train.steps=12", "--config.train.checkpoint_every=2", "--config.health.max_left_out=2"]
    EventLog(run / EVENTS).append(WENT_BACK, step=8, first_step=7, last_step=8)
    _end(start(*steps), 240)
    run.rename(passing)
    (tmp_path / "small.py").write_text(SMALL + DAMAGED)
    output = _end(start(*steps), 240)
    (event,) = [event for event in read_events(run / EVENTS) if event.kind == WENT_BACK]
    assert (event.facts["to_step"], event.facts["first_step"], event.facts["last_step"]) == (6, 7, 8), output
    for process in (0, 1):
        log = (run / "logs" / f"process-{process}.log").read_text()
        assert "the run went back to step 6 and passes over the bags of steps 7 to 8" in log
        assert "trained to step 12" in log
    assert _history(run) == _history(passing)
    model = build_model(open_run(run).config.model, 3, 0)
    params = [jax.tree.leaves(restore_params(path, model)[0]) for path in (run, passing)]
    assert all((np.asarray(one) == np.asarray(other)).all() for one, other in zip(*params, strict=True))


def _history(run: Path) -> list[dict[str, float]]:
    """The metrics of a run without those that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = {"train/steps_per_s", "train/slides_per_hour", "train/data_wait"}
    return [{name: value for name, value in line.items() if name not in clock} for line in lines]


def test_a_process_that_does_not_start_ends_the_others_with_a_status_that_is_restarted(
    painted: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    with socket.create_server(("127.0.0.1", 0)) as server:
        coordinator = f"--coordinator=127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-m", "crcjax.main", *_training(painted, tmp_path)]
    command += [coordinator, "--processes=2", "--process=0", "--wait_s=0.5"]
    ended = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert "of 2 processes, 1 did not connect within 0.5 s" in ended.stderr
    assert ended.returncode == PEER_STATUS
    assert not ending(ended.returncode).is_permanent


def test_a_notice_to_one_process_makes_all_save_after_the_same_step_and_end(start, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL + "\nimport sys\n" + NOTICE_TO_PROCESS_1)
    launcher = start(f"--config.train.preemption_notice={tmp_path / 'notice'}")
    _until_training(launcher)
    (tmp_path / "notice-of-process-1").touch()
    output = _end(launcher)
    assert launcher.returncode == AGAIN_STATUS
    stopped = {int(step) for step in re.findall(r"stopped at step (\d+); the same command resumes", output)}
    assert len(stopped) == 1
    assert newest_step(tmp_path / "run") == stopped.pop()


def test_a_process_that_runs_a_tenth_of_the_time_is_named_as_a_straggler(start, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL + MEASURES_EVERY_SECOND)
    launcher = start()
    _until_training(launcher)
    slow, events = _process(launcher, 1), tmp_path / "run" / EVENTS
    reader = threading.Thread(target=launcher.communicate)
    reader.start()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not any(event.kind == "straggler" for event in read_events(events)):
        for _ in range(100):
            slow.suspend()
            time.sleep(0.009)
            slow.resume()
            time.sleep(0.001)
    assert launcher.poll() is None
    launcher.terminate()
    reader.join(60)
    event = next(event for event in read_events(events) if event.kind == "straggler")
    assert event.facts["processes"] == [1]
    assert f"process 1 ({HOST}) is a straggler" in event.facts["reason"]
    assert event.facts["reason"] in (tmp_path / "run" / "logs" / "process-0.log").read_text()


def test_a_store_that_vanishes_is_one_error_from_each_process(start, painted: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(painted / "store", store)
    launcher = start(f"--config.data.store={store}")
    _until_training(launcher)
    store.rename(tmp_path / "elsewhere")
    output = _end(launcher)
    errors = _errors(output)
    assert sorted(error[:3] for error in errors) == ["[0]", "[1]"], output
    assert all(".zarr" in error for error in errors)
    assert launcher.returncode == 2


def test_features_that_are_not_finite_are_one_error_from_each_process(start, painted: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(painted / "store", store)
    rows = [row for row in load_cohort(painted / "cohort.csv", None).rows if row.split in ("train", "val")]
    damaged = [row.slide_id for row in rows if row.split == "train"][-1]
    about = {"encoder": "theirs", "weights_sha256": None, "mpp": None, "dtype": "float32", "imported": "by a test"}
    for row in rows:
        features = np.full((*open_store(store, row.slide_id).mask.shape, 8), np.nan if row.slide_id == damaged else 1.0)
        attributes = about | {"width": 8, "magnifications": ["10x"]}
        write_features(store, row.slide_id, "theirs", features.astype(np.float32), attributes)
    features = ["--config.data.features", "--config.model.encoder=theirs", f"--config.data.store={store}"]
    launcher = start(*features, "--config.augment.flips=False", "--config.augment.stain=0")
    output = _end(launcher, 240)
    errors = _errors(output)
    assert sorted(error[:3] for error in errors) == ["[0]", "[1]"], output
    assert all(f"{damaged}.zarr/features/theirs: holds features that are not finite" in error for error in errors)
    assert launcher.returncode == 2


def test_processes_of_other_configs_end_with_the_field_and_the_process(painted: Path, tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    running = _two(tmp_path, painted, [["--config.seed=0"], ["--config.seed=1"]])
    for i, process in enumerate(running):
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2
        assert f"[{i}] crcjax: the processes do not agree. process 1 ({HOST}) differs: config.seed is 1 there" in error
    assert not (tmp_path / "run").exists()


def test_if_one_process_runs_out_of_memory_all_end_and_the_next_start_has_smaller_micro_batches(
    painted: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(SMALL + LACKING)
    running = _two(tmp_path, painted, [[], []])
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert [process.returncode for process in running] == [85, 85], errors
    for error in errors:
        assert (
            "memory, by a test. Steps are computed in 2 micro-batches from now on; give the same command again" in error
        )
    assert json.loads((tmp_path / "run" / "memory.json").read_text()) == {"count": 2, "possible": [1, 2]}


def _two(folder: Path, painted: Path, own: list[list[str]]) -> list[subprocess.Popen]:
    """Starts two processes of crcjax.main, each with its own arguments."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "crcjax.main", f"--config={folder / 'small.py'}", f"--workdir={folder / 'run'}"]
    command += [f"--config.data.store={painted / 'store'}", f"--config.data.cohort={painted / 'cohort.csv'}"]
    command += ["--processes=2", f"--coordinator=127.0.0.1:{port}"]
    return [
        subprocess.Popen([*command, f"--process={i}", *more], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i, more in enumerate(own)
    ]


SCRIPT = """
import os, signal, sys, time, jax, numpy as np
from crcjax.parallel.process_group import process_group
from crcjax.parallel.mesh import device_mesh, replicated
from crcjax.parallel.cluster_env import ClusterEnvironment

process = int(sys.argv[1])
with process_group(ClusterEnvironment(sys.argv[2], 2, process), {}, 60.0, float(sys.argv[3])) as group:
    group.barrier("start")
    %s
    time.sleep(60)
"""
DIVERGES = """
    for step, value in ((1, 1.0), (2, 1.0 + process * 1.2e-7)):
        copies = [jax.device_put(np.float32(value), device) for device in jax.local_devices()]
        kernel = jax.make_array_from_single_device_arrays((), replicated(device_mesh()), copies)
        group.check_replicas(step, {"kernel": kernel})
"""
STANDS_STILL = """
    group.report_progress(7, "reading its bags" if process else "computing")
"""
HANGS = """
import ctypes, sys, time
from pathlib import Path
from crcjax.monitor.logs import log_to_run
from crcjax.parallel import process_group as module
from crcjax.parallel.process_group import process_group

module._WATCHDOG_S = module._WATCHDOG_AFTER_S = 1.0

def hangs_here():
    %s

with log_to_run(Path(sys.argv[1])), process_group(None, {}, 1.0, 2.0) as group:
    group.report_progress(7, "computing")
    hangs_here()
"""


def _pair(script: str, stall_timeout_s: float) -> list[subprocess.Popen]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    command = [sys.executable, "-c", SCRIPT % script.strip(), "0", address, str(stall_timeout_s)]
    return [
        subprocess.Popen([*command[:3], str(i), *command[4:]], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        for i in (0, 1)
    ]


def test_parameters_that_diverge_by_a_bit_are_named_with_the_process_by_all() -> None:
    for process in _pair(DIVERGES, 60):
        error = process.communicate(timeout=120)[1]
        assert f"process 1 ({HOST}) has another kernel than the other processes after step 2" in error
        assert process.returncode == 4


def test_a_process_that_makes_no_progress_is_named_after_the_timeout() -> None:
    still = _pair(STANDS_STILL, 4)
    errors = [process.communicate(timeout=120)[1] for process in still]
    for process, error in zip(still, errors, strict=True):
        assert re.search(r"no step was finished for \d+ s: process 1 .* is reading its bags, step 7", error)
        assert process.returncode == 4


@pytest.mark.parametrize("hangs", ["time.sleep(600)", "ctypes.PyDLL(None).sleep(600)"])
def test_a_single_process_that_stands_still_prints_its_stacks_and_ends_with_a_status_that_is_restarted(
    hangs: str, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HANGS % hangs, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    log = (tmp_path / "logs" / "process-0.log").read_text()
    if "PyDLL" in hangs:
        # The interpreter does not answer, so that only its watchdog can act.
        assert "in hangs_here" in done.stderr
        assert not ending(done.returncode).is_permanent
    else:
        assert re.search(r"no step was finished for 2 s: process 0 .* is computing, step 7", done.stderr)
        assert "hangs_here" in log
        assert done.returncode == 4
