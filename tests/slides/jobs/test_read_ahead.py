import threading

import pytest

from crcjax.slides.jobs.read_ahead import read_ahead


def test_the_next_reads_run_while_the_consumer_works_and_results_keep_their_order() -> None:
    started = [threading.Event() for _ in range(5)]

    def read(number: int) -> int:
        started[number].set()
        return number

    for number in read_ahead((lambda number=number: read(number)) for number in range(5)):
        # While the consumer holds a result, the next one is read without being asked for.
        assert number == 4 or started[number + 1].wait(timeout=30)
        assert number + 4 > 4 or not started[number + 4].is_set()


def test_the_error_of_a_read_is_raised_in_its_turn_and_leaving_early_ends_the_thread() -> None:
    def fail() -> int:
        raise ValueError("damaged")

    results = read_ahead([lambda: 1, fail, lambda: 3])
    assert next(results) == 1
    with pytest.raises(ValueError, match="damaged"):
        next(results)
    results = read_ahead([lambda: 1, lambda: 2, lambda: 3])
    next(results)
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


def test_as_many_reads_as_there_are_threads_run_at_once() -> None:
    both = threading.Barrier(2, timeout=30)
    assert len(list(read_ahead([both.wait] * 6, threads=2, ahead=2))) == 6
