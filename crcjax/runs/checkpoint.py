"""Checkpoints of a run: saved in the background, and verified before they are restored."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import Array, PyTree

from crcjax.errors import InputError, OutputError
from crcjax.models.mil import MILModel, Params, params_of
from crcjax.monitor.logs import log
from crcjax.parallel.agreement import exchange
from crcjax.runs.array_hashes import differing_pieces, read_hashes
from crcjax.runs.background_save import BackgroundSave
from crcjax.runs.checkpoint_folder import (
    ARRAYS,
    FOLDER,
    HASHES,
    finished_steps,
    read_about,
    set_aside,
    step_folder,
    unfinished_folders,
)
from crcjax.runs.integrity import CheckpointVerdict, step_metrics, verify_checkpoint
from crcjax.runs.retention import Retention, best_step, rank
from crcjax.runs.signature import sign
from crcjax.runs.train_state import TrainState
from crcjax.runs.write_checkpoint import CheckpointWriter

# One save is written while another one waits. Besides, one evaluated state is remembered (`Checkpointer.save`). More copies of the
# state would only fill the memory.
_MOST_SAVES = 2
# The longest time that an event holds its caller up.
_EVENT_WAIT_S = 0.1
# Numbers the checkpointers of this process, which all processes of a run open in the same order.
_opened = count()


class Checkpointer:
    """The checkpoints of one run directory. Close it, so that the last save is finished.

    Args:
      run: the run directory.
      retention: the checkpoints that are kept.
      timeout_s: the longest time that one save may take; then it is abandoned.
      signing_key: private key (PEM) that signs every checkpoint; restoring then refuses all others.
      about: facts that are saved with every checkpoint: the config and the version of the code.
      on_event: called in process 0 with the kind of an event and its facts, also by background threads. Kinds:
        checkpoint_saved, checkpoint_failed, checkpoint_skipped, checkpoint_damaged.

    Attributes:
      memory: the JSON values that were saved beside the state that was restored last; empty without them.
      write_s: how long the save that ended last took to write and verify; 0 before the first one has ended.
    """

    def __init__(
        self,
        run: Path,
        retention: Retention | None = None,
        *,
        timeout_s: float = 600.0,
        signing_key: Path | None = None,
        about: Mapping[str, Any] | None = None,
        on_event: Callable[..., object] = lambda kind, **facts: None,
    ):
        self._run, self._retention, self._timeout_s = run.absolute(), retention or Retention(), timeout_s
        self._signing_key, self._about, self._on_event = signing_key, dict(about or {}), on_event
        if signing_key:
            # An unusable key would make every save fail.
            sign(signing_key, b"")
        self._is_main = jax.process_index() == 0
        self._name = f"crcjax/checkpoints-{next(_opened)}"
        self._exchanges, self._save_numbers = count(), count()
        self._saves: list[BackgroundSave] = []
        # The best evaluated checkpoint that came while two saves were unfinished.
        self._postponed: CheckpointWriter | None = None
        # Why the latest checkpoint was skipped.
        self._unsaved = ""
        self.memory: dict[str, Any] = {}
        self.write_s = 0.0

    def restore(self, state: TrainState) -> TrainState:
        """Restores the newest whole checkpoint with the shapes and shardings of `state`; without one, returns `state`.

        Damaged checkpoints are renamed to damaged-STEP-REASON and reported. Raises InputError for a whole checkpoint that
        does not fit `state`.
        """
        self.wait()
        if self._is_main:
            _report_unfinished(self._run)
        # Restored arrays are moved to the devices, and back to be compared.
        with jax.transfer_guard("allow"):
            return self._restore_newest(state)

    def save(
        self,
        state: TrainState,
        metrics: Mapping[str, float] | None,
        *,
        is_last: bool = False,
        memory: Mapping[str, Any] | None = None,
    ) -> None:
        """Starts to save a checkpoint, with JSON values beside it. With validation metrics, it may become the best one.

        The caller waits only while the state is copied to the host's memory. If two saves have not ended yet, this one is
        skipped; with `is_last`, it waits for them. With metrics, it is saved as soon as there is a place, unless a better one
        comes before. Failures are reported, and do not raise. All processes call it together.
        """
        step = int(jax.device_get(state.step))
        busy_saves = self._busy_saves()
        if is_last and busy_saves + bool(self._postponed) >= _MOST_SAVES:
            self.wait()
            busy_saves = self._busy_saves()
        elif self._postponed and busy_saves < _MOST_SAVES:
            self._start_postponed()
            busy_saves += 1
        is_busy = busy_saves >= _MOST_SAVES
        if is_busy and (is_last or not metrics or not self._is_better(metrics)):
            self._skip(step)
            return
        writer = CheckpointWriter(
            self._run,
            step,
            _copy_on_host(vars(state)),
            dict(metrics) if metrics else None,
            {**self._about, "memory": dict(memory or {})},
            self._retention,
            self._signing_key,
            self._timeout_s,
            f"{self._name}/save-{next(self._save_numbers)}",
        )
        if not is_busy:
            self._start(writer)
        else:
            if self._postponed:
                self._skip(self._postponed.step)
            self._postponed = writer
        self._unsaved = ""

    def steps(self) -> list[int]:
        """The steps of the checkpoints, as process 0 sees them; all processes call it together."""
        return json.loads(self._exchange(json.dumps(finished_steps(self._run)))[0])

    def set_aside_from(self, step: int) -> None:
        """Renames the checkpoints of `step` and later steps to damaged-STEP-suspect; all processes call it together."""
        if self._is_main:
            for suspect in [suspect for suspect in finished_steps(self._run) if suspect >= step]:
                set_aside(step_folder(self._run, suspect), "suspect")
        self._exchange("")

    def wait(self) -> None:
        """Waits until all saves have succeeded, failed or been abandoned. All processes call it together."""
        for save in self._saves:
            save.wait()
        if self._postponed and self._busy_saves() < _MOST_SAVES:
            self._start_postponed()
            self._saves[-1].wait()
        elif self._postponed:
            # Abandoned saves that still wait for the disk have all places.
            self._skip(self._postponed.step)
            self._postponed = None

    def close(self) -> None:
        """Waits until the last save has ended. A second call does nothing. Raises OutputError if the last save failed."""
        self.wait()
        error = self._unsaved or (self._saves[-1].error if self._saves else "")
        self._saves, self._unsaved = [], ""
        if error:
            raise OutputError(f"the last checkpoint was not saved: {error}")

    def _restore_newest(self, state: TrainState) -> TrainState:
        damaged_count = 0
        while (step := int(self._exchange(str(max(finished_steps(self._run), default=-1)))[0])) >= 0:
            folder = step_folder(self._run, step)
            # The other processes compare the arrays that they read.
            verdict = verify_checkpoint(folder, private_key=self._signing_key) if self._is_main else None
            damage = self._first(_damage(verdict) if verdict else "")
            if not damage:
                arrays = _restore_arrays(folder, vars(state))
                damage = self._first(_array_damage(folder, arrays))
                if not damage:
                    if verdict and not verdict.has_manifest:
                        log.info(f"{folder}: an older checkpoint without a manifest, so that it could not be verified")
                    self.memory = read_about(folder).get("memory", {})
                    return TrainState(**arrays)
            damaged_count += 1
            if self._is_main:
                aside = _set_aside(folder, damage)
                self._record_event("checkpoint_damaged", step=step, damage=damage, renamed_to=aside.name)
        if damaged_count:
            log.error(f"{self._run}: no whole checkpoint is left; training starts again from its first step")
        self.memory = {}
        return state

    def _start(self, writer: CheckpointWriter) -> None:
        previous = self._saves[-1] if self._saves else None
        self._saves.append(BackgroundSave(writer.step, writer, self._on_save_end, self._timeout_s, previous))

    def _start_postponed(self) -> None:
        assert self._postponed
        self._start(self._postponed)
        self._postponed = None

    def _skip(self, step: int) -> None:
        self._unsaved = f"the disk has not finished {_MOST_SAVES} earlier ones yet"
        self._report(step, "checkpoint_skipped", self._unsaved)

    def _is_better(self, metrics: Mapping[str, float]) -> bool:
        """Whether validation metrics are better than those of the postponed checkpoint, or there is none."""
        earlier = self._postponed.metrics if self._postponed else None
        is_better = not earlier or rank(metrics) >= rank(earlier)
        # All processes must decide alike.
        return self._exchange("better" if is_better else "worse")[0] == "better"

    def _busy_saves(self) -> int:
        """The number of unfinished saves, each with a copy of the state in memory; the maximum over all processes."""
        # The last one is kept for `close`.
        self._saves = [save for save in self._saves if not save.is_ended or save.is_stuck] or self._saves[-1:]
        busy = sum(not save.is_ended or save.is_stuck for save in self._saves)
        # All processes must decide alike whether to begin another save.
        return max(map(int, self._exchange(str(busy))))

    def _on_save_end(self, save: BackgroundSave) -> None:
        self.write_s = save.seconds
        if save.error:
            self._report(save.step, "checkpoint_failed", save.error)
        elif self._is_main:
            log.debug(f"saved the checkpoint of step {save.step} in {save.seconds:.2f} s")
            self._record_event("checkpoint_saved", step=save.step, seconds=round(save.seconds, 3))

    def _report(self, step: int, kind: str, reason: str) -> None:
        place = "" if str(self._run) in reason else f"{self._run}: "
        message = f"{place}the checkpoint of step {step} was not saved, and training goes on: {reason}"
        if not self._is_main:
            log.debug(message)
            return
        log.warning(message)
        self._record_event(kind, step=step, reason=reason)

    def _record_event(self, kind: str, **facts: object) -> None:
        """Calls `on_event` in a thread, since the disk that it writes to may be full, or hang."""

        def record() -> None:
            try:
                self._on_event(kind, **facts)
            except OutputError as error:
                log.warning(f"the event {kind} was not recorded: {error}")

        thread = threading.Thread(target=record, name=kind, daemon=True)
        thread.start()
        # Usually it takes milliseconds, and events stay in order.
        thread.join(_EVENT_WAIT_S)

    def _exchange(self, value: str) -> list[str]:
        return exchange(f"{self._name}/{next(self._exchanges)}", value, self._timeout_s)

    def _first(self, text: str) -> str:
        """The first text of all processes that is not empty."""
        return next(filter(None, self._exchange(text)), "")


def newest_step(run: Path, signing_key: Path | None = None) -> int:
    """The step that a run resumes from; 0 without a checkpoint. Damaged checkpoints are renamed, as `restore` does."""
    while step := max(finished_steps(run), default=0):
        verdict = verify_checkpoint(step_folder(run, step), private_key=signing_key)
        if not verdict.damaged:
            return step
        _set_aside(verdict.folder, _damage(verdict))
    return 0


def restore_params(run: str | Path, model: MILModel, step: int | None = None) -> tuple[Params, int]:
    """The parameters and the step of a run's checkpoint: by default the best one, or the newest if none was evaluated.

    Raises InputError if the run has no checkpoint, none of `step`, or if it is damaged.
    """
    if step is None:
        step, _ = best_metrics(run)
    elif step not in finished_steps(run):
        steps = ", ".join(map(str, finished_steps(run)))
        raise InputError(f"{run}: has no checkpoint of step {step}; choose one of {steps}")
    folder = step_folder(run, step)
    params = {"params": params_of(model)}
    damage = _damage(verify_checkpoint(folder))
    if not damage:
        params = _restore_arrays(folder, params, partial=True)
        damage = _array_damage(folder, params)
    if damage:
        raise InputError(f"{folder}: damaged: {damage}; rename the folder to use the next best checkpoint")
    return params["params"], step


def best_metrics(run: str | Path) -> tuple[int, dict[str, float] | None]:
    """The step and the validation metrics of a run's best checkpoint; None if none was evaluated. Raises InputError."""
    metrics = metrics_of_steps(run)
    if not metrics:
        raise InputError(f"{run}: has no checkpoint yet; train it further")
    best = best_step(metrics)
    if best is None:
        best = max(metrics)
    return best, metrics[best]


