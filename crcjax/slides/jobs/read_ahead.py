"""Runs functions that read or decode in threads, ahead of the code that uses their results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

T = TypeVar("T")


def read_ahead(
    reads: Iterable[Callable[[], T]],
    threads: int = 1,
    ahead: int = 2,
    submit: Callable[[Callable[[], T]], Future[T]] | None = None,
) -> Generator[T]:
    """Yields the results of `reads` in their order, while threads run the next ones.

    Closing the generator cancels the reads that have not begun and waits for the others.

    Args:
      reads: the functions; the iterable is advanced in the caller's thread.
      threads: how many of them run at a time.
      ahead: how many of them are begun before their result is asked for. It bounds the memory.
      submit: has a thread of another pool run a function, in place of `threads` of its own.

    Raises:
      The error of a read, in its turn.
    """
    if submit is None:
        with ThreadPoolExecutor(threads, "read-ahead") as pool:
            yield from read_ahead(reads, ahead=ahead, submit=pool.submit)
        return
    pending: deque[Future[T]] = deque()
    try:
        for read in reads:
            pending.append(submit(read))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        wait([future for future in pending if not future.cancel()])
