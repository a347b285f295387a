"""How long a step of an ensemble takes over stored features: its members by one step, against one after the other."""

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
SIZES = {"512 regions a bag": (512, 128, 64), "64 regions a bag": (64, 128, 64)}  # regions, features, attention


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
    note = (
        f"Stored features of {WIDTH} float16 numbers (random), 8 bags a step, gated attention, from the page cache. A round is"
        f" {STEPS} steps of all members, bags read and sent by the loader: of one step for all (config.train.ensemble_size), which"
        f" reads them once, or of each member's own, one member after the other, which reads them for each. Medians of {ROUNDS}"
        " rounds of both in turn, compilation not counted. Both compute the same: what is saved is reading, the loader's start,"
        " which is counted, and the cost of starting operations; the figures do not tell these apart."
    )
    record("ensemble", "python tools/bench_ensemble.py", rows, note)


def compared(config: ConfigDict, members: int, name: str) -> list[Row]:
    """Seconds per step of all members, by one step and by one after the other."""
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
    joint = ensemble.join(init_state(model(seed), optimizer, config, mesh) for seed in seeds)
    joint_step, alone = (
        ensemble.build(seeds, config),
        [init_state(model(seed), optimizer, config, mesh) for seed in seeds],
    )
    step = build_step(model(0), optimizer, config, mesh)  # of one seed for all: their dropout is not compared
    joint, alone[0] = run(joint_step, joint), run(step, alone[0])
    together_s, apart_s = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        joint = run(joint_step, joint)
        between = time.perf_counter()
        alone = [run(step, state) for state in alone]
        together_s.append((between - start) / STEPS)
        apart_s.append((time.perf_counter() - between) / STEPS)
    one, other = statistics.median(together_s), statistics.median(apart_s)
    of = f"{name}, {members} member{'s' if members > 1 else ''}"
    return [
        Row(f"{of}: one after the other", 1e3 * other, "ms/step"),
        Row(f"{of}: together", 1e3 * one, "ms/step", one / other, "one after the other"),
    ]


if __name__ == "__main__":
    main()
