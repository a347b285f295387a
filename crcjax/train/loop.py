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
from crcjax.train.cluster_monitoring import cluster_monitor
from crcjax.train.ensemble import train_members
from crcjax.train.health import WentWrongError
from crcjax.train.memory_budget import retry_with_smaller_micro_batches, step_memory_errors
from crcjax.train.recompute import Recomputation
from crcjax.train.record import Record, due_after, log_plan, start_directory
from crcjax.train.save_interval import save_timer
from crcjax.train.setup import Plan, build_for_mesh, fit_step, plan_run


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
      DivergedError: training goes wrong again and again (`crcjax.train.health`).
      CorruptionError: a step that was computed again had another result (`crcjax.train.recompute`).
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
    group.report_progress(0, "compiling")
    with ledger.account(COMPILE):
        step, budget, micro_batches = fit_step(plan, run)
    start_directory(run, plan, plan.config, micro_batches, group)
    ledger.open([run])
    group.start_heartbeats([run])
    monitor = cluster_monitor(plan.config.monitor, run, group, budget)
    record = Record(plan, run, group, ledger, save_timer(plan.config.train, ledger), cluster_scalars=monitor.scalars)
    every, build = plan.config.health.recompute_every, partial(build_for_mesh, plan, micro_batches)
    take_step = Recomputation(step, build, plan.mesh, every, record.on_event)
    with step_memory_errors(micro_batches), record.logged(), monitor:
        log_plan(plan, budget, micro_batches)
        while True:
            try:
                _train_from_checkpoint(take_step, plan, record, group)
                break
            except WentWrongError as error:
                # The frames of the traceback refer to the state, which would stay on the devices.
                record.go_back(error.with_traceback(None))
        record.finish(plan.model)


def _train_from_checkpoint(take_step: Recomputation, plan: Plan, record: Record, group: ProcessGroup) -> None:
    """Trains from the newest checkpoint to the last step. Raises WentWrongError if the run has to go back."""
    config, run, health, ledger = plan.config, record.run, record.health, record.ledger
    state = record.restored(plan.model)
    start = int(state.step)
    miner = Miner(run, plan.data.training_units, config, state.mining, start)
    health.name_bags(miner.bag_names)
    batches = plan.data.feed.batches(start, miner.memory_folder, health.passed_over)
    # The miner exits before the batches are closed: readers that wait for a period would otherwise never end. An implicit
    # transfer between host and devices would make the devices wait, so JAX raises an error for it.
    with record.opened(start), closing(batches), miner, jax.transfer_guard("disallow"), ledger.account(STEPS):
        group.report_progress(start + 1, READING)
        for number, batch in enumerate(batches, start + 1):
            group.report_progress(number, COMPUTING)
            state, metrics = take_step(number, state, batch)
            health.watch(number, metrics)
            record.metrics.add(metrics)
            batches.follow(metrics["loss"])
            miner.after_step(number, state.mining)
            stops = group.should_stop(number)
            due = due_after(number, config.train, stops, record.timer, group)
            ledger.finished_step(number, batches.waited_s, due.checkpoint)
            if due.replica_check:
                group.check_replicas(number, {"gradient norm": metrics["gradient_norm"], "parameter": state.params})
            if due.health_check:
                health.check_steps(is_last=number == config.train.steps)
            if due.report:
                record.report(number, group.maximum(batches.waited_s))
                group.probe_devices()
            # A stopped run remembers which steps were left out, and goes back if it has to.
            if due.checkpoint and (health.is_good or due.last):
                record.save(number, state, due)
            if stops and number < config.train.steps:
                raise StoppedError(f"{run}: stopped at step {number}; the same command resumes")
            group.report_progress(number + 1, READING)
