import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crcjax.data.cohort import load_cohort
from crcjax.errors import DivergedError, InputError, StoppedError
from crcjax.models.mil import build_model
from crcjax.monitor.goodput import read_goodput
from crcjax.monitor.heartbeat import COMPUTING
from crcjax.monitor.samples import read_samples
from crcjax.parallel.process_group import ProcessGroup
from crcjax.predict.feature_density import load_density, summary
from crcjax.predict.predict_store import predict_stored
from crcjax.predict.predictor import Predictor
from crcjax.runs.checkpoint import restore_params
from crcjax.runs.run_directory import open_run
from crcjax.slides.wsi.slide import open_slide
from crcjax.train.loop import train

ROOT = Path(__file__).parents[2]
SMALL = """
from crcjax.config import get_config as default

def get_config():
    config = default()
    config.data.regions_per_bag, config.data.batch_size, config.data.region_buckets = 4, 4, (64, 128)
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.train.checkpoint_every = 40, 20, 5
    config.train.log_every, config.optimizer.warmup_steps = 1, 2
    config.data.mine_slides, config.data.mine_regions, config.data.mine_every = 0.25, 0.3, 3
    return config
"""


def _params(run: Path) -> list[np.ndarray]:
    model = build_model(open_run(run).config.model, 3, 0)
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restore_params(run, model)[0])]


def test_a_run_directory_has_config_versions_tiling_metrics_and_checkpoints(small_config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(small_config, run)
    assert json.loads((run / "config.json").read_text())["train"]["steps"] == 6
    facts = json.loads((run / "run.json").read_text())
    assert facts["tiling"]["magnifications"] == ["10x"]
    assert facts["versions"]["jax"] == jax.__version__
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "train/loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val/balanced_accuracy" in line] == [3, 6]
    assert any("train/slides_per_hour" in line for line in lines)
    assert all(0 <= line["train/data_wait"] <= 1 for line in lines if "train/slides_per_hour" in line)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= event.value <= 1 for event in events.Scalars("goodput/steps_kept"))
    assert not any("goodput/share" in line for line in lines)
    assert 6 in {int(folder.name) for folder in (run / "checkpoints").iterdir() if folder.name.isdigit()}


def test_a_run_is_monitored_and_tensorboard_shows_its_memory_beside_the_estimate(run: Path) -> None:
    (sample,) = read_samples(run)
    assert (sample.run, sample.step, sample.ending) == (run.name, 6, "finished")
    assert sample.device_estimate_bytes > 0
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    name = "monitor/process_peak_memory_bytes/max"
    assert {"monitor/step/median", name} <= set(events.Tags()["scalars"])
    assert 2**26 < events.Scalars(name)[-1].value < sample.host_reading.memory_total_bytes


