"""Locks on stores and slides, freed by the system when their holder dies."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crcjax.errors import BusyError, OutputError


@contextmanager
def slide_lock(store: Path, slide_id: str) -> Iterator[None]:
    """Holds a slide of a store against all other writers, on any machine; the system frees it when its holder dies.

    Raises BusyError if another holds it, OutputError if the store cannot be written or its file system has no locks.
    """
    with file_lock(store / ".partial" / f"{slide_id}.lock", f"another process writes the slide {slide_id}"):
        yield


@contextmanager
def file_lock(path: Path, busy: str = "") -> Iterator[None]:
    """Holds the lock that a file stands for, waiting for it unless `busy` says what BusyError shall say. Raises OutputError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, fcntl.LOCK_NB if busy else 0)
    except BlockingIOError as error:
        raise BusyError(f"{path.parents[1]}: {busy}; wait for it") from error
    except OSError as error:
        raise OutputError(
            f"{path.parents[1]}: cannot be written or locked ({error.strerror}); choose another --out"
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _lock(path: Path, flags: int) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only what is open for writing
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:
            pass  # its last holder removed it since it was opened
        except OSError:
            os.close(descriptor)
            raise
        os.close(descriptor)
