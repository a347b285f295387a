"""Hard mining: sampling hard slides and regions more often, by the losses and attention of earlier steps.

The memory of losses and attention is part of the training state. The loader reads ahead of the step, and its samples must
depend neither on how far ahead it reads nor on when a run was killed. Steps are therefore grouped into periods of
`config.data.mine_every` steps. The loader samples a period by the memory from the start of the previous period, and waits
until that memory is published.
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

# Weight of a slide's previous running loss when the slide is sampled again.
_DECAY = 0.7


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """The latest results of every training slide, in the cohort's order.

    Fields are arrays, or their shapes in an abstract state. Checkpoints contain their names.

    Attributes:
      loss: [slide] running loss in nats; -1 for a slide that was never sampled.
      wrong: [slide] whether the slide was misclassified when it was last sampled.
      region: [slide, mined] store indices of the slide's regions of highest attention; -1 for none.
    """

    loss: Any
    wrong: Any
    region: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mining:
    """Three memories; checkpoints contain the names of the fields.

    Attributes:
      used: the memory that the current period is sampled by.
      next: the memory that the next period is sampled by.
      live: the memory after the latest step.
    """

    used: Memory
    next: Memory
    live: Memory


def start_mining(config: ConfigDict, slides: int) -> Mining | None:
    """The memories before the first step, for a number of training slides; None if `config` (config.data) mines nothing."""
    if not (config.mine_slides or config.mine_regions):
        return None
    # At least one region: Orbax cannot save empty arrays.
    regions = max(1, mined_regions(config))
    memories = [
        Memory(jnp.full(slides, -1.0), jnp.zeros(slides, bool), jnp.full((slides, regions), -1, jnp.int32))
        for _ in fields(Mining)
    ]
    return Mining(*memories)


def mined_regions(config: ConfigDict) -> int:
    """The number of mined regions in the bag of a misclassified slide, by `config` (config.data)."""
    # The small number corrects products such as 0.29 x 100, which is 28.999… in floating point.
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
    """Updates the memories after a step.

    Args:
      mining: the memories before the step.
      step: the number of finished steps, this one included. A new period starts after every `every` steps.
      every: config.data.mine_every.
      slide, region, loss, wrong, attention: the results of the step's bags, as in `remember`.
    """
    live = remember(mining.live, slide, region, loss, wrong, attention)
    period_ends = step % every == 0

    def select(new: Array, old: Array) -> Array:
        return jnp.where(period_ends, new, old)

    return Mining(jax.tree.map(select, mining.next, mining.used), jax.tree.map(select, live, mining.next), live)


def remember(
    memory: Memory,
    slide: Int[Array, " batch"],
    region: Int[Array, "batch region"],
    loss: Float[Array, " batch"],
    wrong: Bool[Array, " batch"],
    attention: Float[Array, "batch region"],
) -> Memory:
    """Adds the results of a step's bags to a memory.

    The running loss takes the mean over a slide's bags; the other fields take the slide's last bag.

    Args:
      memory: the memory before the step.
      slide: each bag's index among the training slides.
      region: store indices of each bag's regions; -1 for padding.
      loss: each bag's loss, in nats.
      wrong: whether each bag was misclassified.
      attention: attention of each region.
    """
    slides, mined = memory.region.shape
    # Sums and maxima over all bags: on a GPU, a scatter would take the bags of a slide in no fixed order.
    is_bag_of_slide = slide[None] == jnp.arange(slides)[:, None]
    last_bag = jnp.where(is_bag_of_slide, jnp.arange(len(slide)), -1).max(axis=1)
    is_sampled = last_bag >= 0
    mean_loss = jnp.where(is_bag_of_slide, loss, 0.0).sum(axis=1) / jnp.maximum(is_bag_of_slide.sum(axis=1), 1)
    running_loss = jnp.where(memory.loss < 0, mean_loss, _DECAY * memory.loss + (1 - _DECAY) * mean_loss)
    _, places = jax.lax.top_k(jnp.where(region >= 0, attention, -1.0), mined)
    attended_regions = jnp.take_along_axis(region, places, axis=1)
    return Memory(
        jnp.where(is_sampled, running_loss, memory.loss),
        jnp.where(is_sampled, wrong[last_bag], memory.wrong),
        jnp.where(is_sampled[:, None], attended_regions[last_bag], memory.region),
    )


class MemoryFolder:
    """A folder through which the training loop passes each period's memory to loaders in other threads and processes."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._read: dict[int, Memory | None] = {}

    def publish(self, period: int, memory: Memory) -> None:
        """Writes the memory of a period, on the host; the file appears when it is complete."""
        partial = self._folder / f".{period}.npz"
        np.savez(partial, loss=memory.loss, wrong=memory.wrong, region=memory.region)
        partial.rename(self._folder / f"{period}.npz")

    def memory(self, period: int) -> Memory:
        """Waits for the memory of a period and returns it. Raises InputError if training ends first."""
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
