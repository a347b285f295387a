"""Hard mining: losses and attention of the training slides, by which sampling returns to hard slides and regions.

The memory is part of the training state. The loader samples ahead of the device; its samples must depend neither on how far
ahead it is nor on when a run was killed. It therefore samples a period of `config.data.mine_every` steps by the memory from
the beginning of the period before, and waits for that memory.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from crcjax.errors import InputError

# Weight of the old running loss of a slide when the slide is sampled again.
_DECAY = 0.7


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """The last results of every training slide, in the cohort's order.

    Attributes:
      loss: running loss in nats; -1 for a slide that was never sampled.
      wrong: whether the slide was misclassified.
      region: store indices of the regions of highest attention; -1 for none.
    """

    loss: Any  # Float32[Array, " slide"]; in an abstract state its shape
    wrong: Any  # Bool[Array, " slide"]
    region: Any  # Int[Array, "slide mined"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mining:
    """The memory that this period is sampled by, that of the next period, and the current one."""

    used: Memory
    next: Memory
    live: Memory


def start_mining(config: ConfigDict, slides: int) -> Mining | None:
    """The memory before the first step, by `config` (config.data); None if nothing is mined."""
    if not (config.mine_slides or config.mine_regions):
        return None
    regions = max(1, mined_regions(config))  # checkpoints hold no empty arrays
    memory = [
        Memory(jnp.full(slides, -1.0), jnp.zeros(slides, bool), jnp.full((slides, regions), -1, jnp.int32))
        for _ in fields(Mining)
    ]
    return Mining(*memory)


def mined_regions(config: ConfigDict) -> int:
    """How many of a bag's regions may be mined, by `config` (config.data)."""
    return int(config.mine_regions * config.regions_per_bag + 1e-9)


def after_step(
    mining: Mining,
    step: Int[Array, ""],
    every: int,
    slide: Int[Array, " batch"],
    region: Int[Array, "batch region"],
    loss: Float[Array, " batch"],
    wrong: Bool[Array, " batch"],
    attention: Float[Array, "batch region"],
) -> Mining:
    """The memory after the step that made `step` of them; at every `every`-th a new period begins."""
    live = remember(mining.live, slide, region, loss, wrong, attention)
    turns = step % every == 0

    def turned(new: Array, old: Array) -> Array:
        return jnp.where(turns, new, old)

    return Mining(jax.tree.map(turned, mining.next, mining.used), jax.tree.map(turned, live, mining.next), live)


def remember(
    memory: Memory,
    slide: Int[Array, " batch"],
    region: Int[Array, "batch region"],
    loss: Float[Array, " batch"],
    wrong: Bool[Array, " batch"],
    attention: Float[Array, "batch region"],
) -> Memory:
    """The memory with what a step saw: a slide's loss is averaged, the rest is that of its last bag."""
    slides, mined = memory.region.shape
    # Sums and maxima over all bags, not scatters: those would take a doubled slide's bags in any order on a GPU.
    here = slide[None] == jnp.arange(slides)[:, None]
    last = jnp.where(here, jnp.arange(len(slide)), -1).max(axis=1)
    observed = last >= 0
    mean = jnp.where(here, loss, 0.0).sum(axis=1) / jnp.maximum(here.sum(axis=1), 1)
    running = jnp.where(memory.loss < 0, mean, _DECAY * memory.loss + (1 - _DECAY) * mean)
    _, place = jax.lax.top_k(jnp.where(region >= 0, attention, -1.0), mined)
    best = jnp.take_along_axis(region, place, axis=1)
    return Memory(
        jnp.where(observed, running, memory.loss),
        jnp.where(observed, wrong[last], memory.wrong),
        jnp.where(observed[:, None], best[last], memory.region),
    )


class Board:
    """A folder in which the loop lays each period's memory, for loaders in any thread or process."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[int, Memory | None] = {}

    def publish(self, period: int, memory: Memory) -> None:
        partial = self._folder / f".{period}.npz"
        np.savez(partial, loss=memory.loss, wrong=memory.wrong, region=memory.region)
        partial.rename(self._folder / f"{period}.npz")

    def memory(self, period: int) -> Memory:
        """The memory of a period, waited for. Raises InputError if the run ends before."""
        memory = self._read.get(period)
        if memory is None:
            path = self._folder / f"{period}.npz"
            while not path.exists():
                if not self._folder.exists():
                    raise InputError(f"{path}: training ended before this period was reached; start it again")
                time.sleep(0.002)
            with np.load(path) as file:
                memory = Memory(file["loss"], file["wrong"], file["region"])
            self._read = {period - 1: self._read.get(period - 1), period: memory}
        return memory
