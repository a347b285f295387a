"""Checkpoints: what is saved is restored bit for bit, and the best ones are kept."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.errors import InputError, OutputError
from crcjax.models.mil import build_model, params_of
from crcjax.runs.checkpoint import Checkpointer, best_metrics, restore_params
from crcjax.runs.retention import Retention
from crcjax.runs.train_state import LossScale, TrainState

BEST, WORSE = {"balanced_accuracy": 0.9, "loss": 1.0}, {"balanced_accuracy": 0.5, "loss": 0.1}


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir() if path.name.isdecimal())


def _state(step: int) -> TrainState:
    """A state with every kind of leaf: matrix, vector, scalar, bfloat16, bool, and values that compare oddly."""
    params = {
        "dense": {"kernel": jnp.arange(12.0).reshape(3, 4) + step, "bias": jnp.array([-0.0, np.nan, np.inf])},
        "half": jnp.full((5,), 1.5 + step, jnp.bfloat16),
        "flags": jnp.array([True, False]),
    }
    moments = ({"count": jnp.int32(step)}, (), {"dense": jnp.ones(4) * step})
    return TrainState(jnp.int32(step), params, moments, LossScale(jnp.float32(1024), jnp.int32(step)))


def _bytes(state: TrainState) -> list[tuple]:
    return [(str(leaf.dtype), leaf.shape, np.asarray(leaf).tobytes()) for leaf in jax.tree.leaves(state)]


def test_a_restored_state_has_the_bits_of_the_saved_one_and_lists_config_and_code(tmp_path: Path) -> None:
    events: list[tuple] = []
    about = {"config": {"seed": 7}, "code_version": "0.1.0"}
    checkpoints = Checkpointer(tmp_path, about=about, on_event=lambda kind, **facts: events.append((kind, facts)))
    assert checkpoints.restore(_state(3)).step == 3
    checkpoints.save(_state(0), None)
    assert checkpoints.restore(_state(3)).step == 0
    # The step after a save donates the state's memory.
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf, state), donate_argnums=0)
    saved = _state(5)
    checkpoints.save(saved, None)
    jax.block_until_ready(step(saved))
    checkpoints.close()
    checkpoints.close()
    again = Checkpointer(tmp_path)
    assert _bytes(again.restore(_state(0))) == _bytes(_state(5))
    again.close()
    stated = json.loads((tmp_path / "checkpoints" / "5" / "checkpoint.json").read_text())
    assert stated["step"] == 5
    assert {name: stated[name] for name in about} == about
    assert [(kind, facts["step"]) for kind, facts in events] == [("checkpoint_saved", 0), ("checkpoint_saved", 5)]


def test_the_best_checkpoint_is_kept_and_identified_after_a_restart(small_config, tmp_path: Path, capfd) -> None:
    model = build_model(small_config.model, 3, 0)
    for steps in ({1: None, 2: BEST, 3: None, 4: WORSE}, {5: WORSE, 6: None}):
        checkpoints = Checkpointer(tmp_path, Retention(newest=1, best=1))
        for step, metrics in steps.items():
            checkpoints.save(TrainState(jnp.int32(step), params_of(model), ()), metrics, is_last=True)
        checkpoints.close()
    assert best_metrics(tmp_path) == (2, BEST)
    assert restore_params(tmp_path, model)[1] == 2
    assert restore_params(tmp_path, model, 6)[1] == 6
    with pytest.raises(InputError, match="has no checkpoint of step 5; choose one of 2, 6"):
        restore_params(tmp_path, model, 5)
    assert _steps(tmp_path) == [2, 6]
    assert "WARNING" not in capfd.readouterr().err


def test_a_step_that_is_saved_again_replaces_the_earlier_one(tmp_path: Path) -> None:
    checkpoints = Checkpointer(tmp_path)
    first, second = _state(5), _state(6)
    checkpoints.save(first, None)
    checkpoints.save(TrainState(jnp.int32(5), second.params, second.moments, second.scaling), None, is_last=True)
    restored = checkpoints.restore(_state(0))
    checkpoints.close()
    assert _bytes(restored)[1:] == _bytes(second)[1:]
    assert _steps(tmp_path) == [5]


def test_a_save_that_hangs_is_reported_within_its_bound_and_later_saves_succeed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key, aside, events = tmp_path / "key.pem", tmp_path / "aside.pem", []
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    checkpoints = Checkpointer(
        tmp_path / "run", timeout_s=3.0, signing_key=key, on_event=lambda kind, **facts: events.append((kind, facts))
    )
    # The save signs its manifest, and reading a FIFO hangs as a broken network file system does.
    key.rename(aside)
    os.mkfifo(key)
    start = time.monotonic()
    checkpoints.save(_state(1), None)
    assert time.monotonic() - start < 2
    while not events and time.monotonic() - start < 10:
        time.sleep(0.05)
    assert time.monotonic() - start < 5
    ((kind, facts),) = events
    assert (kind, facts["step"]) == ("checkpoint_failed", 1)
    assert "not finished within 3 s" in facts["reason"]
    key.unlink()
    aside.rename(key)
    checkpoints.save(_state(2), None)
    checkpoints.close()
    assert _steps(tmp_path / "run") == [2]
    assert "the checkpoint of step 1 was not saved, and training goes on" in caplog.text


def test_while_the_disk_is_busy_the_best_evaluated_checkpoint_waits_and_the_others_are_skipped(tmp_path: Path) -> None:
    key, aside, events = tmp_path / "key.pem", tmp_path / "aside.pem", []
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    run, metrics = tmp_path / "run", {4: WORSE, 5: BEST, 6: WORSE}
    checkpoints = Checkpointer(
        run, Retention(newest=1), signing_key=key, on_event=lambda kind, **facts: events.append((kind, facts["step"]))
    )
    key.rename(aside)
    os.mkfifo(key)
    for step in range(1, 8):
        checkpoints.save(_state(step), metrics.get(step))
    assert events == [("checkpoint_skipped", step) for step in (3, 4, 6, 7)]
    # The save that reads the FIFO goes on, and the others find the key.
    with key.open("wb") as writer:
        key.unlink()
        aside.rename(key)
        writer.write(key.read_bytes())
    checkpoints.save(_state(8), WORSE, is_last=True)
    checkpoints.close()
    assert [step for kind, step in events if kind == "checkpoint_saved"] == [1, 2, 5, 8]
    assert _steps(run) == [5, 8]
    assert best_metrics(run) == (5, BEST)


def test_a_full_disk_stops_saving_with_a_warning_each_time_until_there_is_space(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, state = small_disk / "run", _state(1)
    checkpoints = Checkpointer(run)
    checkpoints.save(state, None)
    checkpoints.wait()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**17))
    for step in (2, 3):
        checkpoints.save(_state(step), None)
        checkpoints.wait()
        expected = (
            rf"the checkpoint of step {step} was not saved, and training goes on: .*MiB free, and a checkpoint takes"
        )
        assert re.search(expected, caplog.text)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1"]
    filler.unlink()
    checkpoints.save(_state(4), None)
    checkpoints.close()
    assert _steps(run) == [1, 4]
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**17))
    checkpoints.save(_state(5), None, is_last=True)
    with pytest.raises(OutputError, match=r"the last checkpoint was not saved: .*free space"):
        checkpoints.close()


def test_a_disk_that_turns_read_only_stops_saving_and_not_training(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpointer(small_disk)
    checkpoints.save(_state(1), None)
    checkpoints.wait()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    checkpoints.save(_state(2), None)
    checkpoints.wait()
    assert re.search(r"step 2 was not saved, and training goes on: .*Read-only file system", caplog.text)
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    checkpoints.save(_state(3), None)
    checkpoints.close()
    assert _steps(small_disk) == [1, 3]


def test_interrupted_saves_of_this_and_of_older_versions_are_not_used_and_removed_by_the_next_save(
    tmp_path: Path,
) -> None:
    for name in ("unfinished-8", "9.orbax-checkpoint-tmp-17"):
        (tmp_path / "checkpoints" / name / "default").mkdir(parents=True)
    checkpoints = Checkpointer(tmp_path)
    assert checkpoints.restore(_state(0)).step == 0
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2
    checkpoints.save(_state(1), None)
    checkpoints.close()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
