"""Checkpoints: asynchronous, the newest and the best kept, resumed from on the next start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint.checkpoint_managers import preservation_policy as keep

from crcjax.errors import InputError, writing
from crcjax.models.mil import MILModel, Params, params_of
from crcjax.runs.train_state import TrainState

FOLDER = "checkpoints"


class Checkpointer:
    """The checkpoints of one run directory; close it so that the last save is finished."""

    def __init__(self, run: Path, keep_best: int):
        # The newest is kept for resuming, whatever its metrics: a rule of the best alone would lose progress.
        best = keep.BestN(get_metric_fn=rank, n=keep_best, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            best_fn=rank,  # else Orbax writes no metrics, and nobody finds the best again
            preservation_policy=keep.AnyPreservationPolicy([keep.LatestN(1), best]),
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        self._folder = (run / FOLDER).absolute()
        self._manager = ocp.CheckpointManager(self._folder, options=options)
        self._closed = False

    def restore(self, state: TrainState) -> TrainState:
        """The newest saved state with the layout and sharding of `state`, or `state` itself if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return state
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, vars(state))
        return TrainState(**self._manager.restore(step, args=ocp.args.PyTreeRestore(abstract, _exactly(abstract))))

    def save(self, state: TrainState, metrics: dict[str, float] | None) -> None:
        """Starts a save; with validation metrics it may become the best.

        Raises OutputError if this or the save before it cannot be written.
        """
        with (
            writing(self._folder, "choose another --workdir", catch=(OSError, ValueError)),
            _unwarned(),
            jax.transfer_guard("allow"),  # Orbax copies to the host in its own ways
        ):
            self._manager.save(int(state.step), args=ocp.args.PyTreeSave(vars(state)), metrics=metrics)

    def close(self) -> None:
        """Waits for the last save; again, it does nothing. Raises OutputError if it cannot be written."""
        if self._closed:
            return
        self._closed = True
        with writing(self._folder, "choose another --workdir", catch=(OSError, ValueError)):
            self._manager.wait_until_finished()
        self._manager.close()


def rank(metrics: dict[str, float]) -> float:
    """What the best checkpoint has most of: validation sets are small and tie, so that the loss decides among equals."""
    return metrics["balanced_accuracy"] - 1e-3 * metrics["loss"]


def newest_step(run: Path) -> int:
    """The step that a run goes on from, 0 if it has no checkpoint."""
    return max((int(path.name) for path in (run / FOLDER).glob("*") if path.name.isdigit()), default=0)


def restore_params(run: str | Path, model: MILModel) -> tuple[Params, int]:
    """The parameters of a run's best checkpoint (the newest, if none was evaluated) and its step.

    Raises InputError if the run has no checkpoint.
    """
    with _opened(run) as manager:
        step, _ = _best(run, manager)
        abstract = {"params": jax.tree.map(ocp.utils.to_shape_dtype_struct, params_of(model))}
        arguments = ocp.args.PyTreeRestore(abstract, _exactly(abstract), partial_restore=True)
        return manager.restore(step, args=arguments)["params"], step


def best_metrics(run: str | Path) -> tuple[int, dict[str, float] | None]:
    """The step of a run's best checkpoint and its validation metrics, if it was evaluated. Raises InputError."""
    with _opened(run) as manager:
        return _best(run, manager)


def _opened(run: str | Path) -> ocp.CheckpointManager:
    folder = (Path(run) / FOLDER).absolute()
    if not folder.is_dir():
        raise InputError(f"{run}: has no checkpoints; train it with python -m crcjax.main --workdir {run}")
    options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0, create=False)
    with _unwarned():
        return ocp.CheckpointManager(folder, options=options)


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without Orbax's warnings of what is meant so: saves that were not evaluated, runs that are only read."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _best(run: str | Path, manager: ocp.CheckpointManager) -> tuple[int, dict[str, float] | None]:
    metrics = {step: manager.metrics(step) for step in manager.all_steps()}
    if not metrics:
        raise InputError(f"{run}: has no checkpoint yet; train it further")
    evaluated = {step: rank(values) for step, values in metrics.items() if values}
    step = max(evaluated, key=lambda at: evaluated[at]) if evaluated else max(metrics)
    return step, metrics[step]


def _exactly(abstract: object) -> object:
    return ocp.checkpoint_utils.construct_restore_args(abstract)
