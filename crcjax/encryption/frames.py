"""Encrypted files: AES-256-GCM in frames, readable from any offset, and writable in several sittings.

    file   = "CRCJAXE1" | length of the header (u32) | header | frame …
    header = JSON: format, object, site, the name of the wrapping key, and the file's own key wrapped by it
    frame  = length of the plaintext (u32, the highest bit set in the last frame) | nonce (96 bits) | ciphertext | tag (128 bits)

Every file has a key of its own. A frame's associated data are the SHA-256 of the header, the frame's number and whether it is the
last one, so that a frame that was changed, exchanged, repeated, left out or taken from another file is refused. Nonces are random:
the frames that an interrupted upload writes again are encrypted under new ones. Integers are little-endian.
"""

from __future__ import annotations

import io
import json
import os
import struct
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from crcjax.errors import CrcjaxError

MAGIC = b"CRCJAXE1"
FORMAT = 1
KEY_BYTES = 32
FRAME_BYTES = 1 << 20
_NONCE_BYTES, _TAG_BYTES = 12, 16
_LAST = 1 << 31
_LONGEST_HEADER = 1 << 16
_U32 = struct.Struct("<I")


class DecryptionError(CrcjaxError):
    """An encrypted file, or a wrapped key, is not what was written, or belongs to another object."""


@dataclass(frozen=True)
class Header:
    """What an encrypted file states of itself.

    Attributes:
      object: the id of its content, such as a slide's.
      site: whose it is.
      key: the name of the key that wraps the file's own key.
      wrapped: the file's own key, encrypted, as hexadecimal digits.
    """

    object: str
    site: str
    key: str
    wrapped: str
    format: int = FORMAT

    def to_bytes(self) -> bytes:
        """The beginning of the file."""
        text = json.dumps(asdict(self), sort_keys=True).encode()
        return MAGIC + _U32.pack(len(text)) + text


def encrypt(key: bytes, content: bytes, associated: bytes) -> bytes:
    """A nonce and the ciphertext of a short content."""
    nonce = os.urandom(_NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, associated)


def decrypt(key: bytes, content: bytes, associated: bytes) -> bytes:
    """The inverse of `encrypt`. Raises DecryptionError."""
    try:
        return AESGCM(key).decrypt(content[:_NONCE_BYTES], content[_NONCE_BYTES:], associated)
    except (InvalidTag, ValueError) as error:
        raise DecryptionError("a wrapped key is damaged, or another key wrapped it") from error


