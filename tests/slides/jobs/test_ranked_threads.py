import threading
from concurrent.futures import wait

import pytest

from crcjax.slides.jobs.ranked_threads import RankedThreads


def test_of_the_functions_that_wait_those_of_the_earliest_slide_run_first_in_their_order() -> None:
    begun, go_on, order = threading.Event(), threading.Event(), []

    def block() -> None:
        begun.set()
        assert go_on.wait(timeout=30)

    with RankedThreads(1) as threads:
        futures = [threads.submit(0, block)]
        assert begun.wait(timeout=30)
        for rank, name in ((3, "c"), (1, "a"), (3, "d"), (1, "b")):
            futures.append(threads.submit(rank, lambda name=name: order.append(name)))
        cancelled = threads.submit(2, lambda: order.append("cancelled"))
        assert cancelled.cancel()
        go_on.set()
        wait(futures, timeout=30)
    assert order == ["a", "b", "c", "d"]


def test_an_error_reaches_the_one_who_waits_for_the_result_and_the_threads_go_on() -> None:
    def fail() -> None:
        raise ValueError("damaged")

    others = set(threading.enumerate())
    with RankedThreads(2) as threads:
        failing = threads.submit(0, fail)
        with pytest.raises(ValueError, match="damaged"):
            failing.result(timeout=30)
        assert threads.submit(0, lambda: 7).result(timeout=30) == 7
    assert not [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("decode-")]
