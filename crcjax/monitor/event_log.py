"""A hash-chained, append-only log of events as JSON lines.

Every line carries the SHA-256 of the line before it, and the SHA-256 of its own text:

    {"time": "2026-01-31T12:00:00.123456+00:00", "kind": "saved", "facts": {"step": 50}, "previous": "…", "hash": "…"}

An edited, inserted, exchanged or removed line breaks the chain, and `verify` finds it. Whoever can write the file could still
compute a whole new chain, or remove its last lines: `verify` finds this too if it is given a `Head` that was kept elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from crcjax.errors import writing

# The event log of a run, in its directory.
EVENTS = "events.jsonl"
# The `previous` of the first line.
START = "0" * 64
# The kind of the entry that takes the place of an unfinished line.
REPAIRED = "log_repaired"
_BEFORE_HASH = b', "hash": "'
_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Event:
    """One entry: when it was written (UTC, ISO 8601), what happened, and its place in the chain."""

    time: str
    kind: str
    facts: dict[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True)
class Head:
    """The number of lines of a log and the hash of the last one. Kept elsewhere, it vouches for everything up to there."""

    lines: int
    hash: str


@dataclass(frozen=True)
class BrokenLine:
    """The first line, counted from 1, at which a log is not what was written, and why.

    `is_unfinished`: a crash or a full disk interrupted its writing. The next append replaces it by an entry that says so.
    """

    line: int
    reason: str
    is_unfinished: bool = False


@dataclass(frozen=True)
class CheckedEvent:
    """An entry that follows from the ones before it, with its line, counted from 1, and the bytes of the log before and after it."""

    line: int
    event: Event
    begin: int
    end: int


@dataclass
class _Waiting:
    """An entry that an `append` waits for; `facts` is JSON."""

    kind: str
    facts: str
    event: Event | None = None
    error: Exception | None = None


class EventLog:
    """Appends to the log at `path`, which is created at the first append.

    Several processes and threads may append to one file at the same time. The file must be on a file system with locks.
    Entries that threads append while another one waits for the disk are written together, with one fsync.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        self._lock, self._waiting_lock = threading.Lock(), threading.Lock()
        self._waiting: list[_Waiting] = []
        # The file's size after this object's last append, and the last line's hash: the file need not be read if no other
        # process appended since.
        self._size, self._hash = 0, START

    def append(self, kind: str, /, **facts: Any) -> Event:
        """Appends an entry, and returns once it is on the disk.

        `facts` are JSON values or paths. Numbers that are not finite are written as text, since JSON has none. Raises
        OutputError if the file cannot be written; it then ends with the entry before.
        """
        entry = _Waiting(kind, json.dumps(_plain(facts), allow_nan=False))
        with self._waiting_lock:
            self._waiting.append(entry)
        with self._lock:
            # The thread that held the lock before may have written this entry with its own.
            if entry.event is None and entry.error is None:
                self._write_waiting()
        if entry.error is not None:
            raise entry.error
        assert entry.event is not None
        return entry.event

    def append_all(self, entries: Sequence[tuple[str, Mapping[str, Any]]]) -> list[Event]:
        """Appends entries, each its kind and its facts, with one fsync; all of them or none. Raises OutputError."""
        texts = [(kind, json.dumps(_plain(facts), allow_nan=False)) for kind, facts in entries]
        with self._lock, writing(self._path, "write to another place"):
            file = self._open()
            try:
                return self._write(file, texts)
            finally:
                # Closing releases the lock.
                os.close(file)

    def append_at_end(self, kind: str, facts_at: Callable[[int, str], Mapping[str, Any]]) -> Event | None:
        """Appends an entry about the log itself: `facts_at` receives the log's size in bytes and the hash of its last line.

        No process appends meanwhile. Nothing is appended to an empty log. Raises OutputError.
        """
        with self._lock, writing(self._path, "write to another place"):
            file = self._open()
            try:
                if not self._size:
                    return None
                facts = json.dumps(_plain(facts_at(self._size, self._hash)), allow_nan=False)
                return self._write(file, [(kind, facts)])[0]
            finally:
                os.close(file)

    def _write_waiting(self) -> None:
        with self._waiting_lock:
            entries, self._waiting = self._waiting, []
        try:
            with writing(self._path, "write to another place"):
                file = self._open()
                try:
                    events = self._write(file, [(entry.kind, entry.facts) for entry in entries])
                finally:
                    os.close(file)
            for entry, event in zip(entries, events, strict=True):
                entry.event = event
        except Exception as error:
            for entry in entries:
                entry.error = error

    def _open(self) -> int:
        """The locked file, whose last line is whole."""
        is_new = not self._path.exists()
        if is_new:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_new:
                _sync_folder(self._path.parent)
            self._repair(file)
        except BaseException:
            os.close(file)
            raise
        return file

    def _repair(self, file: int) -> None:
        """Finds the end of the chain; cuts an unfinished last line off, and appends an entry that says so."""
        size = os.fstat(file).st_size
        if size == self._size:
            return
        last_line, unfinished = _tail(file, size)
        self._size, self._hash = size - len(unfinished), _hash_of(last_line)
        if unfinished:
            os.ftruncate(file, self._size)
            facts = {"bytes": len(unfinished), "sha256": sha256(unfinished).hexdigest()}
            self._write(file, [(REPAIRED, json.dumps(facts))])

    def _write(self, file: int, entries: Sequence[tuple[str, str]]) -> list[Event]:
        """Appends entries, each its kind and its facts as JSON."""
        events, lines, previous = [], b"", self._hash
        for kind, facts in entries:
            time = datetime.now(UTC).isoformat(timespec="microseconds")
            body = (
                f'{{"time": "{time}", "kind": {json.dumps(kind)}, "facts": {facts}, "previous": "{previous}"'.encode()
            )
            digest = sha256(body).hexdigest()
            lines += body + _suffix(digest)
            events.append(Event(time, kind, json.loads(facts), previous, digest))
            previous = digest
        try:
            written = 0
            while written < len(lines):
                written += os.write(file, lines[written:])
            os.fsync(file)
        except OSError:
            # A full disk takes a part of a line.
            os.ftruncate(file, self._size)
            raise
        self._size, self._hash = self._size + len(lines), previous
        return events


