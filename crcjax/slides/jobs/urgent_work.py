"""Urgent commands go first: while one runs, other commands of the same user on the same machine begin no further slide."""

from __future__ import annotations

import fcntl
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHECK_S = 0.2


@contextmanager
def urgent_work() -> Iterator[None]:
    """Makes `wait_for_urgent_work` of other processes wait until the block ends, or this process dies."""
    with open(_lock_path(), "a") as file:
        # Urgent commands share the lock, so that it is never free between two that overlap.
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def wait_for_urgent_work(stopped: threading.Event) -> None:
    """Waits while an urgent command runs and `stopped` is not set."""
    with open(_lock_path(), "a") as file:
        while not stopped.is_set():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stopped.wait(_CHECK_S)
            else:
                return


def _lock_path() -> Path:
    """A file of this user and machine; the home directory may be shared by machines."""
    name = f"crcjax-urgent-{os.getuid()}-{socket.gethostname()}.lock"
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crcjax"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    except (OSError, RuntimeError):
        # Accounts of services and containers have no home, or one that is read-only.
        folder = Path(tempfile.gettempdir())
    return folder / name
