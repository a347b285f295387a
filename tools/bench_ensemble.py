"""The time of an ensemble's step over stored features: all members in one vmapped step, or one member after the other."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from bench_feed import WIDTH, bench_config, feature_store
from ml_collections import ConfigDict
from record import Row, record

from crcjax.data.cohort import load_cohort
from crcjax.data.loader import train_batches
from crcjax.models.mil import build_model
from crcjax.parallel.mesh import device_mesh
from crcjax.runs.train_state import TrainState
from crcjax.train.ensemble import Ensemble
from crcjax.train.optimizer import build_optimizer
from crcjax.train.step import build_step, init_state

MEMBERS, STEPS, ROUNDS = (1, 5, 10), 8, 3
# The regions per bag, features and attention units of each size.
SIZES = {"512 regions per bag": (512, 128, 64), "64 regions per bag": (64, 128, 64)}


def main() -> None:
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        feature_store(Path(temporary))
        for name, (regions, features, attention) in SIZES.items():
            config = bench_config("features", Path(temporary))
            config.data.regions_per_bag, config.model.features, config.model.attention = regions, features, attention
            config.model.imported_features, config.data.sampling_seed = WIDTH, 0
            for members in MEMBERS:
                rows += compared(config, members, name)
    about = (
        "One training step of an ensemble over stored features: all members in one vmapped step, compared with one member after"
        " the other.\n\n"
        f"* Random features of {WIDTH} float16 numbers, 8 bags per step, gated attention, everything from the page cache.\n"
        f"* A round is {STEPS} steps of all members; the loader reads the bags and sends them to the device. The vmapped step"
        " (`config.train.ensemble_size`) reads them once; members that train one after the other each read them.\n"
        f"* Medians of {ROUNDS} rounds, which alternate between the two ways. Compilation is not counted.\n"
        "* Both ways compute the same. The vmapped step saves reading, the start of the loader, which is counted, and the cost of"
        " starting operations. The figures do not separate these."
    )
    record("ensemble", "python tools/bench_ensemble.py", rows, about)


def compared(config: ConfigDict, members: int, name: str) -> list[Row]:
    """The time of a step of all members in both ways, at one size."""
    seeds = tuple(range(members))
    mesh, model = device_mesh(config), partial(build_model, config.model, len(config.data.classes))
    optimizer = build_optimizer(config.optimizer, config.train.steps)
    config.train.steps = STEPS
    cohort = load_cohort(config.data.cohort, config.data.classes).split("train")

    def run(step: Callable, state: TrainState) -> TrainState:
        batches = train_batches(cohort, config, mesh, 0)
        for bag in batches:
            state, metrics = step(state, bag)
            batches.follow(metrics["loss"])
        batches.close()
        return jax.block_until_ready(state)

    ensemble = Ensemble(partial(model, 0), optimizer, config, mesh)
    joint_state = ensemble.join(init_state(model(seed), optimizer, config, mesh) for seed in seeds)
    joint_step = ensemble.build(seeds, config)
    states = [init_state(model(seed), optimizer, config, mesh) for seed in seeds]
    # One step function serves all seeds, because their dropout is not compared.
    step = build_step(model(0), optimizer, config, mesh)
    joint_state, states[0] = run(joint_step, joint_state), run(step, states[0])
    vmapped_s, sequential_s = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        joint_state = run(joint_step, joint_state)
        between = time.perf_counter()
        states = [run(step, state) for state in states]
        vmapped_s.append((between - start) / STEPS)
        sequential_s.append((time.perf_counter() - between) / STEPS)
    vmapped, sequential = statistics.median(vmapped_s), statistics.median(sequential_s)
    case = f"{name}, {members} member{'s' if members > 1 else ''}"
    return [
        Row(f"{case}: one after the other", 1e3 * sequential, "ms/step"),
        Row(f"{case}: vmapped", 1e3 * vmapped, "ms/step", vmapped / sequential, "one after the other"),
    ]


if __name__ == "__main__":
    main()
