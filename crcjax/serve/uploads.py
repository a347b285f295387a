"""Resumable uploads: chunks are appended in order, hashed as they arrive, and become a slide when all have arrived.

A chunk counts once it is on the disk and its end is recorded. After a broken connection or a restart the client asks for the
offset and goes on from there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sqlite3
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio.to_thread

from crcjax.errors import CrcjaxError
from crcjax.serve.database import Database
from crcjax.serve.slide_records import NewSlide, SlideRecord, SlideRecords, SlideRefusedError, check_structure
from crcjax.serve.vault import Vault
from crcjax.slides.wsi.discovery import content_hash_of
from crcjax.slides.wsi.tiff_structure import STARTS

# Formats of one file, by the suffix of the uploaded name; others are given by reference.
SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".scn", ".svslide", ".bif", ".czi")

_CZI_START = b"ZISRAWFILE"
MAX_BYTES = 64 * 2**30
# Free bytes of the disk that uploads leave to results and to the database.
_RESERVED_BYTES = 2**30
_STALE_S = 7 * 24 * 3600.0
_READ_BYTES = 1 << 20


class OffsetError(CrcjaxError):
    """The chunk does not begin where the last one ended; `offset` is that place."""

    def __init__(self, offset: int):
        super().__init__(f"Upload-Offset must be {offset}, where the last chunk ended; continue there")
        self.offset = offset


class NoRoomError(CrcjaxError):
    """The disk of the state folder has no room for the file."""


@dataclass(frozen=True)
class Upload:
    """An upload that is not finished."""

    id: str
    new: NewSlide
    bytes: int
    sha256: str
    offset: int


class Uploads:
    """The unfinished uploads, in `folder`/ID.part; finished slides are `slides_folder`/ID.SUFFIX."""

    def __init__(self, database: Database, slides: SlideRecords, vault: Vault, folder: Path, slides_folder: Path):
        self._database, self._slides, self._vault = database, slides, vault
        self._folder, self._slides_folder = folder, slides_folder
        for path in (folder, slides_folder):
            path.mkdir(parents=True, exist_ok=True)
        # The hash of what has arrived, with its length, of uploads in progress.
        self._hashes: dict[str, tuple[int, hashlib._Hash]] = {}
        self._finish_interrupted()

    def _finish_interrupted(self) -> None:
        """Adds the slides of uploads that were complete when the service was killed."""
        for row in self._database.rows("SELECT * FROM uploads WHERE offset = bytes"):
            upload = _upload(row)
            if self._slide_path(upload).exists():
                self._add(upload, self._slide_path(upload))
                self._forget(upload.id)

    def _slide_path(self, upload: Upload) -> Path:
        return self._slides_folder / f"{upload.id}{Path(upload.new.name).suffix.lower()}"

    def begin(self, new: NewSlide, size: int, sha256: str) -> Upload:
        """Begins an upload of `size` bytes; `sha256` is the file's, in hex. Raises SlideRefusedError, NoRoomError."""
        suffix = Path(new.name).suffix.lower()
        if suffix not in SUFFIXES:
            raise SlideRefusedError(
                f"name must end with one of {', '.join(SUFFIXES)}, got {new.name!r}; slides of several files are added by path"
            )
        if not 0 < size <= MAX_BYTES:
            raise SlideRefusedError(f"bytes must be 1 to {MAX_BYTES}, got {size}")
        if size > shutil.disk_usage(self._folder).free - _RESERVED_BYTES:
            raise NoRoomError(f"the service has no room for {size} bytes; ask its administrator to free disk space")
        self._discard_stale()
        upload = Upload(str(uuid.uuid4()), new, size, sha256.lower(), 0)
        (self._folder / f"{upload.id}.part").touch()
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO uploads (id, site, owner, case_id, name, bytes, sha256, mpp, begun_s) VALUES (?,?,?,?,?,?,?,?,?)",
                (
                    upload.id,
                    *(new.site, new.owner, new.case_id, new.name, size, upload.sha256, new.mpp, time.time()),
                ),
            )
        return upload

    def _discard_stale(self) -> None:
        """Discards uploads that were begun a week ago: nobody will finish them."""
        for row in self._database.rows("SELECT id FROM uploads WHERE begun_s < ?", time.time() - _STALE_S):
            self.discard(row["id"])

    def upload(self, upload_id: str) -> Upload | None:
        """The upload of an id, with its offset; None if it is unknown, finished or refused."""
        row = self._database.row("SELECT * FROM uploads WHERE id = ?", upload_id)
        return None if row is None else _upload(row)

    async def append(self, upload: Upload, offset: int, chunk: AsyncIterator[bytes]) -> Upload | SlideRecord:
        """Appends a chunk; the last one gives the slide.

        Raises OffsetError; SlideRefusedError if the file is longer than announced, is no slide, or has another SHA-256, after
        which the upload is gone.
        """
        with self._locked(upload, offset):
            if not (self._folder / f"{upload.id}.part").exists():
                return await anyio.to_thread.run_sync(self._finish_killed, upload)
            try:
                end, digest = await self._write(upload, offset, chunk)
                with self._database.transaction() as connection:
                    connection.execute("UPDATE uploads SET offset = ? WHERE id = ?", (end, upload.id))
                self._hashes[upload.id] = (end, digest)
                if end < upload.bytes:
                    return Upload(upload.id, upload.new, upload.bytes, upload.sha256, end)
                return await anyio.to_thread.run_sync(self._finish, upload, digest.hexdigest())
            except SlideRefusedError:
                self.discard(upload.id)
                raise

    @contextmanager
    def _locked(self, upload: Upload, offset: int) -> Iterator[None]:
        """Excludes requests of all API processes that would write into this one's chunk. Raises OffsetError."""
        part = self._folder / f"{upload.id}.part"
        try:
            file = open(part if part.exists() else self._slide_path(upload), "rb")  # noqa: SIM115
        except FileNotFoundError:
            raise OffsetError(upload.bytes) from None
        with file:
            try:
                # The lock ends with the process.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_free = True
            except BlockingIOError:
                is_free = False
            current = self.upload(upload.id)
            if current is None or current.offset != offset or not is_free:
                raise OffsetError(current.offset if current else upload.bytes)
            yield

    def _finish_killed(self, upload: Upload) -> SlideRecord:
        """Adds the slide of an upload that was complete when its API process was killed."""
        record = self._add(upload, self._slide_path(upload))
        self._forget(upload.id)
        return record

    async def _write(self, upload: Upload, offset: int, chunk: AsyncIterator[bytes]) -> tuple[int, hashlib._Hash]:
        path = self._folder / f"{upload.id}.part"
        digest = await anyio.to_thread.run_sync(self._hash_so_far, upload.id, path, offset)
        end = offset
        key_name = self._vault.case_key(upload.new.site, upload.new.case_id)
        # What a broken connection left beyond the recorded end is written again.
        with self._vault.writer(path, upload.id, upload.new.site, key_name, offset) as file:

            def write(block: bytes) -> None:
                file.write(block)
                digest.update(block)

            async for block in chunk:
                if not block:
                    continue
                end += len(block)
                if end > upload.bytes:
                    raise SlideRefusedError(f"{upload.new.name}: must have {upload.bytes} bytes as announced, got more")
                await anyio.to_thread.run_sync(write, block)
            await anyio.to_thread.run_sync(file.finish if end == upload.bytes else file.end_sitting)
        if offset == 0:
            self._check_start(upload, path)
        return end, digest

    def _hash_so_far(self, upload_id: str, path: Path, offset: int) -> hashlib._Hash:
        end, digest = self._hashes.pop(upload_id, (0, hashlib.sha256()))
        if end == offset:
            return digest.copy()
        # Another API process received the chunks in between, the service was restarted, or the last chunk broke.
        end, digest = (end, digest.copy()) if end < offset else (0, hashlib.sha256())
        with self._vault.open(path, upload_id, is_finished=False) as file:
            file.seek(end)
            remaining = offset - end
            while remaining:
                block = file.read(min(_READ_BYTES, remaining))
                if not block:
                    raise SlideRefusedError("the service lost a part of the file; upload it again")
                digest.update(block)
                remaining -= len(block)
        return digest

    def _finish(self, upload: Upload, sha256: str) -> SlideRecord:
        if upload.sha256 and sha256 != upload.sha256:
            raise SlideRefusedError(
                f"{upload.new.name}: the SHA-256 must be {upload.sha256} as announced, got {sha256}; upload it again"
            )
        part, path = self._folder / f"{upload.id}.part", self._slide_path(upload)
        self._check_start(upload, part)
        with self._vault.open(part, upload.id, upload.new.site) as file:
            check_structure(upload.new.name, file, upload.bytes)
        os.replace(part, path)
        try:
            record = self._add(upload, path)
        except SlideRefusedError:
            path.unlink()
            raise
        self._forget(upload.id)
        return record

    def _add(self, upload: Upload, path: Path) -> SlideRecord:
        with self._vault.open(path, upload.id, upload.new.site) as file:
            content = content_hash_of(file, upload.bytes)
        return self._slides.add(upload.new, path, upload.id, content, upload.bytes)

    def _check_start(self, upload: Upload, path: Path) -> None:
        """Raises SlideRefusedError if a file does not begin as its format does."""
        with self._vault.open(path, upload.id, upload.new.site, is_finished=False) as file:
            start = file.read(len(_CZI_START))
        name = upload.new.name
        is_czi = Path(name).suffix.lower() == ".czi"
        if not start.startswith(_CZI_START if is_czi else STARTS):
            raise SlideRefusedError(f"{name}: does not begin as a {'CZI' if is_czi else 'TIFF'} file; check the file")

    def discard(self, upload_id: str) -> None:
        """Ends an upload without a slide."""
        self._forget(upload_id)
        (self._folder / f"{upload_id}.part").unlink(missing_ok=True)

    def _forget(self, upload_id: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM uploads WHERE id = ?", (upload_id,))
        self._hashes.pop(upload_id, None)


def _upload(row: sqlite3.Row) -> Upload:
    new = NewSlide(row["site"], row["owner"], row["case_id"], row["name"], row["mpp"])
    return Upload(row["id"], new, row["bytes"], row["sha256"], row["offset"])
