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
from crcjax.data.hard_mining import Board, Memory, Mining, mined_regions
from crcjax.data.sampler import sampler_of
from crcjax.data.sampling import mined_places
from crcjax.errors import writing


class Miner:
    """Lays the memory out for the loader while a run trains, and logs what it is mined for; a context manager.

    RUN/mined.jsonl has a line a period: its first step, how often each slide is mined in it, and the regions that slides
    were misclassified are shown again. Raises OutputError if the run cannot be written.
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
        memory = jax.device_get(memory)
        self.board.publish(period, memory)
        first, ids = period * self.every, [row.slide_id for row in self._cohort.rows]
        steps = range(first, min(first + self.every, self._config.train.steps))
        if not len(steps) or jax.process_index():
            return
        share = self._config.data.mine_slides if (memory.loss >= 0).any() else 0.0
        mined: Counter[str] = Counter()
        for step in steps:
            places = mined_places(step, self._config.data.batch_size, share)
            mined.update(ids[slide] for slide in self._sampler.slides(step)[places])
        count = mined_regions(self._config.data)
        wrong = np.flatnonzero(memory.wrong) if count else ()
        regions = {ids[slide]: [int(at) for at in memory.region[slide, :count] if at >= 0] for slide in wrong}
        self._write("a", json.dumps({"first_step": first, "slides": dict(mined), "regions": regions}) + "\n")

    def _write(self, mode: str, text: str) -> None:
        if jax.process_index():
            return
        with writing(self._log, "choose another --workdir"), open(self._log, mode) as file:
            file.write(text)