def metrics_of_steps(run: str | Path) -> dict[int, dict[str, float] | None]:
    """The validation metrics of a run's checkpoints, by step; None for a checkpoint that was not evaluated. Raises InputError."""
    if not (Path(run) / FOLDER).is_dir():
        raise InputError(f"{run}: has no checkpoints; train it with crcjax train --workdir {run}")
    return {step: step_metrics(run, step) for step in finished_steps(run)}


def _copy_on_host(arrays: PyTree[Array]) -> PyTree[Array]:
    """A copy in host memory, since the next step donates the state. To JAX that memory is a kind of device memory."""
    layout = jax.tree.map(lambda array: array.sharding.with_memory_kind("pinned_host"), arrays)
    return jax.device_put(arrays, layout, may_alias=False)


def _restore_arrays(folder: Path, arrays: dict[str, Any], partial: bool = False) -> dict[str, Any]:
    """The arrays of a checkpoint with the shapes and shardings of `arrays`; with `partial`, of those arrays alone."""
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, arrays)
    restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
    arguments = ocp.args.PyTreeRestore(abstract, restore_args, partial_restore=partial)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore((folder / ARRAYS).absolute(), args=arguments)
    except (ValueError, OSError, KeyError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: cannot be restored ({reason}); it is of another model or damaged: rename the folder to use an earlier "
            "checkpoint"
        ) from error


def _damage(verdict: CheckpointVerdict) -> str:
    """The first damaged file of a checkpoint, and the number of the others; empty for a whole checkpoint."""
    if not verdict.damaged:
        return ""
    others = f" (and {len(verdict.damaged) - 1} other files)" if len(verdict.damaged) > 1 else ""
    return f"{verdict.damaged[0].path}: {verdict.damaged[0].reason}{others}"


def _array_damage(folder: Path, arrays: PyTree[Any]) -> str:
    try:
        differing = differing_pieces(arrays, read_hashes(folder))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{HASHES}: unreadable ({error})"
    return f"{differing[0][0]}: differs from the array that was saved" if differing else ""


def _set_aside(folder: Path, damage: str) -> Path:
    """Renames a checkpoint by the first word of its damage, and logs it."""
    reason = damage.split(": ", 1)[1].split()[0].strip(",:")
    aside = set_aside(folder, reason)
    log.error(f"{folder}: damaged: {damage}; renamed to {aside.name}, and the checkpoint before it is used")
    return aside


def _report_unfinished(run: Path) -> None:
    for folder in unfinished_folders(run):
        log.info(f"{folder}: a save that was interrupted; it is not used, and the next finished save removes it")
