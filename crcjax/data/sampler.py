"""The sampler: chooses the slides and regions of every training step."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int
from ml_collections import ConfigDict

from crcjax.data.bags import label_of
from crcjax.data.case_bags import CaseStore
from crcjax.data.cohort import Cohort
from crcjax.data.hard_mining import Memory, MemoryFolder, mined_regions
from crcjax.data.sampling import sample_regions, sample_slides, spread_cells
from crcjax.errors import InputError
from crcjax.slides.store.tile_store import TileStore
from crcjax.slides.tiling.quality_control import QUALITY_NAMES


@dataclass(frozen=True)
class Sampler:
    """Samples the training slides; each reader process has a copy.

    Attributes:
      labels: class index of each slide.
      sites: site index of each slide; None if sites do not take turns.
      seed: the seed of all samples.
      config: config.data.
      memory_folder: where the mining memory is published; None without hard mining.
      cells: a cache of `spread_cells` by slide, for region_sampling "spread".
    """

    labels: Int[np.ndarray, " slide"]
    sites: Int[np.ndarray, " slide"] | None
    seed: int
    config: ConfigDict
    memory_folder: MemoryFolder | None
    cells: dict[int, np.ndarray] = field(default_factory=dict)

    def memory(self, step: int) -> Memory | None:
        """Returns the mining memory that a step is sampled by; waits until it is published."""
        return self.memory_folder.memory(step // self.config.mine_every) if self.memory_folder else None

    def slides(self, step: int) -> Int[np.ndarray, " bag"]:
        """The index of each bag's slide in a step."""
        memory, config = self.memory(step), self.config
        losses, mined_fraction = (memory.loss, config.mine_slides) if memory else (None, 0.0)
        return sample_slides(
            self.labels,
            self.seed,
            step,
            config.batch_size,
            sites=self.sites,
            losses=losses,
            mined_fraction=mined_fraction,
        )

    def regions(self, step: int, bag: int, slide: int, store: TileStore | CaseStore) -> Int[np.ndarray, " sampled"]:
        """The store indices of the regions of a bag, which shows `slide` in this step."""
        memory, config = self.memory(step), self.config
        mined = memory.region[slide, : mined_regions(config)] if memory and memory.wrong[slide] else None
        cells = tissue = None
        if config.region_sampling == "spread":
            if slide not in self.cells:
                self.cells[slide] = spread_cells(store.mask, store.origin, config.regions_per_bag)
            cells = self.cells[slide]
            tissue = (store.quality[..., QUALITY_NAMES.index("tissue")] * store.mask).max(axis=1)
        return sample_regions(
            store.mask, self.seed, step, bag, config.regions_per_bag, cells=cells, tissue=tissue, mined=mined
        )


def sampler_of(cohort: Cohort, config: ConfigDict, memory_folder: MemoryFolder | None) -> Sampler:
    """The sampler of a cohort's training slides by `config` (the whole config).

    Raises InputError for a slide without a label or, with config.data.by_site, without a site.
    """
    data = config.data
    labels = np.array([label_of(row, cohort.classes) for row in cohort.rows])
    seed = config.seed if data.sampling_seed < 0 else data.sampling_seed
    if not data.by_site:
        return Sampler(labels, None, seed, data, memory_folder)
    without_site = next((row.slide_id for row in cohort.rows if row.site is None), None)
    if without_site:
        raise InputError(
            f"slide {without_site} of the cohort has no site; fill it in, or set config.data.by_site to False"
        )
    _, sites = np.unique([row.site for row in cohort.rows], return_inverse=True)
    return Sampler(labels, sites, seed, data, memory_folder)