def read_events(path: str | Path) -> list[Event]:
    """The entries of a log, oldest first; empty if there is no file. Lines that cannot be read are left out: see `verify`."""
    if not Path(path).exists():
        return []
    return [event for line in _lines(Path(path)) if line.endswith(b"\n") and (event := _parsed(line))]


def events_from(path: str | Path, start: int) -> Iterator[tuple[Event, int]]:
    """The entries that begin at the byte `start` or behind it, each with the byte at which the next one begins.

    Lines that cannot be read are left out, and one that is not finished ends the entries.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        if start:
            # The rest of a line that began before.
            file.seek(start - 1)
            file.readline()
        while (line := file.readline()).endswith(b"\n"):
            event = _parsed(line)
            if event is not None:
                yield event, file.tell()


def head(path: str | Path) -> Head:
    """The current head of a log, to be kept where its writers cannot change it."""
    lines, last = 0, b""
    if Path(path).exists():
        for line in _lines(Path(path)):
            if line.endswith(b"\n"):
                lines, last = lines + 1, line
    return Head(lines, _hash_of(last))


def first_hash(path: str | Path) -> str:
    """The hash of a log's first line, which tells logs apart; START without one."""
    for line in _lines(Path(path)) if Path(path).exists() else ():
        return _hash_of(line)
    return START


def verify(path: str | Path, trusted: Head | None = None) -> BrokenLine | None:
    """The first line that was edited, inserted, exchanged, removed or not finished; None if the log is whole.

    With a `trusted` head, a log that was shortened or rewritten since is found too. Changes nothing.
    """
    number = 0
    for checked in checked_events(path):
        if isinstance(checked, BrokenLine):
            return checked
        number = checked.line
        if trusted and number == trusted.lines and checked.event.hash != trusted.hash:
            return BrokenLine(number, "is not the line of the trusted head: the log was rewritten")
    if trusted and number < trusted.lines:
        return BrokenLine(number + 1, f"is missing: the log had {trusted.lines} lines")
    return None


def checked_events(path: str | Path) -> Iterator[CheckedEvent | BrokenLine]:
    """Yields the entries of a log as long as each is what was written and follows from the one before.

    The last item is a BrokenLine if one is not. A log without a file has no entries.
    """
    previous, begin = START, 0
    for number, line in enumerate(_lines(Path(path)) if Path(path).exists() else (), 1):
        if not line.endswith(b"\n"):
            yield BrokenLine(number, "is unfinished: a crash or a full disk interrupted its writing", True)
            return
        event, body = _parsed(line), _body(line)
        if event is None or line != body + _suffix(sha256(body).hexdigest()):
            yield BrokenLine(number, "was changed: its hash is not that of its text")
            return
        if event.previous != previous:
            yield BrokenLine(number, "does not follow the line before: lines were removed, inserted or exchanged")
            return
        yield CheckedEvent(number, event, begin, begin + len(line))
        previous, begin = event.hash, begin + len(line)


def _body(line: bytes) -> bytes:
    """A line without its own hash."""
    return line[: line.rfind(_BEFORE_HASH)]


def _suffix(digest: str) -> bytes:
    return _BEFORE_HASH + digest.encode() + b'"}\n'


def _parsed(line: bytes) -> Event | None:
    """The entry of a line; None if it is none, whatever its hash."""
    try:
        values = json.loads(line)
        event = Event(**values)
    except (ValueError, TypeError):
        return None
    texts = (event.time, event.kind, event.previous, event.hash)
    return event if all(isinstance(text, str) for text in texts) and isinstance(event.facts, dict) else None


def _hash_of(line: bytes) -> str:
    """The hash that the line after `line` refers to."""
    if not line:
        return START
    event = _parsed(line)
    # The log goes on after a damaged line, which `verify` names.
    return event.hash if event else sha256(line).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


def _tail(file: int, size: int) -> tuple[bytes, bytes]:
    """The last whole line of a file, and the bytes after it."""
    tail, start = b"", size
    while start > 0 and tail.count(b"\n") < 2:
        begin = max(0, start - _BLOCK_BYTES)
        tail, start = os.pread(file, start - begin, begin) + tail, begin
    whole, newline, unfinished = tail.rpartition(b"\n")
    return whole.rpartition(b"\n")[2] + newline, unfinished


def _sync_folder(folder: Path) -> None:
    """Makes a new file's name as durable as its content."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
