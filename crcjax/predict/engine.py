"""Predicts many slides at once: some are opened and decoded while the device encodes regions of others."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from jaxtyping import UInt8

from crcjax.errors import SlideError
from crcjax.predict.ensemble import memory_errors
from crcjax.predict.heatmap import LONGEST_PX
from crcjax.predict.predictor import EncodedSlide, Predictor, SlideEncoding
from crcjax.predict.region_encoder import Shard, encode_regions
from crcjax.slides.jobs.ranked_threads import RankedThreads
from crcjax.slides.jobs.urgent_work import wait_for_urgent_work
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
      read_s: the seconds in which the encoder waited for its tiles.
      encode_s: the seconds in which the encoder waited for the device with its tiles.
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
    read_s: float = 0.0
    encode_s: float = 0.0


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
      is_urgent: whether slides are begun although an urgent command runs (see `urgent_work`).
    """

    def __init__(self, predictor: Predictor, threads: int, memory_bytes: int | None = None, *, is_urgent: bool = False):
        self._predictor, self._threads, self._is_urgent = predictor, threads, is_urgent
        self._memory_bytes = memory_bytes or default_memory_bytes()

    def bags(self, bags: Sequence[Sequence[SlideSource]]) -> Generator[tuple[int, list[SlideInWork]]]:
        """Yields the number and the slides of each bag once they are encoded or have failed.

        Raises an error that is not of a slide. Closing the generator stops all threads.
        """
        work = self.begin()
        try:
            yield from work.bags(bags)
        finally:
            work.stop()

    def begin(self) -> EngineWork:
        """Starts the threads of the engine; bags can be added until `EngineWork.stop`."""
        return EngineWork(self._predictor, self._threads, self._memory_bytes, self._is_urgent)


def default_memory_bytes() -> int:
    """The limit for the slides in work where none is given."""
    return int(psutil.virtual_memory().available * _MEMORY_SHARE)


class _Stopped(Exception):
    """The engine was stopped while a thread waited."""


