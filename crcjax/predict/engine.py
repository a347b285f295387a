"""Predicts many slides at once: some are opened and decoded while the device encodes regions of others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jaxtyping import UInt8

from crcjax.errors import SlideError
from crcjax.predict.heatmap import LONGEST_PX
from crcjax.predict.predictor import EncodedSlide, Predictor, SlideEncoding
from crcjax.predict.region_encoder import Shard, encode_regions
from crcjax.slides.jobs.ranked_threads import RankedThreads
from crcjax.slides.store.tile_pixels import shard_regions
from crcjax.slides.tiling.plan import TilePlan
from crcjax.slides.wsi.slide import SlideInfo, open_slide

# Seconds without a new region after which the regions at hand are encoded in a chunk that is not full.
_IDLE_S = 0.5
# The share of the available memory that slides in work may use by default.
_MEMORY_SHARE = 0.5
# Decoded shards that wait for the encoder.
_QUEUED_SHARDS = 2
_STOP_CHECK_S = 0.2


@dataclass(frozen=True)
class SlideSource:
    """Where a slide's pixels are.

    Attributes:
      path: the slide file or DICOM folder.
      mpp: µm per level-0 px, in place of the value in the file.
      fallback_mpp: µm per level-0 px for a file that states none.
    """

    path: Path
    mpp: float | None = None
    fallback_mpp: float | None = None


@dataclass
class SlideInWork:
    """A slide on its way through the engine; at the end it has either `encoded`, `info` and `thumbnail`, or `error`.

    Attributes:
      bag: the number of its bag.
      source: its file.
      rank: its place in the order in which slides are decoded.
      error: why it cannot be predicted.
      begun: the time (monotonic, s) at which it was opened.
      encoding: its features so far; None before it was planned and after it was finished.
      was_read: whether its last region was decoded, or it failed.
    """

    bag: int
    source: SlideSource
    rank: int
    error: Exception | None = None
    begun: float = 0.0
    info: SlideInfo | None = None
    thumbnail: UInt8[np.ndarray, "y x 3"] | None = None
    encoded: EncodedSlide | None = None
    encoding: SlideEncoding | None = None
    was_read: bool = False


class Engine:
    """Reads and encodes the slides of many bags, overlapped: bags come out as soon as all their slides are encoded.

    Slides are opened in the order of their bags by a few threads. Their regions are decoded by one pool of threads, the
    earliest slide first, and encoded in chunks that are filled across slides, so that neither the cores nor the device wait at
    the end of a slide. A slide is begun only when its estimated memory, with that of the slides in work, is within the limit;
    slides of the earliest bag that is not finished are always begun.

    Args:
      predictor: the models.
      threads: threads that decode tiles.
      memory_bytes: the limit for the slides in work, without the models; by default half of the memory that is available.
    """

    def __init__(self, predictor: Predictor, threads: int, memory_bytes: int | None = None):
        self._predictor, self._threads = predictor, threads
        self._memory_bytes = memory_bytes or int(psutil.virtual_memory().available * _MEMORY_SHARE)

    def bags(self, bags: Sequence[Sequence[SlideSource]]) -> Generator[tuple[int, list[SlideInWork]]]:
        """Yields the number and the slides of each bag once they are encoded or have failed.

        Raises an error that is not of a slide. Closing the generator stops all threads.
        """
        work = _Work(self._predictor, bags, self._threads, self._memory_bytes)
        with RankedThreads(self._threads) as decoders, ThreadPoolExecutor(self._threads + 1, "slide") as readers:
            encoder = threading.Thread(target=work.encode, name="encoder", daemon=True)
            encoder.start()
            try:
                for slide in work.slides:
                    readers.submit(work.read, slide, decoders)
                for _ in bags:
                    finished = work.finished.get()
                    if isinstance(finished, BaseException):
                        raise finished
                    yield finished, work.slides_of[finished]
                    work.release(finished)
            finally:
                work.stopped.set()
                readers.shutdown(cancel_futures=True)
                encoder.join()


class _Stopped(Exception):
    """The engine was closed while a thread waited."""


class _Work:
    """The slides and queues of one call of `Engine.bags`, which all its threads use."""

    def __init__(self, predictor: Predictor, bags: Sequence[Sequence[SlideSource]], threads: int, memory_bytes: int):
        self._predictor, self._threads = predictor, threads
        ranks = iter(range(sum(map(len, bags))))
        self.slides_of = [
            [SlideInWork(number, source, next(ranks)) for source in bag] for number, bag in enumerate(bags)
        ]
        self.slides = [slide for bag in self.slides_of for slide in bag]
        self._shards: queue.Queue[Shard[SlideInWork] | SlideInWork] = queue.Queue(_QUEUED_SHARDS)
        # Numbers of bags, or an error that ends the prediction.
        self.finished: queue.Queue[int | BaseException] = queue.Queue()
        self.stopped = threading.Event()
        self._memory = _Memory(memory_bytes, self.stopped)
        self._finished_bags: set[int] = set()

    def read(self, slide: SlideInWork, decoders: RankedThreads) -> None:
        """Opens and decodes a slide; its shards, and then the slide itself, go to the encoder."""
        try:
            slide.begun = time.monotonic()
            with _recording_error(slide):
                self._read(slide, partial(decoders.submit, slide.rank))
            self._memory.free_decoded(slide.rank)
            self._put(slide)
        except _Stopped:
            pass
        except BaseException as error:
            self.finished.put(error)

    def _read(self, slide: SlideInWork, submit: Callable[[Callable[[], Any]], Future]) -> None:
        source = slide.source
        with open_slide(source.path, source.mpp, source.fallback_mpp) as opened:
            slide.info = opened.info
            slide.encoding = self._predictor.begin(opened)
            plan = slide.encoding.plan
            self._memory.reserve(slide.bag, slide.rank, _decoded_bytes(plan, self._threads), self._feature_bytes(plan))
            slide.thumbnail = opened.thumbnail(LONGEST_PX)
            for shard in slide.encoding.shards(opened, self._threads, slide, submit):
                if slide.error is not None:
                    return
                self._put(shard)

    def _feature_bytes(self, plan: TilePlan) -> int:
        return len(plan.origin) * plan.params.slots * self._predictor.feature_bytes

    def _put(self, item: Shard[SlideInWork] | SlideInWork) -> None:
        while True:
            if self.stopped.is_set():
                raise _Stopped
            try:
                return self._shards.put(item, timeout=_STOP_CHECK_S)
            except queue.Full:
                continue

    def encode(self) -> None:
        """Encodes until every slide is finished or the engine is closed."""
        try:
            for result in encode_regions(self._predictor.members, self._queued()):
                if isinstance(result, tuple):
                    slides, error = result
                    for slide in slides:
                        slide.error = slide.error or error
                        self._finish_if_complete(slide)
                    continue
                # A failed slide's last regions may come after its end.
                if result.slide.encoding is not None:
                    result.slide.encoding.add(result.regions, result.features)
                    self._finish_if_complete(result.slide)
        except _Stopped:
            pass
        except BaseException as error:
            self.finished.put(error)

    def _queued(self) -> Iterator[Shard[SlideInWork] | None]:
        """Yields the shards of the queue, and None if regions have waited long enough for others."""
        unread, has_waiting = len(self.slides), False
        while unread:
            try:
                item = self._shards.get(timeout=_IDLE_S if has_waiting else _STOP_CHECK_S)
            except queue.Empty:
                if self.stopped.is_set():
                    raise _Stopped from None
                if has_waiting:
                    has_waiting = False
                    yield None
                continue
            if isinstance(item, SlideInWork):
                item.was_read, unread = True, unread - 1
                self._finish_if_complete(item)
            else:
                has_waiting = True
                yield item

    def _finish_if_complete(self, slide: SlideInWork) -> None:
        """Marks a slide, and its bag if it is the last of it; only the encoder's thread calls it."""
        encoding = slide.encoding
        if not slide.was_read or (slide.error is None and encoding is not None and encoding.waiting):
            return
        if slide.error is None and slide.encoded is None:
            assert encoding is not None
            with _recording_error(slide):
                slide.encoded = encoding.finished()
        slide.encoding = None
        bag = self.slides_of[slide.bag]
        is_complete = all(other.was_read and (other.encoded or other.error) for other in bag)
        if is_complete and slide.bag not in self._finished_bags:
            self._finished_bags.add(slide.bag)
            self.finished.put(slide.bag)

    def release(self, bag: int) -> None:
        """Frees the features of a bag that was yielded."""
        for slide in self.slides_of[bag]:
            slide.encoded = slide.thumbnail = None
        self._memory.release(bag)


