"""The registry of a run: its checkpoints with metrics, hashes, sizes, ages and verdicts, and their removal."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crcjax.errors import InputError, writing
from crcjax.runs.checkpoint import best_metrics
from crcjax.runs.checkpoint_folder import damaged_folders, read_about, remove_step
from crcjax.runs.integrity import CheckpointVerdict, step_metrics, verify_run
from crcjax.runs.retention import Retention, best_step, steps_to_keep
from crcjax.runs.run_directory import open_run


@dataclass(frozen=True)
class CheckpointEntry:
    """One checkpoint of a run.

    Attributes:
      verdict: its step and folder, and the result of comparing its files with its manifest.
      metrics: its validation metrics; None if it was not evaluated.
      size_bytes: the size of its files.
      saved_at: when it was saved.
      config_sha256: the SHA-256 of its config, written as RUN/config.json is; empty for a checkpoint of an earlier version.
      data_sha256: the SHA-256 of the data manifest that it was trained with; empty if it is not recorded.
      is_resumed_from: whether training resumes from it: it is the newest whole one.
      predicts: whether `crcjax predict --run` and `crcjax checkpoints export` choose it: it is the best one.
    """

    verdict: CheckpointVerdict
    metrics: dict[str, float] | None
    size_bytes: int
    saved_at: datetime
    config_sha256: str
    data_sha256: str
    is_resumed_from: bool
    predicts: bool

    @property
    def step(self) -> int:
        """Its step."""
        return self.verdict.step

    @property
    def state(self) -> str:
        """`whole`, `damaged`, or `unverified` for a checkpoint of an earlier version, which has no manifest."""
        if self.verdict.damaged:
            return "damaged"
        return "whole" if self.verdict.has_manifest else "unverified"


@dataclass(frozen=True)
class RunRegistry:
    """The checkpoints of a run, oldest first, and the folders of damaged ones that a resumed training renamed."""

    run: Path
    checkpoints: tuple[CheckpointEntry, ...]
    renamed: tuple[Path, ...]

    def entry(self, step: int) -> CheckpointEntry:
        """The checkpoint of a step. Raises InputError if there is none."""
        for entry in self.checkpoints:
            if entry.step == step:
                return entry
        steps = ", ".join(str(entry.step) for entry in self.checkpoints)
        raise InputError(f"{self.run}: has no checkpoint of step {step}; choose one of {steps}")

    def best(self, metric: str | None = None) -> CheckpointEntry:
        """The checkpoint that prediction chooses, or the best one by a validation metric.

        Losses and errors are better when they are lower, all other metrics when they are higher. Raises InputError if no
        checkpoint has the metric, or if a damaged manifest hides which one is best.
        """
        if metric is None:
            return self.entry(best_metrics(self.run)[0])
        metrics_of_step = {entry.step: entry.metrics for entry in self.checkpoints}
        step = best_step(metrics_of_step, metric)
        if step is None:
            names = ", ".join(sorted({name for values in metrics_of_step.values() for name in values or ()})) or "none"
            raise InputError(f"{self.run}: no checkpoint has the metric {metric!r}; the metrics are {names}")
        return self.entry(step)


def open_registry(run: str | Path) -> RunRegistry:
    """Reads and verifies all checkpoints of a run, and changes nothing. Raises InputError if it has none."""
    path = open_run(run).path
    verdicts = verify_run(path)
    if not verdicts:
        raise InputError(f"{path}: has no checkpoint yet; train it further")
    newest = max((verdict.step for verdict in verdicts if not verdict.damaged), default=None)
    best = None
    # A damaged manifest hides which checkpoint is the best. Prediction then refuses the run.
    with suppress(InputError):
        best, _ = best_metrics(path)
    entries = tuple(_entry(path, verdict, newest, best) for verdict in verdicts)
    return RunRegistry(path, entries, tuple(damaged_folders(path)))


def superfluous(registry: RunRegistry, retention: Retention, keep_steps: Collection[int] = ()) -> list[CheckpointEntry]:
    """The checkpoints that nothing asks to keep.

    Kept are the ones that prediction and a resumed training use, those of `retention`, and `keep_steps`. Damaged ones are
    kept too: `crcjax checkpoints verify` reports them, and a resumed training renames them.

    Raises InputError if a step of `keep_steps` does not exist.
    """
    keep = {registry.entry(step).step for step in keep_steps}
    undamaged = [entry for entry in registry.checkpoints if not entry.verdict.damaged]
    keep |= steps_to_keep({entry.step: entry.metrics for entry in undamaged}, retention)
    keep |= {entry.step for entry in undamaged if entry.is_resumed_from or entry.predicts}
    return [entry for entry in undamaged if entry.step not in keep]


def remove_checkpoints(run: Path, entries: Collection[CheckpointEntry]) -> None:
    """Removes checkpoints of a run. Raises OutputError; what was removed until then stays removed."""
    for entry in entries:
        with writing(entry.verdict.folder, "ask for permission to remove it"):
            remove_step(run, entry.step)


def _entry(run: Path, verdict: CheckpointVerdict, newest: int | None, best: int | None) -> CheckpointEntry:
    files = [file.stat() for file in verdict.folder.rglob("*") if file.is_file()]
    about = read_about(verdict.folder)
    metrics = None
    # The verdict states damaged metrics.
    with suppress(InputError):
        metrics = step_metrics(run, verdict.step)
    return CheckpointEntry(
        verdict,
        metrics,
        sum(file.st_size for file in files),
        _saved_at(about, max((file.st_mtime for file in files), default=verdict.folder.stat().st_mtime)),
        str(about.get("config_sha256", "")),
        str(about.get("data_sha256", "")),
        verdict.step == newest,
        verdict.step == best,
    )


def _saved_at(about: dict[str, Any], mtime: float) -> datetime:
    try:
        return datetime.fromisoformat(about["saved_at"])
    except (KeyError, ValueError, TypeError):
        return datetime.fromtimestamp(mtime, UTC)