def is_encrypted(path: Path) -> bool:
    """Whether a file begins as an encrypted one does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(file: IO[bytes], path: Path) -> Header:
    """Reads the header at the beginning of a file. Raises DecryptionError."""
    try:
        if file.read(len(MAGIC)) != MAGIC:
            raise ValueError
        size = _U32.unpack(file.read(_U32.size))[0]
        header = Header(**json.loads(file.read(min(size, _LONGEST_HEADER))))
        # Any other spelling of the same values would be another header to the frames.
        if header.format != FORMAT or len(header.to_bytes()) != file.tell():
            raise ValueError
    except (ValueError, TypeError, struct.error) as error:
        raise DecryptionError(f"{path.name}: is not a file that this version of crcjax encrypted") from error
    return header


class FrameWriter:
    """Appends a content to an encrypted file, in as many sittings as needed.

    Args:
      file: open for reading and writing; a new one receives the header.
      header: the file's.
      key: the file's own key, 32 bytes.
      offset: the bytes of the content that are there already; whatever follows them is written again.

    Raises:
      DecryptionError: no frame ends at `offset`.
    """

    def __init__(self, file: IO[bytes], header: Header, key: bytes, offset: int = 0):
        self._file, self._cipher = file, AESGCM(key)
        beginning = header.to_bytes()
        self._digest = sha256(beginning).digest()
        self._held = b""
        file.seek(0)
        if offset:
            file.seek(len(beginning))
            ends, places, _ = _index(file)
            if offset not in ends:
                raise DecryptionError(f"the file has no frame that ends at {offset}")
            self._number = ends.index(offset) + 1
            place, length, _ = places[self._number - 1]
            file.seek(place + length)
        else:
            self._number = 0
            file.write(beginning)
        file.truncate()

    def write(self, content: bytes | memoryview) -> None:
        """Appends; frames that are full, and not the last one, are written at once."""
        # One byte at least is held back: the last frame must say that it is the last one.
        part = memoryview(content)
        if self._held:
            missing = FRAME_BYTES - len(self._held)
            if missing:
                self._held = bytes(self._held) + part[:missing]
                part = part[missing:]
            if not part:
                return
            self._write_frame(self._held, is_last=False)
        while len(part) > FRAME_BYTES:
            self._write_frame(part[:FRAME_BYTES], is_last=False)
            part = part[FRAME_BYTES:]
        # A whole frame of bytes, which cannot change, is held without a copy.
        self._held = content if isinstance(content, bytes) and len(part) == len(content) else bytes(part)

    def end_sitting(self) -> None:
        """Writes what is held back; another sitting follows."""
        if self._held:
            self._write_frame(self._held, is_last=False)
            self._held = b""

    def finish(self) -> None:
        """Writes the last frame; without it, a reader takes the file for a cut one."""
        self._write_frame(self._held, is_last=True)
        self._held = b""

    def _write_frame(self, content: bytes | memoryview, *, is_last: bool) -> None:
        nonce = os.urandom(_NONCE_BYTES)
        ciphertext = self._cipher.encrypt(nonce, content, _associated(self._digest, self._number, is_last))
        self._file.write(_U32.pack(len(content) | (_LAST if is_last else 0)) + nonce)
        self._file.write(ciphertext)
        self._number += 1


class FrameReader(io.RawIOBase):
    """The content of an encrypted file, as a file that is open for reading from any offset.

    Args:
      file: the encrypted file; it is closed with this one.
      path: named in errors.
      open_key: the file's own key, from its header.
      check: raises DecryptionError for a header that is not of the object that is wanted.
      is_finished: False for a file whose last frame is still to come.

    Raises:
      DecryptionError: here, or later from `readinto`.
    """

    def __init__(
        self,
        file: IO[bytes],
        path: Path,
        open_key: Callable[[Header], bytes],
        check: Callable[[Header], None] = lambda header: None,
        *,
        is_finished: bool = True,
    ):
        super().__init__()
        self._file, self._path = file, path
        self.header = read_header(file, path)
        check(self.header)
        self._digest = sha256(self.header.to_bytes()).digest()
        self._ends, self._places, last = _index(file)
        if is_finished and (last != len(self._places) - 1 or not self._places or self._is_cut()):
            raise DecryptionError(f"{path.name}: was cut, or has bytes behind its end")
        self._cipher = AESGCM(open_key(self.header))
        self._offset, self._number, self._content = 0, -1, b""

    def _is_cut(self) -> bool:
        place, length, _ = self._places[-1]
        return place + length != os.fstat(self._file.fileno()).st_size

    @property
    def size(self) -> int:
        """The bytes of the content."""
        return self._ends[-1] if self._ends else 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._offset

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._offset, os.SEEK_END: self.size}[whence]
        self._offset = max(0, base + offset)
        return self._offset

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        if self._offset >= self.size:
            # A file without a content has one frame, which is verified too.
            if self._places and self._number < 0:
                self._decrypt(len(self._places) - 1)
            return 0
        number = bisect_right(self._ends, self._offset)
        if number != self._number:
            self._decrypt(number)
        begin = self._ends[number - 1] if number else 0
        part = memoryview(self._content)[self._offset - begin : self._offset - begin + len(buffer)]
        buffer[: len(part)] = part
        self._offset += len(part)
        return len(part)

    def copy_to(self, write: Callable[[bytes], object]) -> None:
        """Gives the whole content to `write`, frame by frame."""
        for number in range(len(self._places)):
            self._decrypt(number)
            write(self._content)

    def _decrypt(self, number: int) -> None:
        place, length, is_last = self._places[number]
        self._file.seek(place + _U32.size)
        frame = self._file.read(length - _U32.size)
        associated = _associated(self._digest, number, is_last)
        try:
            self._content = self._cipher.decrypt(frame[:_NONCE_BYTES], memoryview(frame)[_NONCE_BYTES:], associated)
        except (InvalidTag, ValueError) as error:
            raise DecryptionError(
                f"{self._path.name}: frame {number} was changed, or does not belong to this place"
            ) from error
        self._number = number

    def close(self) -> None:
        self._file.close()
        super().close()


def _associated(header_digest: bytes, number: int, is_last: bool) -> bytes:
    return header_digest + struct.pack("<QB", number, is_last)


def _index(file: IO[bytes]) -> tuple[list[int], list[tuple[int, int, bool]], int]:
    """The frames from a file's place on: where the content of each ends; its place, length and whether it is the last one.

    Also the number of the last one, -1 without it. A frame that is cut is left out.
    """
    ends: list[int] = []
    places: list[tuple[int, int, bool]] = []
    place, end, last, size = file.tell(), 0, -1, os.fstat(file.fileno()).st_size
    while place + _U32.size <= size and last < 0:
        file.seek(place)
        value = _U32.unpack(file.read(_U32.size))[0]
        content_bytes, is_last = value & ~_LAST, bool(value & _LAST)
        length = _U32.size + _NONCE_BYTES + content_bytes + _TAG_BYTES
        if place + length > size:
            break
        end += content_bytes
        ends.append(end)
        places.append((place, length, is_last))
        last = len(places) - 1 if is_last else -1
        place += length
    return ends, places, last
