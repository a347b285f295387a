"""Processes wait for urgent ones, and never for one that died."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crcjax.slides.jobs.urgent_work import urgent_work, wait_for_urgent_work

URGENT = """
import sys
from crcjax.slides.jobs.urgent_work import urgent_work
with urgent_work():
    print("urgent", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True, params=["with a cache folder", "without one"])
def _own_lock(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(
        "XDG_CACHE_HOME", str(tmp_path / ("cache" if request.param == "with a cache folder" else "file"))
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def _urgent() -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", URGENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "urgent\n"
    return process


def _waiting() -> tuple[threading.Thread, threading.Event]:
    stopped = threading.Event()
    thread = threading.Thread(target=wait_for_urgent_work, args=(stopped,))
    thread.start()
    return thread, stopped


def test_work_waits_until_all_urgent_processes_have_ended_or_died() -> None:
    wait_for_urgent_work(threading.Event())
    first, second = _urgent(), _urgent()
    thread, _ = _waiting()
    try:
        first.communicate("\n")
        thread.join(timeout=1.0)
        assert thread.is_alive()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    thread.join(timeout=30)
    assert not thread.is_alive()


def test_work_that_is_stopped_waits_no_longer() -> None:
    with urgent_work():
        thread, stopped = _waiting()
        thread.join(timeout=0.5)
        assert thread.is_alive()
        stopped.set()
        thread.join(timeout=30)
        assert not thread.is_alive()
    wait_for_urgent_work(threading.Event())
