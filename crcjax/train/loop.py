"""Training, from a config to a run directory."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from crcjax.data.miner import Miner
from crcjax.errors import DeviceMemoryError, StoppedError
from crcjax.monitor.logs import log
from crcjax.parallel.mesh import described
from crcjax.parallel.process_group import ProcessGroup
from crcjax.runs.checkpoint import newest_step
from crcjax.runs.run_directory import start_run
from crcjax.train.ensemble import check_members, member_config, side_by_side
from crcjax.train.memory_budget import (
    keep_parts,
    memory_of_step,
    more_parts,
)
from crcjax.train.record import Record
from crcjax.train.setup import Plan, batch_norm_note, plan_run


def train(config: ConfigDict, run: Path, group: ProcessGroup | None = None) -> None:
    """Trains to config.train.steps, going on from the run's newest checkpoint if it has one.

    With config.train.ensemble_size above 1 it trains as many runs, RUN/seed-S, together (`train_members`).
    Where a device's memory does not suffice after all, the micro-batch is halved, and the run goes on from its last
    checkpoint: a step's own state is donated, and a copy of it would take the memory that lacks.
    Raises InputError before anything is written if the config, the cohort, the store or the run directory is not
    usable, or no step fits the devices; OutputError if the run directory cannot be written; StoppedError once a checkpoint
    is saved, if the group is asked to stop.
    """
    if config.train.ensemble_size != 1:
        seeds = range(config.seed, config.seed + config.train.ensemble_size)
        train_members(config, {seed: run / f"seed-{seed}" for seed in seeds}, group)
    else:
        _train_on(config, {config.seed: run}, group or ProcessGroup())


def train_members(config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup | None = None) -> None:
    """Trains runs, by seed, that differ in it alone: config.train.ensemble_size at a time in one step, on the same bags.

    Each is a run as any other, and as if trained alone with its own config, but for rounding. Raises as `train`, and
    InputError where runs cannot be trained together.
    """
    check_members(config)
    for part in side_by_side(runs, config.train.ensemble_size, newest_step):
        _train_on(config, part, group or ProcessGroup())


def _train_on(config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup) -> None:
    run = next(iter(runs.values()))
    while True:
        try:
            return _train(config, runs, group)
        except DeviceMemoryError as error:
            # Of the parts that the run was started with, which this process has kept there.
            message = f"{run}: {error} Steps are computed in {more_parts(run, error.parts)} parts from now on"
            if jax.process_count() > 1:  # the others wait within the step: the run starts anew
                raise DeviceMemoryError(f"{message}; give the same command again", error.parts) from error
            log.info(message)
        gc.collect()  # what the failed step's frames held


def _train(config: ConfigDict, runs: Mapping[int, Path], group: ProcessGroup) -> None:
    plan, run = plan_run(config, runs), next(iter(runs.values()))
    config = plan.config
    _start(plan, runs, group)
    record = Record(plan, runs, group)
    state = record.restored()
    start = int(np.max(state.step))
    miner = Miner(run, plan.bags_of, config, state.mining, start)
    batches = plan.feed.batches(start, miner.board)
    # The miner is left before the batches are closed: readers that wait for it would never end.
    with memory_of_step(plan.parts), record.from_step(start), closing(batches), miner:
        log.info(f"{parameter_overview.count_parameters(state.params):,} parameters on {described(plan.mesh)}")
        for path in runs.values():
            log.info(f"{path}: going on from step {start}" if start else f"{path}: starting")
        log.info(f"memory {plan.budget}; bags in {plan.parts.count} of at most {max(plan.parts.possible)} parts")
        if config.model.batch_norm_momentum:
            log.info(batch_norm_note(config, plan.parts.count))
        for number, bags in enumerate(batches, start + 1):
            group.report_progress(number, "computing")
            state, metrics = plan.step(state, bags)
            batches.follow(metrics["loss"])
            miner.after(number, state.mining)
            stops, last = group.should_stop(number), number == config.train.steps
            evaluates = last or number % config.train.eval_every == 0
            saves = evaluates or stops or number % config.train.checkpoint_every == 0
            if config.train.replica_check_every and number % config.train.replica_check_every == 0:
                group.check_replicas(number, {"gradient norm": metrics["gradient_norm"], "parameter": state.params})
            if saves or number % config.train.log_every == 0:
                # Before every save, too: a run resumed from a checkpoint that is not finite would never recover.
                record.report(number, metrics, group.maximum(batches.waited_s))
            if saves:
                record.save(number, state, evaluates)
            if stops and not last:
                raise StoppedError(
                    f"{run}: stopped as asked, step {number} is saved; the same command goes on from there"
                )
            group.report_progress(number + 1, "reading its bags")
        record.finish()


def _start(plan: Plan, runs: Mapping[int, Path], group: ProcessGroup) -> None:
    """The run directories: the main process writes them, the others then look at them."""
    if not group.is_main:
        group.barrier("the run directory")
    for seed, path in runs.items():
        own_config = member_config(plan.config, seed) if plan.ensemble else plan.config
        start_run(path, own_config, plan.tiling, plan.cohort, plan.normaliser, group.is_main)
    if group.is_main:
        group.barrier("the run directory")
    for path in runs.values():
        keep_parts(path, plan.parts)
