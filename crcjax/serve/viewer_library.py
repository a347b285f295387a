"""OpenSeadragon, the zooming viewer of the page: installed from the npm registry by `crcjax install-viewer`, never shipped.

The service hands the file to browsers itself, so that no page asks another machine for it. Only the file with the pinned hash is
installed and served.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from crcjax.errors import InputError, writing

PACKAGE, VERSION = "openseadragon", "6.1.1"
_SHA256 = "14d587cd3ee7c4861f1a41077ce642029364a21029956ba635bd8fb1202cf9ad"
# The style that the script adds to a page, which the page's content security policy must allow by its hash.
STYLE_SHA256 = "sha256-9xTiqzfwFaL2SGb1rmr8gysEwVVjIvqWAgmZgqFqpEE="
_SCRIPT, _LICENSE = "package/build/openseadragon/openseadragon.min.js", "package/LICENSE.txt"
INSTALL = "crcjax install-viewer"


def default_file() -> Path:
    """Where `crcjax install-viewer` puts the script for this user."""
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / "crcjax" / f"{PACKAGE}-{VERSION}" / Path(_SCRIPT).name


def read_script(path: Path | None = None) -> bytes | None:
    """The script, from `path` or where it was installed; None if it is not installed.

    Raises InputError if `path` cannot be read, or a file is not the pinned release.
    """
    file = path or default_file()
    if path is None and not file.is_file():
        return None
    try:
        script = file.read_bytes()
    except OSError as error:
        raise InputError(f"--viewer {file}: cannot be read ({error.strerror}); give the file of {INSTALL}") from error
    return _checked(script, file)


def install(file: Path, package: Path | None = None) -> None:
    """Writes the script, with its licence beside it.

    Args:
      file: the script's place.
      package: the package's archive, for machines without npm or network; by default npm fetches it.

    Raises:
      InputError: npm is missing or fails, or the archive is not the pinned release.
      OutputError: the folder cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        archive = package or _fetch(Path(folder))
        try:
            with tarfile.open(archive) as tar:
                script, license_text = (_member(tar, name) for name in (_SCRIPT, _LICENSE))
        except (OSError, KeyError, tarfile.TarError) as error:
            raise InputError(
                f"{archive}: is not the archive of {PACKAGE} {VERSION}; get it with npm pack {PACKAGE}@{VERSION}"
            ) from error
    _checked(script, archive)
    with writing(file, "give --to another folder"):
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / Path(_LICENSE).name).write_bytes(license_text)
        partial = file.with_suffix(".partial")
        partial.write_bytes(script)
        partial.replace(file)


def _fetch(folder: Path) -> Path:
    npm = shutil.which("npm")
    wanted = f"{PACKAGE}@{VERSION}"
    if npm is None:
        raise InputError(
            f"npm is not installed; install it (Debian, Ubuntu: apt-get install npm), or run npm pack {wanted} on another "
            f"machine and give the archive: {INSTALL} --package {PACKAGE}-{VERSION}.tgz"
        )
    done = subprocess.run([npm, "pack", "--silent", wanted], cwd=folder, capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if done.returncode != 0 or not archives:
        reason = done.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise InputError(f"npm pack {wanted} failed ({reason[0]}); check the network, or give the archive by --package")
    return archives[0]


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(name)
    return file.read()


def _checked(script: bytes, file: Path) -> bytes:
    digest = hashlib.sha256(script).hexdigest()
    if digest != _SHA256:
        raise InputError(
            f"{file}: must be {PACKAGE} {VERSION} (SHA-256 {_SHA256}), got {digest}; install it with {INSTALL}"
        )
    return script