class EngineWork:
    """The threads of an engine, the bags that were added, and the queues between them.

    Bags may be added by several threads; one thread takes the finished ones.
    """

    def __init__(self, predictor: Predictor, threads: int, memory_bytes: int, is_urgent: bool):
        self._predictor, self._threads, self._is_urgent = predictor, threads, is_urgent
        self._adding = threading.Lock()
        self._slides_of: list[list[SlideInWork]] = []
        # Slides that were added, and those of them that were decoded to the end or failed.
        self._added = self._was_read = 0
        # None wakes the encoder when the engine is stopped.
        self._shards: queue.Queue[Shard[SlideInWork] | SlideInWork | None] = queue.Queue(_QUEUED_SHARDS)
        # Numbers of bags, or an error that ends the prediction.
        self._finished: queue.Queue[int | BaseException] = queue.Queue()
        self._stopped = threading.Event()
        self._memory = _Memory(memory_bytes, self._stopped)
        self._finished_bags: set[int] = set()
        # The seconds in which the encoder waited for tiles, of any slide.
        self._read_s = 0.0
        self._decoders = RankedThreads(threads)
        self._decoders.__enter__()
        self._readers = ThreadPoolExecutor(threads + 1, "slide")
        # It compiles while the first tiles are decoded.
        self._compiler = ThreadPoolExecutor(1, "compile")
        self._encoder = threading.Thread(target=self._encode, name="encoder", daemon=True)
        self._encoder.start()

    def add(self, bag: Sequence[SlideSource]) -> int:
        """Appends the slides of one bag to the work, and returns the bag's number."""
        with self._adding:
            number = len(self._slides_of)
            slides = [SlideInWork(number, source, self._added + index) for index, source in enumerate(bag)]
            self._slides_of.append(slides)
            self._added += len(slides)
            for slide in slides:
                self._readers.submit(self._read_to_end, slide)
            return number

    def bags(self, bags: Sequence[Sequence[SlideSource]]) -> Generator[tuple[int, list[SlideInWork]]]:
        """As `Engine.bags`, while the threads go on; not if others have added bags that are not finished."""
        numbers = {self.add(bag): number for number, bag in enumerate(bags)}
        for _ in bags:
            for number, slides in self.next_finished():
                yield numbers[number], slides

    def next_finished(self) -> Iterator[tuple[int, list[SlideInWork]]]:
        """Waits for a bag whose slides are encoded or have failed, and yields its number and slides.

        Its features are freed afterwards. Raises an error that is not of a slide.
        """
        finished = self._finished.get()
        if isinstance(finished, BaseException):
            raise finished
        yield finished, self._slides_of[finished]
        for slide in self._slides_of[finished]:
            slide.encoded = slide.thumbnail = None
        self._memory.release(finished)

    def stop(self) -> None:
        """Stops all threads and waits for them."""
        self._stopped.set()
        with suppress(queue.Full):
            self._shards.put_nowait(None)
        self._readers.shutdown(cancel_futures=True)
        self._compiler.shutdown(cancel_futures=True)
        self._encoder.join()
        self._decoders.__exit__(None, None, None)

    def _read_to_end(self, slide: SlideInWork) -> None:
        """Opens and decodes a slide; its shards, and then the slide itself, go to the encoder."""
        try:
            if not self._is_urgent:
                wait_for_urgent_work(self._stopped)
            slide.begun = time.monotonic()
            with _recording_error(slide):
                self._read(slide, partial(self._decoders.submit, slide.rank))
            self._memory.free_decoded(slide.rank)
            self._put(slide)
        except _Stopped:
            pass
        except BaseException as error:
            self._finished.put(error)

    def _read(self, slide: SlideInWork, submit: Callable[[Callable[[], Any]], Future]) -> None:
        source = slide.source
        with open_slide(source.path, source.mpp, source.fallback_mpp) as opened:
            slide.info = opened.info
            slide.encoding = self._predictor.begin(opened)
            plan = slide.encoding.plan
            self._compiler.submit(self._predictor.compile_ahead, slide.encoding)
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
            if self._stopped.is_set():
                raise _Stopped
            try:
                return self._shards.put(item, timeout=_STOP_CHECK_S)
            except queue.Full:
                continue

    def _encode(self) -> None:
        """Encodes until the engine is stopped."""
        begun, read_s = time.monotonic(), self._read_s
        try:
            for result in encode_regions(self._predictor.members, self._queued()):
                waited_s = time.monotonic() - begun - (self._read_s - read_s)
                begun, read_s = time.monotonic(), self._read_s
                if isinstance(result, tuple):
                    slides, error = result
                    for slide in slides:
                        slide.error = slide.error or error
                        self._finish_if_complete(slide)
                    continue
                result.slide.encode_s += waited_s
                # A failed slide's last regions may come after its end.
                if result.slide.encoding is not None:
                    result.slide.encoding.add(result.regions, result.features)
                    self._finish_if_complete(result.slide)
        except _Stopped:
            pass
        except BaseException as error:
            self._finished.put(error)

    def _queued(self) -> Iterator[Shard[SlideInWork] | None]:
        """Yields the shards of the queue, and None if no others are to come, or regions have waited for them long enough."""
        has_waiting = False
        while True:
            begun = time.monotonic()
            try:
                if has_waiting and self._was_read == self._added:
                    raise queue.Empty
                item = self._shards.get(timeout=_IDLE_S if has_waiting else None)
            except queue.Empty:
                has_waiting = False
                self._read_s += time.monotonic() - begun
                yield None
                continue
            waited_s = time.monotonic() - begun
            self._read_s += waited_s
            if item is not None:
                slide = item if isinstance(item, SlideInWork) else item.slide
                # Before a slide was begun, there was nothing to do.
                slide.read_s += min(waited_s, time.monotonic() - slide.begun)
            if self._stopped.is_set():
                raise _Stopped
            if isinstance(item, SlideInWork):
                item.was_read = True
                self._was_read += 1
                self._finish_if_complete(item)
            elif item is not None:
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
        bag = self._slides_of[slide.bag]
        is_complete = all(other.was_read and (other.encoded or other.error) for other in bag)
        if is_complete and slide.bag not in self._finished_bags:
            self._finished_bags.add(slide.bag)
            self._finished.put(slide.bag)


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
    except SlideError as error:
        slide.error = slide.error or error
    except memory_errors() as error:
        slide.error = slide.error or error
