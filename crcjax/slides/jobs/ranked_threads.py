"""Threads shared by several slides, which run the work of the earliest slide first."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")


class RankedThreads:
    """A pool of threads; of the functions that wait, those of the lowest rank run first. A context manager.

    While the last reads of one slide run, free threads begin with the next slide: no thread is idle at a slide's end.

    Args:
      threads: their number.
    """

    def __init__(self, threads: int):
        self._waiting: queue.PriorityQueue[tuple[float, int, Future | None, Callable[[], Any]]] = queue.PriorityQueue()
        self._number = itertools.count()
        self._threads = [threading.Thread(target=self._work, name=f"decode-{i}", daemon=True) for i in range(threads)]

    def __enter__(self) -> RankedThreads:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _ in self._threads:
            self._waiting.put((float("inf"), next(self._number), None, lambda: None))
        for thread in self._threads:
            thread.join()

    def submit(self, rank: int, function: Callable[[], T]) -> Future[T]:
        """Has a thread run the function once no function of a lower rank waits."""
        future: Future[T] = Future()
        self._waiting.put((rank, next(self._number), future, function))
        return future

    def _work(self) -> None:
        while True:
            _, _, future, function = self._waiting.get()
            if future is None:
                return
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
