"""What training remembers of its slides, so that sampling returns to what was hard; kept in the training state.

The loader is ahead of the device. So that what it draws depends neither on how far, nor on when a run was killed, it draws
a period of `config.data.mine_every` steps by the memory as it was when the period before began, which it waits for.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from crcjax.data.bags import label_of
from crcjax.data.case_bags import CaseStore
from crcjax.data.cohort import Cohort
from crcjax.data.sampling import draw_regions, draw_slides, mined_places, spread_cells
from crcjax.errors import InputError, OutputError
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.quality_control import QUALITY_NAMES

MOST = 0.3  # of what a step sees: more, and it learns the errors of its labels
_KEPT = 0.7  # of a slide's running loss, when it is seen again
REGION_DRAWS = ("uniform", "spread")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """Of every training slide, in the cohort's order, when it was last seen.

    `loss` is running (nats; -1 if never seen), `wrong` whether it was called wrongly, `region` the regions of highest
    attention (store indices, -1 for none).
    """

    loss: Any  # Float32[Array, " slide"]; in an abstract state its shape
    wrong: Any  # Bool[Array, " slide"]
    region: Any  # Int[Array, "slide mined"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mining:
    """The memory by which this period is drawn, that of the next, and the present one."""

    used: Memory
    next: Memory
    live: Memory


def start_mining(config: ConfigDict, slides: int) -> Mining | None:
    """The memory before the first step, by `config` (config.data); None if nothing is mined. Raises InputError."""
    for name in ("mine_slides", "mine_regions"):
        if not 0 <= config[name] <= MOST:
            raise InputError(f"config.data.{name} {config[name]}: choose from 0 to {MOST}")
    if config.mine_every < 1:
        raise InputError(f"config.data.mine_every {config.mine_every}: choose 1 or more steps")
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
    return int(config.mine_regions * config.regions + 1e-9)


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
    seen = last >= 0
    mean = jnp.where(here, loss, 0.0).sum(axis=1) / jnp.maximum(here.sum(axis=1), 1)
    running = jnp.where(memory.loss < 0, mean, _KEPT * memory.loss + (1 - _KEPT) * mean)
    _, place = jax.lax.top_k(jnp.where(region >= 0, attention, -1.0), mined)
    best = jnp.take_along_axis(region, place, axis=1)
    return Memory(
        jnp.where(seen, running, memory.loss),
        jnp.where(seen, wrong[last], memory.wrong),
        jnp.where(seen[:, None], best[last], memory.region),
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
        found = self._read.get(period)
        if found is None:
            path = self._folder / f"{period}.npz"
            while not path.exists():
                if not self._folder.exists():
                    raise InputError(f"{path}: training ended before this period was reached; start it again")
                time.sleep(0.002)
            with np.load(path) as file:
                found = Memory(file["loss"], file["wrong"], file["region"])
            self._read = {period - 1: self._read.get(period - 1), period: found}
        return found


@dataclass(frozen=True)
class Sampler:
    """What every step sees of the training slides, by `config` (config.data); each worker has a copy of it."""

    labels: Int[np.ndarray, " slide"]
    sites: Int[np.ndarray, " slide"] | None
    seed: int
    config: ConfigDict
    board: Board | None  # None if nothing is mined
    cells: dict[int, np.ndarray] = field(default_factory=dict)  # of slides that were drawn, where regions are spread

    def memory(self, step: int) -> Memory | None:
        """What a step is drawn by, waited for."""
        return self.board.memory(step // self.config.mine_every) if self.board else None

    def slides(self, step: int) -> Int[np.ndarray, " bag"]:
        memory, config = self.memory(step), self.config
        losses, share = (memory.loss, config.mine_slides) if memory else (None, 0.0)
        return draw_slides(
            self.labels, self.seed, step, config.bags, sites=self.sites, losses=losses, mined_share=share
        )

    def regions(self, step: int, bag: int, slide: int, store: TileStore | CaseStore) -> Int[np.ndarray, " drawn"]:
        memory, config = self.memory(step), self.config
        mined = memory.region[slide, : mined_regions(config)] if memory and memory.wrong[slide] else None
        cells = tissue = None
        if config.region_draw == "spread":
            if slide not in self.cells:
                self.cells[slide] = spread_cells(store.mask, store.origin, config.regions)
            cells = self.cells[slide]
            tissue = (store.quality[..., QUALITY_NAMES.index("tissue")] * store.mask).max(axis=1)
        return draw_regions(store.mask, self.seed, step, bag, config.regions, cells=cells, tissue=tissue, mined=mined)


def sampler_of(cohort: Cohort, config: ConfigDict, board: Board | None) -> Sampler:
    """The sampler of training slides. Raises InputError: no subtype, no site where sites take turns, unknown draws."""
    data = config.data
    if data.region_draw not in REGION_DRAWS:
        raise InputError(f"config.data.region_draw {data.region_draw!r}: choose one of {', '.join(REGION_DRAWS)}")
    labels = np.array([label_of(row, cohort.classes) for row in cohort.rows])
    seed = config.seed if data.draw_seed < 0 else data.draw_seed
    if not data.by_site:
        return Sampler(labels, None, seed, data, board)
    nowhere = next((row.slide_id for row in cohort.rows if row.site is None), None)
    if nowhere:
        raise InputError(f"slide {nowhere} of the cohort has no site; fill it in, or set config.data.by_site to False")
    _, sites = np.unique([row.site for row in cohort.rows], return_inverse=True)
    return Sampler(labels, sites, seed, data, board)


class Miner:
    """Lays the memory out for the loader while a run trains, and logs what it is mined for; a context manager.

    RUN/mined.jsonl has a line a period: its first step, how often each slide is mined in it, and the regions that slides
    called wrongly are shown again. Raises OutputError if the run cannot be written.
    """

    def __init__(self, run: Path, cohort: Cohort, config: ConfigDict, mining: Mining | None, start: int):
        self.board: Board | None = None
        if mining is None:
            return
        self._folder = tempfile.TemporaryDirectory(prefix="crcjax-mining-")
        self.board = Board(Path(self._folder.name))
        self._config, self._cohort, self._log = config, cohort, run / "mined.jsonl"
        self._sampler = sampler_of(cohort, config, self.board)
        period = start // config.data.mine_every
        # What a killed run had logged of this period and later, is logged again.
        lines = self._log.read_text().splitlines(keepends=True) if self._log.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["first_step"] < period * self.every]
        self._write("w", "".join(kept))
        self._publish(period, mining.used)
        self._publish(period + 1, mining.next)

    @property
    def every(self) -> int:
        return self._config.data.mine_every

    def __enter__(self) -> Miner:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.board:
            self._folder.cleanup()  # whoever waits for a period sees that none will come

    def after(self, number: int, mining: Mining | None) -> None:
        """To be called after every step, with its number from 1 and the state's mining."""
        if mining is not None and number % self.every == 0:
            self._publish(number // self.every + 1, mining.next)

    def _publish(self, period: int, memory: Memory) -> None:
        assert self.board
        memory = jax.tree.map(np.asarray, memory)
        self.board.publish(period, memory)
        first, ids = period * self.every, [row.slide_id for row in self._cohort.rows]
        steps = range(first, min(first + self.every, self._config.train.steps))
        if not len(steps) or jax.process_index():
            return
        share = self._config.data.mine_slides if (memory.loss >= 0).any() else 0.0
        mined: Counter[str] = Counter()
        for step in steps:
            places = mined_places(step, self._config.data.bags, share)
            mined.update(ids[slide] for slide in self._sampler.slides(step)[places])
        count = mined_regions(self._config.data)
        wrong = np.flatnonzero(memory.wrong) if count else ()
        regions = {ids[slide]: [int(at) for at in memory.region[slide, :count] if at >= 0] for slide in wrong}
        self._write("a", json.dumps({"first_step": first, "slides": dict(mined), "regions": regions}) + "\n")

    def _write(self, mode: str, text: str) -> None:
        if jax.process_index():
            return
        try:
            with open(self._log, mode) as file:
                file.write(text)
        except OSError as error:
            raise OutputError(
                f"{self._log}: cannot be written ({error.strerror}); free space, then start again"
            ) from error
