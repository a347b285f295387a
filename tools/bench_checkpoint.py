"""What a checkpoint of 200 MB costs: zstd against none, the wait of the loop, slower steps, and the share at the default interval."""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from jax.sharding import SingleDeviceSharding
from record import Row, record

from crcjax.config import get_config
from crcjax.monitor.goodput import Ledger
from crcjax.runs import write_checkpoint
from crcjax.runs.checkpoint import Checkpointer
from crcjax.runs.checkpoint_folder import step_folder
from crcjax.runs.retention import Retention
from crcjax.runs.train_state import TrainState
from crcjax.train.save_interval import save_timer

# Parameters and two moments of AdamW, in float32: 200 MB.
LAYERS, WIDTH = 4, 2041
ROUNDS, STEPS_BEFORE = 3, 10
TARGET_WAIT_S, TARGET_SHARE = 0.2, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to be measured; by default a temporary one")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        step, state = trained_state()
        rows = compression(Path(folder), state)
        rows += seen_by_steps(Path(folder) / "run", step, state)
    about = (
        "What a checkpoint of 200 MB costs: bytes and time with and without zstd, the wait of the loop, and slower steps.\n\n"
        f"* The state is {LAYERS} layers of {WIDTH} units with AdamW's moments after 20 steps on random bags, in float32.\n"
        "* A save hashes the memory, writes, flushes to the disk, drops the file cache, reads back and compares; restoring"
        f" verifies every byte. Medians of {ROUNDS} saves, which alternate between the two forms.\n"
        f"* Seen by the steps: medians of {ROUNDS} saves. A save's cost is the time that the steps from its start to its end took"
        " beyond their number times the median step before, and the wait of the loop. The share is that cost divided by the interval that"
        " `train.checkpoint_minutes` -1 chooses.\n"
        "* The machine's two cores were shared with other programs, so that times are longer than on a machine of its own. The forms of a pair ran"
        " alternately.\n"
        f"* Targets: the loop waits at most {TARGET_WAIT_S} s; the share is below {TARGET_SHARE:.0%}."
    )
    record("checkpoint", "python tools/bench_checkpoint.py", rows, about)


def trained_state() -> tuple[Callable[[TrainState], TrainState], TrainState]:
    """A jitted step, and the state after 20 of them."""
    optimizer = optax.adamw(1e-3)
    keys = jax.random.split(jax.random.key(0), LAYERS)
    layers = {f"layer_{i}": jax.random.normal(key, (WIDTH, WIDTH)) * 0.02 for i, key in enumerate(keys)}

    def loss(layers: dict, bags: jax.Array) -> jax.Array:
        outputs = bags
        for layer in layers.values():
            outputs = jax.nn.relu(outputs @ layer)
        return ((outputs - bags) ** 2).mean()

    def step(state: TrainState) -> TrainState:
        bags = jax.random.normal(jax.random.fold_in(jax.random.key(1), state.step), (64, WIDTH))
        updates, moments = optimizer.update(jax.grad(loss)(state.params, bags), state.moments, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), moments)

    jitted = jax.jit(step, donate_argnums=0)
    # The same layout as what the step returns, so that it compiles once.
    state = jax.device_put(
        TrainState(jnp.int32(0), layers, optimizer.init(layers)), SingleDeviceSharding(jax.devices()[0])
    )
    for _ in range(20):
        state = jitted(state)
    return jitted, jax.block_until_ready(state)


def compression(folder: Path, state: TrainState) -> list[Row]:
    """Bytes on disk, and the seconds of a save and of a restore, with and without zstd."""
    names = {True: "zstd, level 1", False: "no compression"}
    saves: dict[bool, list[float]] = {form: [] for form in names}
    restores: dict[bool, list[float]] = {form: [] for form in names}
    sizes: dict[bool, float] = {}
    default = write_checkpoint.COMPRESSED
    for _ in range(ROUNDS):
        for form in names:
            write_checkpoint.COMPRESSED, run = form, folder / str(form)
            checkpoints = Checkpointer(run)
            checkpoints.save(state, None)
            checkpoints.wait()
            saves[form].append(checkpoints.write_s)
            sizes[form] = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 1e6
            began = time.perf_counter()
            jax.block_until_ready(vars(checkpoints.restore(state)))
            restores[form].append(time.perf_counter() - began)
            checkpoints.close()
            shutil.rmtree(run)
    write_checkpoint.COMPRESSED = default
    state_mb = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 1e6
    rows = [Row("arrays of the state", state_mb, "MB")]
    for measure, unit, values in (
        ("on disk", "MB", sizes),
        ("a save, to its end", "s", {form: statistics.median(seconds) for form, seconds in saves.items()}),
        ("a restore", "s", {form: statistics.median(seconds) for form, seconds in restores.items()}),
    ):
        plain = f"{names[False]}: {measure}"
        rows += [
            Row(plain, values[False], unit),
            Row(f"{names[True]}: {measure}", values[True], unit, values[True] / values[False], plain),
        ]
    return rows


def seen_by_steps(run: Path, step: Callable[[TrainState], TrainState], state: TrainState) -> list[Row]:
    """The wait of the loop for a save, the steps beside it, and its share of the time at the default interval."""
    checkpoints = Checkpointer(run, Retention(newest=1))
    timer = save_timer(get_config().train, Ledger())
    waits, before, during, costs = [], [], [], []
    for _ in range(ROUNDS):
        quiet_s = []
        for _ in range(STEPS_BEFORE):
            state, seconds = timed(step, state)
            quiet_s.append(seconds)
        saved = int(state.step)
        began = time.perf_counter()
        checkpoints.save(state, None)
        waits.append(time.perf_counter() - began)
        saving_s = []
        while not step_folder(run, saved).is_dir():
            state, seconds = timed(step, state)
            saving_s.append(seconds)
        before.append(statistics.median(quiet_s))
        during.append(statistics.median(saving_s))
        costs.append(waits[-1] + sum(saving_s) - len(saving_s) * before[-1])
        timer.saved(saved, waits[-1], checkpoints.write_s)
    checkpoints.close()
    plain = "a step without a save"
    step_s, cost_s = statistics.median(before), statistics.median(costs)
    return [
        Row(
            "wait of the loop for a save, median",
            statistics.median(waits),
            "s",
            statistics.median(waits) / TARGET_WAIT_S,
            "target",
        ),
        Row("wait of the loop for a save, longest", max(waits), "s", max(waits) / TARGET_WAIT_S, "target"),
        Row(plain, step_s * 1e3, "ms"),
        Row("a step beside a save", statistics.median(during) * 1e3, "ms", statistics.median(during) / step_s, plain),
        Row("time that a save costs the steps", cost_s, "s"),
        Row("the default interval", timer.interval_s, "s"),
        Row(
            "share of the time that saving costs",
            cost_s / timer.interval_s * 100,
            "%",
            cost_s / timer.interval_s / TARGET_SHARE,
            "target",
        ),
    ]


def timed(step: Callable[[TrainState], TrainState], state: TrainState) -> tuple[TrainState, float]:
    began = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - began


if __name__ == "__main__":
    main()
