"""What must hold at the start for data at rest: files encrypted with the site's keys, databases on an encrypted volume."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from crcjax.encryption.keys import Keys, open_keys
from crcjax.encryption.memory import is_encrypted_volume, remove_abandoned_folders, unencrypted_swap
from crcjax.errors import InputError

_STATE_IT = "or state with --encrypted-volume that the disk is encrypted below this machine"


def keys_at_rest(state: Path, host: str, source: str | None, is_stated: bool) -> tuple[Keys | None, str]:
    """Opens the site's keys, after a check that the rest of the state folder is protected too.

    The databases are read and written all the time, and are not encrypted by crcjax: their volume must be. Decrypted slides are in
    memory, which must not be swapped to a disk in the clear.

    Args:
      state: the state folder.
      host: where the service listens; on this machine alone, everything may be plain, for a trial.
      source: the keys, see `encryption.keys`; None: nothing is encrypted by crcjax.
      is_stated: the operator states that the volume of the state folder, and swap, are encrypted in a way that cannot be seen here.
    Returns:
      The keys, and what a person has to know; "" if nothing.

    Raises:
      InputError: something is neither encrypted nor stated to be.
    """
    is_protected = is_stated or is_encrypted_volume(_existing(state))
    if source is None:
        if not is_protected and not _is_loopback(host):
            raise InputError(
                f"--host {host}: slides and results would lie unencrypted in {state}; put it on an encrypted volume and give "
                f"--keys, {_STATE_IT}"
            )
        notice = "slides and results are not encrypted on the disk: for a trial on this machine alone"
        return None, "" if is_protected else notice
    if not is_protected:
        raise InputError(f"{state}: its databases must lie on an encrypted volume (LUKS); move it there, {_STATE_IT}")
    if not is_stated and (areas := unencrypted_swap()):
        raise InputError(
            f"swap on {areas[0]} could write decrypted slides to the disk; switch it off, encrypt it, {_STATE_IT}"
        )
    remove_abandoned_folders()
    return open_keys(source), ""


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
