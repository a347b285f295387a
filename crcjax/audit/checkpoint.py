"""Signed checkpoints of an audit log: statements of the log's size and of the hash of its last line.

A chain of hashes alone does not stop someone who can write the file from computing a whole new chain, or from cutting its end
off. A checkpoint is signed with a key that such a person need not have, and its copy in an anchor file, on another system,
outlives the log.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crcjax.errors import InputError, writing
from crcjax.runs.signature import is_signed_by_hex, public_key_of, sign

# The kind of the entry that holds a checkpoint.
CHECKPOINT = "checkpoint"
_PURPOSE = b"crcjax audit checkpoint 1\n"
_HEX_DIGITS = 64


@dataclass(frozen=True)
class Checkpoint:
    """A signed statement about the beginning of a log.

    Attributes:
      log: the hash of the log's first line, which tells logs apart.
      bytes: the size of the log when it was made.
      head: the hash of the last line then.
      time: when it was made, UTC, ISO 8601.
      key: the public key, 32 bytes as hexadecimal digits.
      signature: of all of the above, as hexadecimal digits.
    """

    log: str
    bytes: int
    head: str
    time: str
    key: str
    signature: str

    def is_signed(self, trusted: Sequence[str]) -> bool:
        """Whether the signature is that of the key, and the key is one of the trusted ones; none: any key."""
        if trusted and self.key not in trusted:
            return False
        try:
            content = _signed_content(self.log, self.bytes, self.head, self.time, self.key)
            return is_signed_by_hex(self.key, content, bytes.fromhex(self.signature))
        except ValueError:
            return False


def signed_checkpoint(log: str, size: int, head: str, time: str, key: Path) -> Checkpoint:
    """Makes a checkpoint with a private key, a PEM file. Raises InputError if the key cannot be used."""
    public = public_key_of(key)
    return Checkpoint(log, size, head, time, public, sign(key, _signed_content(log, size, head, time, public)).hex())


def _signed_content(*fields: str | int) -> bytes:
    return _PURPOSE + json.dumps(fields).encode()


def checkpoint_of(values: Any) -> Checkpoint | None:
    """The checkpoint of JSON values; None if they are none."""
    try:
        checkpoint = Checkpoint(**values)
    except TypeError:
        return None
    texts = (checkpoint.log, checkpoint.head, checkpoint.time, checkpoint.key, checkpoint.signature)
    return checkpoint if isinstance(checkpoint.bytes, int) and all(isinstance(text, str) for text in texts) else None


def anchor(checkpoint: Checkpoint, path: Path) -> None:
    """Appends a checkpoint to an anchor file, and returns once it is on the disk. Raises OutputError."""
    line = (json.dumps(asdict(checkpoint)) + "\n").encode()
    with writing(path, "name another anchor file"):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = os.fstat(file).st_size
            # After a crash the last line may be unfinished; it stays, on a line of its own.
            if size and os.pread(file, 1, size - 1) != b"\n":
                line = b"\n" + line
            while line:
                line = line[os.write(file, line) :]
            os.fsync(file)
        finally:
            os.close(file)


def read_anchors(path: Path) -> list[bytes]:
    """The lines of an anchor file. Raises InputError if it cannot be read."""
    try:
        return path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(f"{path}: the anchor file cannot be read ({error.strerror}); check the path") from error
