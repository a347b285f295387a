"""The service's files at rest, and the keys of cases and jobs that encrypt them.

    the site's keys (file, environment or key service)  wrap  the keys of cases and jobs, STATE/keys.db
    a case's key                                        wraps the keys of its uploads and slides, each in its file
    a job's key                                         wraps the keys of its heatmaps and attention, each in its file

New keys of the site re-wrap the rows of keys.db alone; no file is written again. A case is erased by deleting its rows. Without
keys of the site, files are plain, and keys.db holds the key of pseudonyms alone.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

from crcjax.encryption.frames import (
    KEY_BYTES,
    DecryptionError,
    FrameReader,
    FrameWriter,
    Header,
    decrypt,
    encrypt,
    is_encrypted,
    read_header,
)
from crcjax.encryption.keys import Keys
from crcjax.encryption.memory import memory_folder
from crcjax.errors import OutputError
from crcjax.serve.database import Database

MIGRATIONS = (
    (
        # Without the site's keys, the key id is empty and the key is not wrapped: that of pseudonyms alone.
        "CREATE TABLE keys (name TEXT PRIMARY KEY, key_id TEXT NOT NULL, wrapped BLOB NOT NULL)",
    ),
)
# The database of the keys in a state folder.
KEYS = "keys.db"
_PSEUDONYMS = "pseudonyms"
_DIGITS = 20
_COPY_BYTES = 1 << 20


class Vault:
    """Opens, writes and forgets the files of cases.

    Args:
      path: the database of the keys.
      keys: the site's keys; None: new files are plain, and encrypted ones cannot be read.
    """

    def __init__(self, path: Path, keys: Keys | None = None):
        self._database, self._keys = Database(path, MIGRATIONS), keys
        # Keys by what is stored of them, so that a destroyed or re-wrapped key is never taken from here.
        self._unwrapped: dict[tuple[str, bytes], bytes] = {}

    @property
    def is_encrypting(self) -> bool:
        """Whether new files are encrypted."""
        return self._keys is not None

    def pseudonym(self, site: str, case_id: str) -> str:
        """What logs and tombstones call a case: a keyed hash of site and id, of 80 bits."""
        key = self._key(_PSEUDONYMS, create=True)
        return "p" + hmac.new(key, f"{site}\0{case_id}".encode(), hashlib.sha256).hexdigest()[:_DIGITS]

    def case_key(self, site: str, case_id: str) -> str:
        """The name of a case's key."""
        return f"{site}/case/{self.pseudonym(site, case_id)}"

    def _key(self, name: str, *, create: bool = False) -> bytes:
        """The key of a name. Raises DecryptionError if it was destroyed or never made, or cannot be unwrapped."""
        row = self._database.row("SELECT key_id, wrapped FROM keys WHERE name = ?", name)
        if row is None and create:
            with self._database.transaction() as connection:
                # Wrapped within the transaction: `rewrap` then finds this key, or has made the current one before.
                wrapped = self._wrap(name, os.urandom(KEY_BYTES))
                connection.execute("INSERT INTO keys VALUES (?, ?, ?) ON CONFLICT DO NOTHING", (name, *wrapped))
            # Another process may have made it at the same time.
            row = self._database.row("SELECT key_id, wrapped FROM keys WHERE name = ?", name)
        if row is None:
            raise DecryptionError("the key of this object was destroyed: its case was erased")
        known = (name, row["wrapped"])
        if known not in self._unwrapped:
            self._unwrapped[known] = self._unwrap(name, row["key_id"], row["wrapped"])
        return self._unwrapped[known]

    def _wrap(self, name: str, key: bytes) -> tuple[str, bytes]:
        return ("", key) if self._keys is None else self._keys.wrap(key, _context(name))

    def _unwrap(self, name: str, key_id: str, wrapped: bytes) -> bytes:
        if not key_id:
            return wrapped
        if self._keys is None:
            raise DecryptionError("the state folder is encrypted; give the keys that it was encrypted with")
        return self._keys.unwrap(key_id, wrapped, _context(name))

    def rewrap(self) -> int:
        """Wraps every key with the site's current key; files stay as they are. Returns the number of keys."""
        count, current = 0, None
        # A running service may add keys meanwhile; those that it wrapped with an earlier key are found by another pass.
        while rows := self._database.rows("SELECT name FROM keys WHERE ? IS NULL OR key_id != ?", current, current):
            for name in (row["name"] for row in rows):
                # One short transaction for each, so that the service goes on.
                with self._database.transaction() as connection:
                    row = connection.execute("SELECT key_id, wrapped FROM keys WHERE name = ?", (name,)).fetchone()
                    if row is None:
                        continue
                    current, wrapped = self._wrap(name, self._unwrap(name, row["key_id"], row["wrapped"]))
                    connection.execute(
                        "UPDATE keys SET key_id = ?, wrapped = ? WHERE name = ?", (current, wrapped, name)
                    )
                count += 1
        self._database.forget_deleted()
        return count

    def destroy(self, names: list[str]) -> int:
        """Deletes keys, so that nothing that they encrypted can be read again; returns how many there were."""
        with self._database.transaction() as connection:
            removed = sum(connection.execute("DELETE FROM keys WHERE name = ?", (name,)).rowcount for name in names)
        self._unwrapped = {known: key for known, key in self._unwrapped.items() if known[0] not in names}
        self._database.forget_deleted()
        return removed

    def open(
        self, path: Path, object_id: str, site: str | None = None, *, is_finished: bool = True
    ) -> io.BufferedReader:
        """Opens the content of a file, encrypted or plain, for reading from any offset.

        Args:
          path: the file.
          object_id: what it must be of, by its header.
          site: whose it must be; None: any.
          is_finished: False for an upload that goes on.

        Raises:
          DecryptionError: it is another object's, or its key was destroyed; when reading, that it was changed.
        """
        if not is_encrypted(path):
            return open(path, "rb")

        def check(header: Header) -> None:
            if header.object != object_id or site not in (None, header.site):
                raise DecryptionError(f"{path.name}: is another object's file")

        file = open(path, "rb")  # noqa: SIM115 - the reader closes it
        try:
            reader = FrameReader(file, path, self._file_key, check, is_finished=is_finished)
        except BaseException:
            file.close()
            raise
        return io.BufferedReader(reader, _COPY_BYTES)

    def _file_key(self, header: Header) -> bytes:
        return decrypt(self._key(header.key), bytes.fromhex(header.wrapped), _file_context(header))

    def writer(self, path: Path, object_id: str, site: str, key_name: str, offset: int = 0) -> Writer:
        """Opens a file for writing from an offset of its content on; whatever follows is cut off.

        The file is encrypted with the key of `key_name`, if this vault encrypts. Raises DecryptionError if no sitting ended there.
        """
        file = open(path, "r+b" if offset else "w+b")  # noqa: SIM115 - the writer closes it
        try:
            if not (is_encrypted(path) if offset else self.is_encrypting):
                file.seek(offset)
                file.truncate()
                return Writer(file, None)
            if offset:
                header = read_header(file, path)
            else:
                file_key = os.urandom(KEY_BYTES)
                header = Header(object_id, site, key_name, "")
                wrapped = encrypt(self._key(key_name, create=True), file_key, _file_context(header))
                header = Header(object_id, site, key_name, wrapped.hex())
            return Writer(file, FrameWriter(file, header, self._file_key(header), offset))
        except BaseException:
            file.close()
            raise

    def encrypt_folder(self, source: Path, out: Path, object_prefix: str, site: str, key_name: str) -> None:
        """Writes the files of a folder to another one; each is the object of the prefix and its path within the folder."""
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            name = path.relative_to(source)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            with self.writer(out / name, f"{object_prefix}{name}", site, key_name) as writer:
                writer.write(path.read_bytes())
                writer.finish()

    @contextmanager
    def readable_slides(self, payload: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """A job's payload with paths that native code can open: encrypted slides are decrypted into memory for the block."""
        with ExitStack() as stack:
            slides = []
            for slide in payload["slides"]:
                path = Path(slide["path"])
                if path.is_file() and is_encrypted(path):
                    folder = stack.enter_context(memory_folder())
                    plain = folder / path.name
                    if path.stat().st_size > shutil.disk_usage(folder).free:
                        raise OutputError(
                            f"{folder.parent}: has no room for a slide of {path.stat().st_size} bytes; enlarge it"
                        )
                    with self.open(path, path.stem, slide["site"]) as content, open(plain, "wb") as copy:
                        while block := content.read(_COPY_BYTES):
                            copy.write(block)
                    slide = {**slide, "path": str(plain)}
                slides.append(slide)
            yield {**payload, "slides": slides}


class Writer:
    """A file that is being written, encrypted or plain; a context manager, which closes it."""

    def __init__(self, file: IO[bytes], frames: FrameWriter | None):
        self._file, self._frames = file, frames

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def write(self, content: bytes) -> None:
        """Appends."""
        if self._frames is None:
            self._file.write(content)
        else:
            self._frames.write(content)

    def end_sitting(self) -> None:
        """Returns once everything is on the disk; another sitting follows."""
        if self._frames is not None:
            self._frames.end_sitting()
        self._sync()

    def finish(self) -> None:
        """Ends the content, and returns once it is on the disk."""
        if self._frames is not None:
            self._frames.finish()
        self._sync()

    def _sync(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())


def _context(name: str) -> bytes:
    return f"crcjax key 1\0{name}".encode()


def _file_context(header: Header) -> bytes:
    return "\0".join(("crcjax file", str(header.format), header.object, header.site, header.key)).encode()
