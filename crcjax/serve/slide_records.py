"""The slides that the service knows: uploaded ones, which it stores, and those by reference, which stay where they are."""

from __future__ import annotations

import io
import os
import sqlite3
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from crcjax.errors import CrcjaxError, SlideError
from crcjax.serve.database import Database
from crcjax.slides.wsi.discovery import content_hash, first_file
from crcjax.slides.wsi.tiff_structure import STARTS, StructureError, check_tiff

MIGRATIONS = (
    (
        """CREATE TABLE slides (
          sequence INTEGER PRIMARY KEY AUTOINCREMENT,
          id TEXT NOT NULL UNIQUE,
          site TEXT NOT NULL,
          owner TEXT NOT NULL,
          case_id TEXT NOT NULL,
          name TEXT NOT NULL,
          path TEXT NOT NULL,
          bytes INTEGER NOT NULL,
          content TEXT NOT NULL,
          mpp REAL,
          added_s REAL NOT NULL
        )""",
        """CREATE TABLE uploads (
          id TEXT PRIMARY KEY,
          site TEXT NOT NULL,
          owner TEXT NOT NULL,
          case_id TEXT NOT NULL,
          name TEXT NOT NULL,
          bytes INTEGER NOT NULL,
          sha256 TEXT NOT NULL,
          mpp REAL,
          offset INTEGER NOT NULL DEFAULT 0,
          begun_s REAL NOT NULL
        )""",
    ),
)


class SlideRefusedError(CrcjaxError):
    """A slide cannot be added."""


@dataclass(frozen=True)
class NewSlide:
    """What is known of a slide before it is added; `name` is for people only, and never part of a path."""

    site: str
    owner: str
    case_id: str
    name: str
    mpp: float | None = None


@dataclass(frozen=True)
class SlideRecord:
    """A slide: its place and the hash of its content (`slides.wsi.discovery.content_hash`)."""

    id: str
    site: str
    owner: str
    case_id: str
    name: str
    path: Path
    bytes: int
    content: str
    mpp: float | None
    added_s: float


class SlideRecords:
    """The table of slides.

    Args:
      database: its tables are those of MIGRATIONS.
      folders: the folders of each site in which slides may be named by reference.
    """

    def __init__(self, database: Database, folders: Mapping[str, Sequence[Path]]):
        self._database = database
        self._folders = {site: [folder.resolve() for folder in of_site] for site, of_site in folders.items()}

    def add_reference(self, new: NewSlide, path: str) -> SlideRecord:
        """Adds a slide that lies in a folder of its site.

        Raises SlideRefusedError if it lies elsewhere, also by a link, or is no slide file or DICOM folder.
        """
        resolved = Path(path).resolve()
        if not any(resolved.is_relative_to(folder) for folder in self._folders.get(new.site, ())):
            # The same words for a path that does not exist, so that the reply does not tell what there is.
            raise SlideRefusedError(f"path must lie in a folder that the service offers to {new.site}, got {path!r}")
        return self.add(new, resolved)

    def add(
        self, new: NewSlide, path: Path, slide_id: str | None = None, content: str = "", size: int = 0
    ) -> SlideRecord:
        """Adds a slide file or DICOM folder. Raises SlideRefusedError.

        `content` and `size` are given for a file that is encrypted: those of the slide in it.
        """
        try:
            file = first_file(path)
            if not content:
                content = content_hash(path)
                with open(file, "rb") as opened:
                    check_structure(new.name, opened, file.stat().st_size)
        except SlideError as error:
            raise SlideRefusedError(f"{new.name}: {error.reason}; {error.remedy}") from error
        except OSError as error:
            raise SlideRefusedError(f"{new.name}: cannot be read ({error.strerror}); check the file") from error
        size = size or _bytes_of(path)
        record = SlideRecord(
            id=slide_id or str(uuid.uuid4()),
            path=path,
            bytes=size,
            content=content,
            added_s=time.time(),
            **vars(new),
        )
        with self._database.transaction() as connection:
            connection.execute(
                """INSERT INTO slides (id, site, owner, case_id, name, path, bytes, content, mpp, added_s)
                VALUES (:id, :site, :owner, :case_id, :name, :path, :bytes, :content, :mpp, :added_s)
                ON CONFLICT (id) DO NOTHING""",
                {**vars(record), "path": str(path)},
            )
        return record

    def slide(self, slide_id: str) -> SlideRecord | None:
        """The slide of an id."""
        row = self._database.row("SELECT * FROM slides WHERE id = ?", slide_id)
        return None if row is None else _record(row)


def check_structure(name: str, file: io.BufferedReader, size: int) -> None:
    """Raises SlideRefusedError for a TIFF file that native code should not read; files of other formats pass."""
    file.seek(0)
    if file.read(4) in STARTS:
        try:
            check_tiff(file, size)
        except StructureError as error:
            raise SlideRefusedError(f"{name}: {error}; export the slide again") from error


def _bytes_of(path: Path) -> int:
    return os.path.getsize(path) if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def _record(row: sqlite3.Row) -> SlideRecord:
    values = {name: row[name] for name in row.keys() if name != "sequence"}  # noqa: SIM118
    return SlideRecord(**{**values, "path": Path(values["path"])})
