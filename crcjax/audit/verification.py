"""Verifies an audit log: its chain, its checkpoints, and the anchor files that keep these elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from crcjax.audit.checkpoint import CHECKPOINT, Checkpoint, checkpoint_of, read_anchors
from crcjax.errors import InputError
from crcjax.monitor.event_log import BrokenLine, CheckedEvent, checked_events


@dataclass(frozen=True)
class Fault:
    """The first place at which a log, or an anchor file, is not what was written: a line, counted from 1, and why."""

    file: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}: line {self.line} {self.reason}"


@dataclass(frozen=True)
class Verification:
    """How many entries and checkpoints were verified, and how many entries follow the last checkpoint."""

    entries: int
    checkpoints: int
    after_last_checkpoint: int
    fault: Fault | None = None


def verify_audit(path: Path, trusted: Sequence[str] = (), anchors: Sequence[Path] = ()) -> Verification:
    """Verifies a log from its first line to its last, or to the first fault.

    Args:
      path: the log.
      trusted: public keys as hexadecimal digits. With any, only their checkpoints count, and there must be one.
      anchors: anchor files.

    Raises:
      InputError: the log or an anchor file cannot be read.
    """
    if not path.is_file():
        raise InputError(f"{path}: there is no such log; check the path")
    states = []
    for file in anchors:
        anchored = _anchored(file, trusted)
        if isinstance(anchored, Fault):
            return Verification(0, 0, 0, anchored)
        states.append((file, anchored))
    check = _Check(path, trusted, [_AnchorFile(file, anchored) for file, anchored in states])
    for checked in checked_events(path):
        fault = (
            Fault(path, checked.line, checked.reason) if isinstance(checked, BrokenLine) else check.fault_of(checked)
        )
        if fault:
            return Verification(check.entries, check.checkpoints, check.after_last, fault)
    return Verification(check.entries, check.checkpoints, check.after_last, check.fault_at_end())


def _anchored(path: Path, trusted: Sequence[str]) -> list[Checkpoint] | Fault:
    """The checkpoints of an anchor file in their order."""
    checkpoints: list[Checkpoint] = []
    for number, line in enumerate(read_anchors(path), 1):
        try:
            checkpoint = checkpoint_of(json.loads(line))
        except ValueError:
            checkpoint = None
        if checkpoint is None or not checkpoint.is_signed(trusted):
            return Fault(path, number, "is not a checkpoint that a trusted key signed")
        if checkpoints and checkpoint.bytes <= checkpoints[-1].bytes:
            return Fault(path, number, "is a replayed checkpoint: an earlier line is as new or newer")
        checkpoints.append(checkpoint)
    return checkpoints


class _AnchorFile:
    """The checkpoints of an anchor file that the verification of the log has still to reach."""

    def __init__(self, path: Path, checkpoints: Sequence[Checkpoint]):
        self.path, self._ahead = path, list(reversed(checkpoints))
        self._known = {checkpoint.signature for checkpoint in checkpoints}
        self._first_bytes = checkpoints[0].bytes if checkpoints else None

    def contradiction(self, log: str, event: CheckedEvent) -> str:
        """Why the log up to an entry is not the one that was anchored; empty if it is."""
        if not self._ahead or event.end < self._ahead[-1].bytes:
            return ""
        checkpoint = self._ahead.pop()
        if (checkpoint.log, checkpoint.bytes, checkpoint.head) != (log, event.end, event.event.hash):
            return f"is not what {self.path} holds of {checkpoint.time}: the log was rewritten"
        return ""

    def lacks(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint of the log, made since the anchor file was begun, is not in it."""
        begun = self._first_bytes is not None and checkpoint.bytes >= self._first_bytes
        return begun and checkpoint.signature not in self._known

    @property
    def next(self) -> Checkpoint | None:
        """The first checkpoint that the log does not reach."""
        return self._ahead[-1] if self._ahead else None


class _Check:
    """The state of a verification, which reads the log entry by entry."""

    def __init__(self, path: Path, trusted: Sequence[str], anchors: Sequence[_AnchorFile]):
        self._path, self._trusted, self._anchors = path, trusted, anchors
        self._log = ""
        self.entries = self.checkpoints = self.after_last = 0

    def fault_of(self, checked: CheckedEvent) -> Fault | None:
        """Counts an entry whose place in the chain is right; returns what else is wrong with it."""
        event, self._log = checked.event, self._log or checked.event.hash
        self.entries = checked.line
        self.after_last += 1
        reason = self._checkpoint_fault(checked) if event.kind == CHECKPOINT else ""
        for file in self._anchors:
            reason = reason or file.contradiction(self._log, checked)
        return Fault(self._path, checked.line, reason) if reason else None

    def _checkpoint_fault(self, checked: CheckedEvent) -> str:
        checkpoint = checkpoint_of(checked.event.facts)
        if checkpoint is None or not checkpoint.is_signed(self._trusted):
            return "is not a checkpoint that a trusted key signed"
        if (checkpoint.log, checkpoint.bytes, checkpoint.head) != (self._log, checked.begin, checked.event.previous):
            return "is a replayed checkpoint: it was made at another place or of another log"
        self.checkpoints += 1
        self.after_last = 0
        missing = next((file.path for file in self._anchors if file.lacks(checkpoint)), None)
        return f"is a checkpoint that {missing} lacks: the anchor file was cut" if missing else ""

    def fault_at_end(self) -> Fault | None:
        """A checkpoint that should follow the last entry and does not; None if there is no such."""
        for file in self._anchors:
            if file.next is not None:
                reason = f"is missing: the log had {file.next.bytes} bytes at {file.next.time}, by {file.path}"
                return Fault(self._path, self.entries + 1, reason)
        if self._trusted and not self.checkpoints:
            return Fault(self._path, self.entries + 1, "is missing: there is no checkpoint of a trusted key")
        return None
