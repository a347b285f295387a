"""Encryption at rest: writing and reading a large encrypted file, against the package cryptography on the same frames.

python tools/bench_encryption.py
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from record import Row, record

from crcjax.encryption.frames import FRAME_BYTES, FrameReader, FrameWriter, Header
from crcjax.encryption.memory import memory_folder

MIB, ROUNDS = 512, 7
KEY, HEADER = bytes(range(32)), Header("object", "site", "key", "00")


def main() -> None:
    """Measures and records."""
    frames = [os.urandom(FRAME_BYTES) for _ in range(MIB)]
    with memory_folder() as folder:
        measures: dict[str, Callable[[], object]] = {
            "cryptography: encrypt and write": lambda: write_by_hand(folder / "rival", frames),
            "crcjax: encrypt and write": lambda: write(folder / "file", frames),
            "cryptography: read and decrypt": lambda: read_by_hand(folder / "rival"),
            "crcjax: read and decrypt": lambda: read(folder / "file"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in measures}
        for _ in range(ROUNDS):
            for name, measure in measures.items():
                began = time.perf_counter()
                measure()
                seconds[name].append(time.perf_counter() - began)
    speed = {name: MIB / statistics.median(values) for name, values in seconds.items()}
    rows = []
    for name, value in speed.items():
        rival = name.replace("crcjax", "cryptography")
        rows.append(Row(name, value, "MiB/s", value / speed[rival] if rival != name else None, rival * (rival != name)))
    about = (
        "Encryption at rest: a file of 512 MiB in frames of 1 MiB, one thread.\n\nThe rival is the package cryptography in a plain"
        " loop over the same frames: it neither numbers nor binds them, and has no index. Both write to and read from a file in"
        " memory (tmpfs). Medians of 7 rounds that take turns. Target: 0.8."
    )
    record("encryption", "python tools/bench_encryption.py", rows, about)


def write_by_hand(path: Path, frames: list[bytes]) -> None:
    cipher = AESGCM(KEY)
    with open(path, "w+b") as file:
        for frame in frames:
            nonce = os.urandom(12)
            file.write(nonce)
            file.write(cipher.encrypt(nonce, frame, b""))


def read_by_hand(path: Path) -> None:
    cipher = AESGCM(KEY)
    with open(path, "rb", buffering=0) as file:
        while nonce := file.read(12):
            cipher.decrypt(nonce, file.read(FRAME_BYTES + 16), b"")


def write(path: Path, frames: list[bytes]) -> None:
    with open(path, "w+b") as file:
        writer = FrameWriter(file, HEADER, KEY)
        for frame in frames:
            writer.write(frame)
        writer.finish()


def read(path: Path) -> None:
    with FrameReader(open(path, "rb"), path, lambda header: KEY) as reader:
        reader.copy_to(lambda content: None)


if __name__ == "__main__":
    main()