def test_the_goodput_of_a_run_adds_up_to_its_wall_time_also_over_a_stop_and_a_pause(
    small_config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class StopsAfter5(ProcessGroup):
        def should_stop(self, step: int) -> bool:
            return step == 5

    began = time.monotonic()
    with pytest.raises(StoppedError):
        train(small_config, tmp_path, StopsAfter5())
    time.sleep(1.0)
    train(small_config, tmp_path)
    wall_s = time.monotonic() - began
    goodput = read_goodput(tmp_path)
    assert goodput is not None
    assert goodput.wall_s == pytest.approx(wall_s, rel=0.005)
    assert goodput.down == pytest.approx(1.0, abs=0.2)
    assert (goodput.attempts, goodput.lost_steps) == (2, 0)
    for account in ("start", "compile", "restore", "steps_kept", "evaluate", "save"):
        assert goodput.seconds[account] > 0, account
    assert f"{tmp_path}: {goodput}".split(" s in ")[1].split(":")[0] in capsys.readouterr().err


def test_while_a_run_trains_the_devices_have_its_state_and_no_other_copy_of_the_model(
    small_config, tmp_path: Path
) -> None:
    small_config.model.features, small_config.model.heads = 24, 2  # a width that nothing else here has
    small_config.train.eval_every = small_config.train.checkpoint_every = 6
    copies: list[int] = []

    class Watching(ProcessGroup):
        def report_progress(self, step: int, phase: str) -> None:
            if phase == COMPUTING:
                copies.append(sum(array.shape == (64, 24) for array in jax.live_arrays()))

    train(small_config, tmp_path / "run", Watching())
    assert copies == [3] * 6  # the encoder's last kernel and its two moments


def test_a_finished_run_is_not_changed(small_config, tmp_path: Path) -> None:
    train(small_config, tmp_path)
    before = _params(tmp_path)
    train(small_config, tmp_path)
    assert all((a == b).all() for a, b in zip(before, _params(tmp_path), strict=True))


def test_a_run_directory_of_another_config_is_refused_by_the_field(small_config, tmp_path: Path) -> None:
    small_config.train.steps = 3
    train(small_config, tmp_path)
    small_config.optimizer.learning_rate = 0.5
    with pytest.raises(InputError, match=r"another config \(optimizer\.learning_rate was 0\.001, is 0\.5\)"):
        train(small_config, tmp_path)


def test_a_run_of_an_older_version_has_the_defaults_of_fields_that_came_later(run: Path, tmp_path: Path) -> None:
    written = json.loads((run / "config.json").read_text())
    later = written["data"].pop("unit")
    (tmp_path / "config.json").write_text(json.dumps(written))
    (tmp_path / "run.json").write_text((run / "run.json").read_text())
    assert open_run(tmp_path).config.data.unit == later
    written["data"]["of_a_newer_version"] = 1
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(InputError, match=r"is not a run directory \(.*of_a_newer_version"):
        open_run(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step(small_config, tmp_path: Path) -> None:
    small_config.optimizer.learning_rate = 1e30
    with pytest.raises(DivergedError, match="the loss is not finite at step"):
        train(small_config, tmp_path)


def test_missing_paths_are_named(small_config, tmp_path: Path) -> None:
    small_config.data.store = ""
    with pytest.raises(InputError, match=r"config\.data\.store is empty"):
        train(small_config, tmp_path)


def _reported(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if "train/loss" in line}


def test_reports_have_the_mean_over_the_steps_since_the_last_report_and_a_stop_between_two_changes_no_bit(
    small_config, tmp_path: Path
) -> None:
    small_config.train.eval_every = small_config.train.checkpoint_every = 6
    train(small_config, tmp_path / "each")
    each = _reported(tmp_path / "each")
    small_config.train.log_every = 3
    train(small_config, tmp_path / "third")

    class StopsAfter4(ProcessGroup):
        def should_stop(self, step: int) -> bool:
            return step == 4

    with pytest.raises(StoppedError, match="stopped at step 4; the same command resumes"):
        train(small_config, tmp_path / "stopped", StopsAfter4())
    train(small_config, tmp_path / "stopped")
    third, stopped = _reported(tmp_path / "third"), _reported(tmp_path / "stopped")
    assert list(third) == list(stopped) == [3, 6]
    for metric in ("train/loss", "train/accuracy", "train/gradient_norm"):
        for steps in ((1, 2, 3), (4, 5, 6)):
            mean = np.mean([each[step][metric] for step in steps])
            assert third[steps[-1]][metric] == pytest.approx(mean, rel=1e-5)
            assert stopped[steps[-1]][metric] == third[steps[-1]][metric]
    log = (tmp_path / "third" / "logs" / "process-0.log").read_text()
    assert re.search(r"\| norm/scale +\| \(16,\) +\| float32 \| 16 ", log)


@pytest.mark.multiprocess
def test_ctrl_c_saves_and_stops_after_the_step_and_before_the_first_step_ends_with_one_line(
    painted: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(SMALL)
    command = [sys.executable, "-m", "crcjax.main", "--config", str(tmp_path / "small.py"), "--workdir", str(tmp_path)]
    command += [f"--config.data.store={painted / 'store'}", f"--config.data.cohort={painted / 'cohort.csv'}"]
    command += ["--config.train.steps=100000", "--config.train.eval_every=100000"]

    def started() -> subprocess.Popen:
        return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)

    process = started()
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():  # while packages load
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=120)[1].splitlines()
    assert (process.returncode, len(lines)) == (130, 1)
    assert lines[0].startswith("crcjax: interrupted; the same command resumes")

    process = started()
    while not process.stderr.readline().startswith("step "):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    lines = process.communicate(timeout=120)[1].splitlines()
    stopped = re.fullmatch(rf"crcjax: {tmp_path}: stopped at step (\d+); the same command resumes", lines[-1])
    assert process.returncode == 85
    assert stopped
    assert all(line.startswith("step ") for line in lines[:-1])
    assert (tmp_path / "checkpoints" / stopped[1]).is_dir()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_killed_and_resumed_run_with_hard_mining_equals_an_uninterrupted_one_bit_for_bit_with_any_threads(
    painted: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.py").write_text(SMALL)

    def start(run: Path, *arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "crcjax.main", "--config", str(tmp_path / "small.py"), "--workdir", str(run)]
        command += [f"--config.data.store={painted / 'store'}", f"--config.data.cohort={painted / 'cohort.csv'}"]
        return subprocess.Popen([*command, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    process = start(undisturbed)
    assert process.communicate()[1].count("starting") == 1
    assert process.returncode == 0
    process = start(killed)
    checkpoint = killed / "checkpoints" / "10"
    for _ in range(600):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.05)
    assert process.poll() is None, "the run ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    process = start(killed, "--config.data.read_threads=1", "--config.data.prefetch=1")
    assert "resuming from step" in process.communicate()[1]
    assert process.returncode == 0
    assert all((a == b).all() for a, b in zip(_params(undisturbed), _params(killed), strict=True))
    steps = [json.loads(line)["step"] for line in (killed / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 41))
    mined = [(run / "mined.jsonl").read_text() for run in (undisturbed, killed)]
    assert mined[0] == mined[1]
    assert any(json.loads(line)["slides"] for line in mined[0].splitlines())


def test_the_evidential_head_trains_with_its_loss_and_predicts_with_vacuity(
    small_config, painted: Path, tmp_path: Path
) -> None:
    small_config.model.head = "evidential"
    with pytest.raises(InputError, match=r"config\.train\.loss 'cross_entropy' does not go with"):
        train(small_config, tmp_path / "run")
    small_config.train.loss, small_config.train.annealing_steps = "evidential", 3
    train(small_config, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses) == small_config.train.steps
    assert np.isfinite(losses).all()
    with open_slide(next((painted / "slides").glob("*.svs"))) as slide:
        actual = Predictor(tmp_path / "run").predict(slide, 1).prediction
    assert 0 < float(actual.vacuity[0]) < 1
    np.testing.assert_allclose(actual.probs, actual.alpha / actual.alpha.sum(), rtol=1e-5)


@pytest.mark.slow
def test_evidence_by_density_falls_beyond_the_range_of_the_validation_slides(
    small_config, painted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, table = tmp_path / "run", tmp_path / "cohort.csv"
    small_config.model.head, small_config.train.loss = "evidential_density", "evidential"
    with pytest.raises(InputError, match="12 training and 3 validation slides or cases are too few"):
        train(small_config, run)
    assert not run.exists()
    table.write_text((painted / "cohort.csv").read_text().replace(",test\n", ",val\n"))
    small_config.data.cohort = str(table)
    train(small_config, run)
    density = load_density(run)
    train(small_config, run)
    assert capsys.readouterr().err.count("encoding all training slides for the feature density") == 1
    predictor = Predictor(run)
    (member,) = predictor.members
    validation = [painted / "slides" / f"{row.slide_id}.svs" for row in load_cohort(table, None).split("val").rows]
    for path in validation:
        with open_slide(path) as slide:
            encoded = predictor.encode(slide, 1)
        (features,), mask = encoded.features, encoded.mask
        known = summary(features, mask)[None]
        actual = predictor.predict_encoded([encoded])[0].prediction
        position = (encoded.plan.origin / encoded.plan.region_px).astype(np.float32)
        expected = density.scale_evidence(member.forward.pool(member.params, features, mask, position), known)
        np.testing.assert_allclose(actual.vacuity, expected.vacuity, rtol=1e-6)
        np.testing.assert_allclose(actual.probs, expected.probs, rtol=1e-6)
    # The density was fitted to the store's tiles, whose JPEG differs a little from the slides' pixels.
    rows = predict_stored([run], painted / "store", load_cohort(table, None).split("val"))
    by_store = [row.ood for row in rows if row.ood is not None]
    assert len(by_store) == 9
    assert 2 <= sum(one > 1e-3 for one in by_store) <= 4  # the upper quarter of nine, by each of two moments
    strange, _ = predictor.pool([features + 10.0], mask, position)
    assert float(strange.vacuity[0]) > 0.999 > float(actual.vacuity[0])
    (run / "density.npz").unlink()
    with pytest.raises(InputError, match=r"has no density\.npz, which is written at the end of training"):
        Predictor(run)
    train(small_config, run)
    for name, value in vars(load_density(run)).items():
        np.testing.assert_array_equal(value, getattr(density, name))
