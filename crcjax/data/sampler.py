"""Which slides and regions every training step sees."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from crcjax.data.bags import label_of
from crcjax.data.case_bags import CaseStore
from crcjax.data.cohort import Cohort
from crcjax.data.hard_mining import Board, Memory, mined_regions
from crcjax.data.sampling import draw_regions, draw_slides, spread_cells
from crcjax.errors import InputError
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.quality_control import QUALITY_NAMES


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
        """Returns the mining memory that a step is sampled by; waits until it is published."""
        return self.board.memory(step // self.config.mine_every) if self.board else None

    def slides(self, step: int) -> Int[np.ndarray, " bag"]:
        memory, config = self.memory(step), self.config
        losses, share = (memory.loss, config.mine_slides) if memory else (None, 0.0)
        return draw_slides(
            self.labels, self.seed, step, config.batch_size, sites=self.sites, losses=losses, mined_share=share
        )

    def regions(self, step: int, bag: int, slide: int, store: TileStore | CaseStore) -> Int[np.ndarray, " drawn"]:
        memory, config = self.memory(step), self.config
        mined = memory.region[slide, : mined_regions(config)] if memory and memory.wrong[slide] else None
        cells = tissue = None
        if config.region_sampling == "spread":
            if slide not in self.cells:
                self.cells[slide] = spread_cells(store.mask, store.origin, config.regions_per_bag)
            cells = self.cells[slide]
            tissue = (store.quality[..., QUALITY_NAMES.index("tissue")] * store.mask).max(axis=1)
        return draw_regions(
            store.mask, self.seed, step, bag, config.regions_per_bag, cells=cells, tissue=tissue, mined=mined
        )


def sampler_of(cohort: Cohort, config: ConfigDict, board: Board | None) -> Sampler:
    """The sampler of training slides. Raises InputError: no subtype, no site where sites take turns."""
    data = config.data
    labels = np.array([label_of(row, cohort.classes) for row in cohort.rows])
    seed = config.seed if data.sampling_seed < 0 else data.sampling_seed
    if not data.by_site:
        return Sampler(labels, None, seed, data, board)
    nowhere = next((row.slide_id for row in cohort.rows if row.site is None), None)
    if nowhere:
        raise InputError(f"slide {nowhere} of the cohort has no site; fill it in, or set config.data.by_site to False")
    _, sites = np.unique([row.site for row in cohort.rows], return_inverse=True)
    return Sampler(labels, sites, seed, data, board)
