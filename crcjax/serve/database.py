"""One SQLite file of the service: durable commits, a schema version, one connection for each thread."""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from crcjax.errors import InputError, OutputError, writing

# Seconds for which a statement waits while another process writes.
_BUSY_S = 30.0


class Database:
    """A SQLite file in WAL mode with synchronous=FULL: a committed transaction survives a crash of the machine.

    Any number of threads and processes may use the file at the same time, on one machine.

    Args:
      path: the file, created if it does not exist.
      migrations: the statements of every schema version, oldest first. An older file is brought up to date.
      synchronous: OFF for a file that may be lost with the machine.

    Raises:
      InputError: a newer release wrote the file.
      OutputError: the file cannot be written.
    """

    def __init__(self, path: Path, migrations: Sequence[Sequence[str]], synchronous: str = "FULL"):
        self._path, self._synchronous, self._local = path, synchronous, threading.local()
        with writing(path, "choose another --state", catch=(OSError, sqlite3.OperationalError)):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._migrate(migrations)

    def _migrate(self, migrations: Sequence[Sequence[str]]) -> None:
        # A file that is up to date is opened without writing, so that a full disk can still be read.
        if self._connection.execute("PRAGMA user_version").fetchone()[0] == len(migrations):
            return
        with self.transaction() as connection:
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            if version > len(migrations):
                raise InputError(
                    f"{self._path}: has schema version {version}, and this crcjax reads up to {len(migrations)}; update crcjax"
                )
            for statement in (statement for statements in migrations[version:] for statement in statements):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(migrations)}")

    @property
    def _connection(self) -> sqlite3.Connection:
        """This thread's connection; it is closed when the thread ends."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute(f"PRAGMA synchronous = {self._synchronous}")
            connection.execute("PRAGMA foreign_keys = ON")
            # Deleted content is overwritten, so that what was erased is not in the file any more.
            connection.execute("PRAGMA secure_delete = ON")
            self._local.connection = connection
        return connection

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A transaction that excludes other writers; an exception rolls it back."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
            connection.execute("COMMIT")
        except BaseException:
            # SQLite has rolled back already after some errors, such as a full disk.
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def rows(self, statement: str, *values: Any, **named: Any) -> list[sqlite3.Row]:
        """The rows of one statement, which is a transaction of its own."""
        return self._connection.execute(statement, named or values).fetchall()

    def row(self, statement: str, *values: Any, **named: Any) -> sqlite3.Row | None:
        """The first row of one statement, which is a transaction of its own."""
        rows = self._connection.execute(statement, named or values).fetchall()
        return rows[0] if rows else None

    def forget_deleted(self) -> None:
        """Moves everything out of the write-ahead log, and empties it: it may still hold what was deleted or replaced.

        Raises OutputError if readers keep it in use.
        """
        deadline = time.monotonic() + _BUSY_S
        while self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]:
            if time.monotonic() > deadline:
                raise OutputError(
                    f"{self._path}: its write-ahead log stays in use, and may hold what was erased; try again"
                )
            time.sleep(0.05)

    def close(self) -> None:
        """Closes the connection of this thread."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None
