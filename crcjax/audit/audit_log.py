"""The audit log: a hash-chained event log that also writes signed checkpoints, into itself and into anchor files elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from crcjax.audit.checkpoint import CHECKPOINT, anchor, signed_checkpoint
from crcjax.errors import CrcjaxError
from crcjax.monitor.event_log import Event, EventLog, first_hash
from crcjax.monitor.logs import log
from crcjax.runs.signature import public_key_of

# A checkpoint follows after this many entries of this process, or once this many seconds have passed since the last one.
EVERY, INTERVAL_S = 1000, 600.0


@dataclass(frozen=True)
class AuditOptions:
    """The private key that signs the log's checkpoints, by default one that the service makes, and the anchor files."""

    key: Path | None = None
    anchors: tuple[Path, ...] = ()


class AuditLog:
    """Appends to an audit log. Several processes and threads may use one file at the same time.

    Args:
      path: the log, created at the first entry.
      key: the private key that signs checkpoints, a PEM file; None: no checkpoints.
      anchors: files on other systems to which every checkpoint is copied. An anchor that cannot be written is an error.
      every: entries of this process between two checkpoints.
      interval_s: seconds after which the next entry, or `timed_checkpoints`, makes one.

    Raises:
      InputError: the key cannot be used.
    """

    def __init__(
        self,
        path: Path,
        key: Path | None = None,
        anchors: Sequence[Path] = (),
        every: int = EVERY,
        interval_s: float = INTERVAL_S,
    ):
        self.path = path
        self._key, self._anchors, self._every, self._interval_s = key, anchors, every, interval_s
        self._log, self._lock = EventLog(path), threading.Lock()
        self._entries, self._due_at = 0, time.monotonic() + interval_s
        if key is not None:
            public_key_of(key)

    def append(self, kind: str, /, **facts: Any) -> Event:
        """Appends an entry, and returns once it is on the disk, with its checkpoint if one is due. Raises OutputError."""
        event = self._log.append(kind, **facts)
        with self._lock:
            self._entries += 1
        self.checkpoint_if_due()
        return event

    def checkpoint_if_due(self) -> None:
        """Writes a checkpoint if this process has appended enough entries, or any a while ago. Raises OutputError."""
        with self._lock:
            is_due = self._entries >= self._every or (self._entries > 0 and time.monotonic() > self._due_at)
            if self._key is None or not is_due:
                return
            entries, self._entries = self._entries, 0
        try:
            self.checkpoint()
        except BaseException:
            # The next entry tries again.
            with self._lock:
                self._entries += entries
            raise

    def checkpoint(self) -> None:
        """Writes a checkpoint to the anchors, then to the log; without a key, nothing. Raises OutputError."""
        key = self._key
        if key is None:
            return

        def facts(size: int, head: str) -> Mapping[str, Any]:
            now = datetime.now(UTC).isoformat(timespec="seconds")
            checkpoint = signed_checkpoint(first_hash(self.path), size, head, now, key)
            # Anchors first: a checkpoint that the log lacks does no harm. One that an anchor file lacks would look removed.
            for path in self._anchors:
                anchor(checkpoint, path)
            return asdict(checkpoint)

        self._log.append_at_end(CHECKPOINT, facts)
        with self._lock:
            self._entries, self._due_at = 0, time.monotonic() + self._interval_s

    @contextmanager
    def timed_checkpoints(self) -> Iterator[None]:
        """Also makes checkpoints while nothing is appended, and a last one at the end of the block."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(min(5.0, self._interval_s)):
                try:
                    self.checkpoint_if_due()
                except CrcjaxError as error:
                    log.error(f"audit: {error}")

        thread = threading.Thread(target=run, name="audit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            if self._entries:
                self.checkpoint()
