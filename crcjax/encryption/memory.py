"""Folders in memory for decrypted files, and checks that neither they nor a state folder reach an unencrypted disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crcjax.errors import InputError

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "crcjax-"
# File systems that keep their files in memory, or encrypt them.
_IN_MEMORY = ("tmpfs", "ramfs")
_ENCRYPTING = ("ecryptfs", "fuse.gocryptfs", "fuse.encfs", "fuse.cryfs")


@contextmanager
def memory_folder() -> Iterator[Path]:
    """A new folder in memory, which this user alone can read; it is removed at the end.

    Raises InputError if /dev/shm is not a file system in memory.
    """
    if file_system(_SHARED_MEMORY) not in _IN_MEMORY:
        raise InputError(f"{_SHARED_MEMORY} must be a file system in memory (tmpfs) to decrypt into; mount one there")
    folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=_SHARED_MEMORY))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_abandoned_folders() -> int:
    """Removes the folders in memory of processes of this user that were killed; returns their number."""
    removed = 0
    for folder in _SHARED_MEMORY.glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdecimal() and not Path(f"/proc/{process}").exists() and folder.stat().st_uid == os.getuid():
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def file_system(path: Path) -> str:
    """The type of the file system that a path lies on, such as ext4."""
    place, longest, kind = os.path.realpath(path), "", ""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, mount, mounted_kind, *_ = line.split()
        mount = mount.replace("\\040", " ")
        inside = place == mount or place.startswith(mount.rstrip("/") + "/")
        # Of two mounts on one place, the later one is on top.
        if inside and len(mount) >= len(longest):
            longest, kind = mount, mounted_kind
    return kind


def is_encrypted_volume(path: Path) -> bool:
    """Whether a path lies in memory, on an encrypting file system, or on a block device that dm-crypt (LUKS) encrypts.

    Encryption below the machine, such as of a cloud's disks, cannot be seen from here.
    """
    if file_system(path) in (*_IN_MEMORY, *_ENCRYPTING):
        return True
    device = os.stat(path).st_dev
    return _is_crypt(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))


def unencrypted_swap() -> list[str]:
    """The swap areas through which decrypted memory could reach a disk in the clear."""
    areas = [line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    return [area for area in areas if not area.startswith("/dev/zram") and not _is_encrypted_swap(Path(area))]


def _is_encrypted_swap(area: Path) -> bool:
    if not area.exists():
        return False
    state = area.stat()
    device = state.st_rdev or state.st_dev
    return _is_crypt(Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"))


def _is_crypt(device: Path) -> bool:
    """Whether a block device, or everything below it, is one of dm-crypt."""
    try:
        identity = (device / "dm" / "uuid").read_text()
    except OSError:
        identity = ""
    if identity.startswith("CRYPT-"):
        return True
    below = list((device / "slaves").glob("*"))
    return bool(below) and all(_is_crypt(slave) for slave in below)
