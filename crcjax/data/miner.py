"""Publishes the memory of hard mining to the loader while a run trains."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from ml_collections import ConfigDict

from crcjax.data.cohort import Cohort
from crcjax.data.hard_mining import Memory, MemoryFolder, Mining, mined_regions
from crcjax.data.sampler import sampler_of
from crcjax.data.sampling import mined_places
from crcjax.errors import writing


class Miner:
    """Publishes the mining memory to the loader while a run trains, and logs the mined slides; a context manager.

    RUN/mined.jsonl has one line per period: its first step, how often each slide is mined, and the regions of misclassified
    slides that are shown again. Raises OutputError if the run directory cannot be written.
    """

    def __init__(self, run: Path, cohort: Cohort, config: ConfigDict, mining: Mining | None, start: int):
        self.memory_folder: MemoryFolder | None = None
        self._config, self._cohort, self._log = config, cohort, run / "mined.jsonl"
        if mining is None:
            self._sampler = sampler_of(cohort, config, None)
            return
        self._folder = tempfile.TemporaryDirectory(prefix="crcjax-mining-")
        self.memory_folder = MemoryFolder(Path(self._folder.name))
        self._sampler = sampler_of(cohort, config, self.memory_folder)
        period = start // config.data.mine_every
        # A killed run may have logged this period already; these lines are written again.
        lines = self._log.read_text().splitlines(keepends=True) if self._log.exists() else []
        earlier_lines = [
            line for line in lines if line.endswith("\n") and json.loads(line)["first_step"] < period * self.every
        ]
        self._write("w", "".join(earlier_lines))
        self._publish(period, mining.used)
        self._publish(period + 1, mining.next)

    @property
    def every(self) -> int:
        """Steps of a period."""
        return self._config.data.mine_every

    def __enter__(self) -> Miner:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.memory_folder:
            # A loader that waits for a period notices that the folder is gone.
            self._folder.cleanup()

    def after_step(self, step: int, mining: Mining | None) -> None:
        """Publishes the next memory where a period ends; call it after every step (counted from 1) with the new state's."""
        if mining is not None and step % self.every == 0:
            self._publish(step // self.every + 1, mining.next)

    def bag_names(self, step: int) -> list[str]:
        """The slides, or with config.data.unit "case" the cases, of the bags of a step (counted from 1)."""
        rows = [self._cohort.rows[slide] for slide in self._sampler.slides(step - 1)]
        return [row.case_id if self._config.data.unit == "case" else row.slide_id for row in rows]

    def _publish(self, period: int, memory: Memory) -> None:
        assert self.memory_folder
        memory = jax.device_get(memory)
        self.memory_folder.publish(period, memory)
        first_step = period * self.every
        steps = range(first_step, min(first_step + self.every, self._config.train.steps))
        if not len(steps) or jax.process_index():
            return
        slide_ids = [row.slide_id for row in self._cohort.rows]
        fraction = self._config.data.mine_slides if (memory.loss >= 0).any() else 0.0
        mined_count: Counter[str] = Counter()
        for step in steps:
            places = mined_places(step, self._config.data.batch_size, fraction)
            mined_count.update(slide_ids[slide] for slide in self._sampler.slides(step)[places])
        count = mined_regions(self._config.data)
        misclassified = np.flatnonzero(memory.wrong) if count else ()
        regions = {
            slide_ids[slide]: [int(region) for region in memory.region[slide, :count] if region >= 0]
            for slide in misclassified
        }
        self._write("a", json.dumps({"first_step": first_step, "slides": dict(mined_count), "regions": regions}) + "\n")

    def _write(self, mode: str, text: str) -> None:
        if jax.process_index():
            return
        with writing(self._log, "choose another --workdir"), open(self._log, mode) as file:
            file.write(text)