class _Memory:
    """Has readers wait until the estimated bytes of the slides in work, with theirs, are within a limit."""

    def __init__(self, limit_bytes: int, stopped: threading.Event):
        self._limit_bytes, self._stopped = limit_bytes, stopped
        self._changed = threading.Condition()
        self._decoded: dict[int, int] = {}
        self._features: dict[int, int] = {}
        self._released: set[int] = set()
        self._earliest = 0

    def reserve(self, bag: int, rank: int, decoded_bytes: int, feature_bytes: int) -> None:
        """Waits for room; slides of the earliest bag that is not released do not wait. Raises _Stopped."""
        with self._changed:
            while bag > self._earliest and self._used_bytes + decoded_bytes + feature_bytes > self._limit_bytes:
                self._changed.wait(_STOP_CHECK_S)
                if self._stopped.is_set():
                    raise _Stopped
            self._decoded[rank] = decoded_bytes
            self._features[bag] = self._features.get(bag, 0) + feature_bytes

    def free_decoded(self, rank: int) -> None:
        """A slide was decoded to its end, or failed."""
        with self._changed:
            self._decoded.pop(rank, None)
            self._changed.notify_all()

    def release(self, bag: int) -> None:
        """A bag's features are not needed any more."""
        with self._changed:
            self._features.pop(bag, None)
            self._released.add(bag)
            while self._earliest in self._released:
                self._earliest += 1
            self._changed.notify_all()

    @property
    def _used_bytes(self) -> int:
        return sum(self._decoded.values()) + sum(self._features.values())


def _decoded_bytes(plan: TilePlan, threads: int) -> int:
    """Estimates the memory of a slide's decoded shards: those read ahead, the one handed over and the one being encoded."""
    params = plan.params
    shard = min(shard_regions(params), len(plan.origin)) * params.slots * params.tile_px**2 * 3
    return (threads + _QUEUED_SHARDS + 1) * shard


@contextmanager
def _recording_error(slide: SlideInWork) -> Iterator[None]:
    """Records an error of the slide, or of memory, as the slide's."""
    try:
        yield
    except (SlideError, MemoryError, jax.errors.JaxRuntimeError) as error:
        slide.error = slide.error or error
