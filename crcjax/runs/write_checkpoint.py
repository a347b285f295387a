"""Writes one checkpoint in a background thread of every process: arrays, comparison with the memory, manifest."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from crcjax.errors import InputError, OutputError, writing
from crcjax.parallel.agreement import exchange
from crcjax.runs.array_hashes import differing_file_pieces, piece_hashes, write_hashes
from crcjax.runs.background_save import BackgroundSave
from crcjax.runs.checkpoint_folder import (
    ABOUT,
    ARRAYS,
    FOLDER,
    finished_steps,
    remove_step,
    step_folder,
    unfinished_folder,
    unfinished_folders,
)
from crcjax.runs.integrity import step_metrics, sync_files, sync_folder, write_durably, write_manifest
from crcjax.runs.retention import Retention, steps_to_keep

# Files beside the arrays, and the blocks that files do not fill.
_SPACE_BESIDE_ARRAYS = 2**20
# Whether the arrays are compressed by zstd. It takes a twelfth of the bytes off trained weights, but saving takes longer by half and
# restoring by a quarter (tools/bench_checkpoint.py).
COMPRESSED = False


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes one checkpoint.

    Attributes:
      run: the run directory.
      step: the step of the state.
      state: the fields of the training state, in host memory.
      metrics: validation metrics, if the step was evaluated.
      about: facts that are saved beside the arrays.
      retention: the checkpoints that are kept.
      signing_key: the private key that signs the manifest.
      timeout_s: the longest time to wait for other processes.
      name: a name for this save, the same in all processes and of no other save.
    """

    run: Path
    step: int
    state: dict[str, PyTree[Array]]
    metrics: Mapping[str, float] | None
    about: Mapping[str, Any]
    retention: Retention
    signing_key: Path | None
    timeout_s: float
    name: str

    def __call__(self, save: BackgroundSave) -> None:
        """Writes the checkpoint, verifies it and only then gives it its name. Raises OutputError, the same in all processes."""
        folder = unfinished_folder(self.run, self.step)
        try:
            self._in_main("prepare", lambda: self._prepare(folder))
            hashes = piece_hashes(self.state)
            self._in_all("write", lambda: self._write_arrays(folder))
            save.check()
            self._in_all("compare", lambda: _compare(folder, hashes))
            save.check()
            self._in_main("publish", lambda: self._publish(folder))
        except OutputError:
            save.check()
            if jax.process_index() == 0:
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _in_main(self, stage: str, action: Callable[[], None]) -> None:
        self._in_all(stage, action if jax.process_index() == 0 else lambda: None)

    def _in_all(self, stage: str, action: Callable[[], None]) -> None:
        """Runs a stage in every process, and raises the first error in all of them, so that none goes on alone."""
        error = ""
        try:
            # TensorStore and Orbax raise ValueError, and asyncio's groups RuntimeError, for errors of the file system.
            with writing(self.run / FOLDER, "choose another --workdir", catch=(OSError, ValueError, RuntimeError)):
                action()
        except (OutputError, InputError) as failure:
            error = str(failure)
        errors = exchange(f"{self.name}/{stage}", error, self.timeout_s)
        if first := next(filter(None, errors), ""):
            raise OutputError(first)

    def _prepare(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state)) + _SPACE_BESIDE_ARRAYS
        if shutil.disk_usage(folder).free < needed:
            for interrupted in unfinished_folders(self.run):
                if interrupted != folder:
                    shutil.rmtree(interrupted, ignore_errors=True)
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise OutputError(
                f"{folder.parent}: has {free / 2**20:,.0f} MiB free, and a checkpoint takes up to {needed / 2**20:,.0f} MiB; "
                "free space"
            )

    def _write_arrays(self, folder: Path) -> None:
        # With the processes named, Orbax waits for them through the coordination service, not by a collective on devices.
        options = ocp.options.MultiprocessingOptions(
            active_processes=set(range(jax.process_count())), barrier_sync_key_prefix=self.name
        )
        handler = ocp.PyTreeCheckpointHandler(use_compression=COMPRESSED, multiprocessing_options=options)
        with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
            checkpointer.save(folder / ARRAYS, args=ocp.args.PyTreeSave(self.state))

    def _publish(self, folder: Path) -> None:
        about = {"step": self.step, "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **self.about}
        write_durably(folder / ABOUT, (json.dumps(about, indent=1) + "\n").encode())
        write_manifest(folder, self.step, self.metrics, self.signing_key)
        # Training that went back to an earlier step saves this one again.
        remove_step(self.run, self.step)
        folder.rename(step_folder(self.run, self.step))
        sync_folder(folder.parent)
        for interrupted in unfinished_folders(self.run):
            shutil.rmtree(interrupted, ignore_errors=True)
        remove_superfluous(self.run, self.retention)


def remove_superfluous(run: Path, retention: Retention) -> list[int]:
    """Removes the checkpoints that the retention does not keep, and returns their steps. Those with damage are kept."""
    metrics_of_step: dict[int, Mapping[str, float] | None] = {}
    for step in finished_steps(run):
        try:
            metrics_of_step[step] = step_metrics(run, step)
        except InputError:
            # Restoring sets it aside; `crcjax checkpoints verify` names it.
            continue
    superfluous = sorted(set(metrics_of_step) - steps_to_keep(metrics_of_step, retention))
    for step in superfluous:
        remove_step(run, step)
    return superfluous


def _compare(folder: Path, hashes: dict) -> None:
    """Reads this process's arrays back from the disk and compares them with the memory. Raises OutputError."""
    sync_files(folder / ARRAYS)
    if differing := differing_file_pieces(folder, hashes):
        raise OutputError(
            f"{folder.parent}: {len(differing)} arrays differ after they were written (first: {differing[0][0]}); test this "
            "machine's disk and memory"
        )
    write_hashes(folder, jax.process_index(), hashes)
