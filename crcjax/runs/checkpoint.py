"""Checkpoints of a run: written asynchronously; the newest and the best ones are kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from crcjax.errors import InputError, writing
from crcjax.models.mil import MILModel, Params, params_of
from crcjax.runs.train_state import TrainState

FOLDER = "checkpoints"


class Checkpointer:
    """The checkpoints of one run directory. Close it, so that the last save is finished.

    `keep_best` is the number of checkpoints kept for their validation metrics, besides the newest one.
    """

    def __init__(self, run: Path, keep_best: int):
        best = preservation_policy.BestN(get_metric_fn=rank, n=keep_best, keep_checkpoints_without_metrics=False)
        # The newest is kept whatever its metrics: a run resumes from it.
        newest = preservation_policy.LatestN(1)
        options = ocp.CheckpointManagerOptions(
            # Without best_fn, Orbax does not write metrics, and the best checkpoint could not be found again.
            best_fn=rank,
            preservation_policy=preservation_policy.AnyPreservationPolicy([newest, best]),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._folder = (run / FOLDER).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._closed = False

    def restore(self, state: TrainState) -> TrainState:
        """Restores the newest checkpoint with the shapes and shardings of `state`; without one, returns `state`."""
        step = self._manager.latest_step()
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, vars(state))
        arguments = ocp.args.PyTreeRestore(abstract, _restore_args(abstract))
        return TrainState(**self._manager.restore(step, args=arguments))

    def save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts to write a checkpoint. With validation metrics, it may become the best one.

        Raises OutputError if this checkpoint or the one before cannot be written.
        """
        with (
            writing(self._folder, "choose another --workdir", catch=(OSError, ValueError)),
            _without_orbax_warnings(),
            # Orbax copies arrays to the host implicitly.
            jax.transfer_guard("allow"),
        ):
            self._manager.save(int(state.step), args=ocp.args.PyTreeSave(vars(state)), metrics=metrics)

    def close(self) -> None:
        """Waits until the last checkpoint is written. A second call does nothing. Raises OutputError."""
        if self._closed:
            return
        self._closed = True
        with writing(self._folder, "choose another --workdir", catch=(OSError, ValueError)):
            self._manager.wait_until_finished()
        self._manager.close()


def rank(metrics: dict[str, float]) -> float:
    """The score of a checkpoint; the best one has the highest. The loss breaks ties in balanced accuracy."""
    # Ties are frequent, since validation sets are small.
    return metrics["balanced_accuracy"] - 1e-3 * metrics["loss"]


def newest_step(run: Path) -> int:
    """The step that a run resumes from; 0 without a checkpoint."""
    return max((int(path.name) for path in (run / FOLDER).glob("*") if path.name.isdigit()), default=0)


def restore_params(run: str | Path, model: MILModel, step: int | None = None) -> tuple[Params, int]:
    """The parameters and the step of a run's checkpoint: by default the best one, or the newest if none was evaluated.

    Raises InputError if the run has no checkpoint, or none of `step`.
    """
    with _open(run) as manager:
        if step is None:
            step, _ = _best(run, manager)
        elif step not in manager.all_steps():
            steps = ", ".join(map(str, sorted(manager.all_steps())))
            raise InputError(f"{run}: has no checkpoint of step {step}; choose one of {steps}")
        abstract = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params_of(model))}
        arguments = ocp.args.PyTreeRestore(abstract, _restore_args(abstract), partial_restore=True)
        return manager.restore(step, args=arguments)["params"], step


def best_metrics(run: str | Path) -> tuple[int, dict[str, float] | None]:
    """The step and the validation metrics of a run's best checkpoint; None if none was evaluated. Raises InputError."""
    with _open(run) as manager:
        return _best(run, manager)


def _open(run: str | Path) -> ocp.CheckpointManager:
    folder = (Path(run) / FOLDER).absolute()
    if not folder.is_dir():
        raise InputError(f"{run}: has no checkpoints; train it with crcjax train --workdir {run}")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with _without_orbax_warnings():
        return ocp.CheckpointManager(folder, options=options)


@contextmanager
def _without_orbax_warnings() -> Iterator[None]:
    """Silences Orbax's warnings about checkpoints without metrics and about read-only managers, which are intended."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def metrics_of_steps(run: str | Path) -> dict[int, dict[str, float] | None]:
    """The validation metrics of a run's checkpoints, by step; None for a checkpoint that was not evaluated. Raises InputError."""
    with _open(run) as manager:
        return {step: manager.metrics(step) for step in sorted(manager.all_steps())}


def _best(run: str | Path, manager: ocp.CheckpointManager) -> tuple[int, dict[str, float] | None]:
    metrics = {step: manager.metrics(step) for step in manager.all_steps()}
    if not metrics:
        raise InputError(f"{run}: has no checkpoint yet; train it further")
    rank_of_step = {step: rank(values) for step, values in metrics.items() if values}
    best = max(rank_of_step, key=lambda step: rank_of_step[step]) if rank_of_step else max(metrics)
    return best, metrics[best]


def _restore_args(abstract: object) -> object:
    return ocp.checkpoint_utils.construct_restore_args(abstract)
