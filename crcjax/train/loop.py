"""The training loop: from a config to a trained run directory."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from crcjax.data.miner import Miner
from crcjax.errors import StoppedError
from crcjax.monitor.goodput import COMPILE, STEPS, Ledger
from crcjax.monitor.heartbeat import COMPUTING, READING
from crcjax.parallel.process_group import ProcessGroup
from crcjax.train.ensemble import train_members
from crcjax.train.memory_budget import retry_with_smaller_micro_batches, step_memory_errors
from crcjax.train.record import Record, due_after, log_plan, start_directory
from crcjax.train.setup import fit_step, plan_run


def train(config: ConfigDict, run: Path, group: ProcessGroup | None = None, age_s: float = 0.0) -> None:
    """Trains to config.train.steps, resuming from the run's newest checkpoint if it has one.

    With config.train.ensemble_size above 1 it trains that many runs, RUN/seed-S, in one vmapped step (`train_members`). If
    a device runs out of memory, the micro-batch is halved and training resumes from the last checkpoint.

    Args:
      config: the whole config.
      run: the run directory, new or to be resumed.
      group: this process's place in its process group; None for a single process.
      age_s: the seconds that this process has spent on the run before, for the goodput ledger.

    Raises:
      InputError: the config, the cohort, the store or the run directory is not usable, or no step fits the devices.
        Nothing is written.
      OutputError: the run directory cannot be written.
      StoppedError: the group was asked to stop; a checkpoint is saved.
      DivergedError: the loss is not finite.
    """
    group = group or ProcessGroup()
    if config.train.ensemble_size != 1:
        seeds = range(config.seed, config.seed + config.train.ensemble_size)
        train_members(config, {seed: run / f"seed-{seed}" for seed in seeds}, group, age_s)
        return
    with group.heartbeat, Ledger(age_s, group.is_main) as ledger:
        retry_with_smaller_micro_batches(run, partial(_train, config, run, group, ledger))


def _train(config: ConfigDict, run: Path, group: ProcessGroup, ledger: Ledger) -> None:
    group.report_progress(0, "opening its data")
    plan = plan_run(config)
    config = plan.config
    group.report_progress(0, "compiling")
    with ledger.account(COMPILE):
        step, budget, micro_batches = fit_step(plan, run)
    start_directory(run, plan, config, micro_batches, group)
    ledger.open([run])
    group.start_heartbeats([run])
    record = Record(plan, run, group, ledger)
    state = record.restored(plan.model)
    start = int(state.step)
    miner = Miner(run, plan.data.training_units, config, state.mining, start)
    batches = plan.data.feed.batches(start, miner.memory_folder)
    # The miner exits before the batches are closed: readers that wait for a period would otherwise never end.
    with step_memory_errors(micro_batches), record.opened(start), closing(batches), miner:
        log_plan(plan, state.params, budget, micro_batches)
        # An implicit transfer between host and devices would make the devices wait, so JAX raises an error for it.
        with jax.transfer_guard("disallow"), ledger.account(STEPS):
            group.report_progress(start + 1, READING)
            for number, batch in enumerate(batches, start + 1):
                group.report_progress(number, COMPUTING)
                state, metrics = step(state, batch)
                record.metrics.add(metrics)
                batches.follow(metrics["loss"])
                miner.after_step(number, state.mining)
                stops = group.should_stop(number)
                due = due_after(number, config.train, stops)
                ledger.finished_step(number, batches.waited_s, due.checkpoint)
                if due.replica_check:
                    group.check_replicas(number, {"gradient norm": metrics["gradient_norm"], "parameter": state.params})
                if due.report:
                    record.report(number, group.maximum(batches.waited_s))
                    group.probe_devices()
                if due.checkpoint:
                    record.save(number, state, due)
                if stops and number < config.train.steps:
                    raise StoppedError(f"{run}: stopped at step {number}; the same command resumes")
                group.report_progress(number + 1, READING)
        record.finish(plan.model)
