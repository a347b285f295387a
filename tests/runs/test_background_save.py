"""Saves in the background: bounded in time, in order, and reported."""

import os
import threading
import time
from pathlib import Path

import pytest

from crcjax.runs.background_save import BackgroundSave


def _ignore(save: BackgroundSave) -> None:
    pass


def test_saves_run_one_after_the_other_and_an_error_of_one_does_not_stop_the_next() -> None:
    order: list[str] = []

    def fail(save: BackgroundSave) -> None:
        time.sleep(0.2)
        order.append("first")
        raise ValueError("no\nspace")

    first = BackgroundSave(1, fail, lambda save: order.append(save.error), 10.0)
    second = BackgroundSave(2, lambda save: order.append("second"), _ignore, 10.0, first)
    assert not first.is_ended
    second.wait()
    assert order == ["first", "ValueError: no space", "second"]
    assert second.error == ""
    assert first.seconds >= 0.2
    assert second.seconds < 0.2


def test_a_save_that_hangs_is_abandoned_within_its_bound_and_changes_nothing_when_it_wakes(tmp_path: Path) -> None:
    # Opening a FIFO to read blocks until somebody writes.
    fifo, woken, ended = tmp_path / "fifo", threading.Event(), []
    os.mkfifo(fifo)

    def hang(save: BackgroundSave) -> None:
        try:
            fifo.read_bytes()
            save.check()
            ended.append("published")
        finally:
            woken.set()

    start = time.monotonic()
    save = BackgroundSave(7, hang, _ignore, 0.5)
    after = BackgroundSave(8, _ignore, _ignore, 0.5, save)
    after.wait()
    assert 0.5 <= time.monotonic() - start < 2
    assert save.is_stuck
    assert "not finished within" in save.error
    assert after.error == ""
    fifo.write_bytes(b"x")
    assert woken.wait(5)
    time.sleep(0.2)
    assert not save.is_stuck
    assert ended == []
    with pytest.raises(TimeoutError, match="abandoned"):
        save.check()
