"""Locks on stores and slides. The system releases a lock when the process that has it dies.

The package filelock is not used, because it is not safe together with the removal of released lock files, and a store of
thousands of slides must not keep thousands of them. It recognises a lock file that another process has removed by its link
count of 0. On NFS, a file that is removed while it is open keeps a link under a hidden name until it is closed, so that two
processes could have the lock of one slide. `_lock` compares the locked file with the one that has the name instead.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crcjax.errors import BusyError, OutputError

# After it was opened, another process released and removed the file. NFS reports a stale handle.
_REMOVED = (errno.ENOENT, errno.ESTALE)


@contextmanager
def slide_lock(store: Path, slide_id: str) -> Iterator[None]:
    """Locks a slide of a store against all other writers, on any machine, until the block ends or the process dies.

    Raises BusyError if another process has the lock, OutputError if the store cannot be written or its file system has no locks.
    """
    with file_lock(store / ".partial" / f"{slide_id}.lock", f"another process writes the slide {slide_id}"):
        yield


@contextmanager
def file_lock(path: Path, busy: str = "") -> Iterator[None]:
    """Takes the lock of a file. Waits for it, or raises BusyError with the text `busy` if that is given. Raises OutputError."""
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
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)  # NFS locks only files that are open for writing
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except OSError as error:
            if error.errno not in _REMOVED:
                os.close(descriptor)
                raise
        os.close(descriptor)
