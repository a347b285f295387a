"""The registry of a run: what it lists, which checkpoint is the best, and what may be removed."""

import hashlib
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest

from crcjax.errors import InputError
from crcjax.runs.checkpoint import Checkpointer, best_metrics, newest_step
from crcjax.runs.registry import open_registry, remove_checkpoints, superfluous
from crcjax.runs.retention import Retention
from crcjax.runs.train_state import TrainState

METRICS = {
    1: {"balanced_accuracy": 0.5, "loss": 0.2},
    2: None,
    3: {"balanced_accuracy": 0.9, "loss": 0.9},
    4: {"balanced_accuracy": 0.9, "loss": 0.9},
    5: {"balanced_accuracy": 0.4, "loss": 0.8},
    6: None,
}


@pytest.fixture(scope="module")
def six(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with the checkpoints of METRICS, to be copied."""
    folder = tmp_path_factory.mktemp("six") / "run"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
    checkpoints = Checkpointer(folder, Retention(newest=9))
    for step, metrics in METRICS.items():
        checkpoints.save(TrainState(jnp.int32(step), {"kernel": jnp.ones(3) * step}, ()), metrics, is_last=True)
    checkpoints.close()
    return folder


@pytest.fixture
def copy(six: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be changed."""
    return Path(shutil.copytree(six, tmp_path / "run"))


def test_a_trained_run_lists_metrics_size_age_and_the_hashes_of_its_config_and_data(run: Path) -> None:
    registry = open_registry(run)
    steps = [entry.step for entry in registry.checkpoints]
    assert steps == sorted(steps)
    for entry in registry.checkpoints:
        folder = run / "checkpoints" / str(entry.step)
        assert entry.size_bytes == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        assert abs(entry.saved_at.timestamp() - (folder / "manifest.json").stat().st_mtime) < 60
        assert entry.config_sha256 == hashlib.sha256((run / "config.json").read_bytes()).hexdigest()
        assert entry.data_sha256 == hashlib.sha256((run / "data_manifest.csv").read_bytes()).hexdigest()
        assert entry.state == "whole"
        assert entry.metrics == json.loads((folder / "manifest.json").read_text())["metrics"]
    best, metrics = best_metrics(run)
    assert [(entry.step, entry.metrics) for entry in registry.checkpoints if entry.predicts] == [(best, metrics)]
    assert [entry.step for entry in registry.checkpoints if entry.is_resumed_from] == [newest_step(run)]


def test_the_best_checkpoint_is_that_of_prediction_or_of_a_metric(six: Path) -> None:
    registry = open_registry(six)
    assert registry.best().step == 4
    assert registry.best("balanced_accuracy").step == 4
    assert registry.best("loss").step == 1
    with pytest.raises(
        InputError, match=r"no checkpoint has the metric 'auroc'; the metrics are balanced_accuracy, loss"
    ):
        registry.best("auroc")
    with pytest.raises(InputError, match="has no checkpoint of step 7; choose one of 1, 2, 3, 4, 5, 6"):
        registry.entry(7)


def test_pruning_keeps_what_is_asked_for_and_always_what_predicts_what_resumes_and_what_is_damaged(copy: Path) -> None:
    (copy / "checkpoints" / "2" / "checkpoint.json").unlink()
    (copy / "checkpoints" / "6" / "manifest.json").write_text("{}")
    registry = open_registry(copy)
    assert [entry.state for entry in registry.checkpoints] == ["whole", "damaged", "whole", "whole", "whole", "damaged"]

    def removed(*retention: object, **keep: object) -> list[int]:
        return [entry.step for entry in superfluous(registry, Retention(*retention), **keep)]

    # A damaged manifest hides whether the checkpoint of step 6 is the best one, so nothing predicts.
    assert not any(entry.predicts for entry in registry.checkpoints)
    with pytest.raises(InputError, match=r"6.manifest\.json: unreadable"):
        registry.best()
    assert removed(1, 1) == [1, 3]
    assert removed(1, 1, ("loss",)) == [3]
    assert removed(1, 1, (), 3) == [1]
    assert removed(1, 2) == [1]
    assert removed(1, 1, keep_steps=[1]) == [3]
    with pytest.raises(InputError, match="has no checkpoint of step 7"):
        removed(1, 1, keep_steps=[7])
    remove_checkpoints(copy, superfluous(registry, Retention(1, 1)))
    assert [entry.step for entry in open_registry(copy).checkpoints] == [2, 4, 5, 6]
    assert newest_step(copy) == 5
    assert [folder.name for folder in open_registry(copy).renamed] == ["damaged-6-unreadable"]


def test_a_checkpoint_of_an_earlier_version_is_unverified_and_has_no_hashes(copy: Path) -> None:
    folder = copy / "checkpoints" / "3"
    for name in ("manifest.json", "checkpoint.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / "hashes")
    entry = open_registry(copy).entry(3)
    assert (entry.state, entry.metrics, entry.config_sha256, entry.data_sha256) == ("unverified", None, "", "")
    assert entry.saved_at.timestamp() > 0


def test_a_run_without_checkpoints_is_refused(copy: Path) -> None:
    for path in (copy / "checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(InputError, match="has no checkpoint yet; train it further"):
        open_registry(copy)
    with pytest.raises(InputError, match="is not a run directory"):
        open_registry(copy / "checkpoints")
