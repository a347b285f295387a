"""Encrypted files: test vectors, contents of every length, and every kind of damage."""

import io
import json
import struct
from hashlib import sha256
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from crcjax.encryption import frames
from crcjax.encryption.frames import DecryptionError, FrameReader, FrameWriter, Header, decrypt, encrypt, is_encrypted

KEY = bytes(range(32))
HEADER = Header("slide-1", "leeds", "leeds/case/p1", "00")


@pytest.fixture(autouse=True)
def _small_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "FRAME_BYTES", 16)


def _write(path: Path, content: bytes, header: Header = HEADER, key: bytes = KEY) -> Path:
    with open(path, "w+b") as file:
        writer = FrameWriter(file, header, key)
        writer.write(content)
        writer.finish()
    return path


def _reader(path: Path, key: bytes = KEY, *, is_finished: bool = True) -> FrameReader:
    return FrameReader(open(path, "rb"), path, lambda header: key, is_finished=is_finished)


def _read(path: Path) -> bytes:
    parts: list[bytes] = []
    with _reader(path) as reader:
        reader.copy_to(parts.append)
    return b"".join(parts)


def _frames(content: bytes) -> tuple[bytes, list[bytes]]:
    """The header of an encrypted file, and its frames."""
    begin = 12 + struct.unpack("<I", content[8:12])[0]
    parts, place = [], begin
    while place < len(content):
        length = 4 + 12 + (struct.unpack("<I", content[place : place + 4])[0] & ~(1 << 31)) + 16
        parts.append(content[place : place + length])
        place += length
    return content[:begin], parts


def test_keys_are_wrapped_as_the_published_vector_of_aes_256_gcm_says() -> None:
    # Test case 16 of McGrew and Viega, "The Galois/Counter Mode of Operation", 2005.
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308" * 2)
    nonce = bytes.fromhex("cafebabefacedbaddecaf888")
    plain = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    cipher = bytes.fromhex(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f66276fc6ece0f4e1768cddf8853bb2d551b"
    )
    associated = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    assert decrypt(key, nonce + cipher, associated) == plain
    assert decrypt(key, encrypt(key, plain, associated), associated) == plain
    with pytest.raises(DecryptionError):
        decrypt(key, encrypt(key, plain, associated), b"another object")


def test_a_file_that_was_built_by_the_description_of_the_format_is_read(tmp_path: Path) -> None:
    values = {"format": 1, "key": "k", "object": "o", "site": "s", "wrapped": "00"}
    text = json.dumps(values).encode()
    header = b"CRCJAXE1" + struct.pack("<I", len(text)) + text
    content = header
    for number, (plain, last) in enumerate([(b"first frame", 0), (b"last", 1)]):
        nonce = bytes([number]) * 12
        associated = sha256(header).digest() + struct.pack("<QB", number, last)
        content += struct.pack("<I", len(plain) | last << 31) + nonce + AESGCM(KEY).encrypt(nonce, plain, associated)
    (tmp_path / "file").write_bytes(content)
    assert _read(tmp_path / "file") == b"first framelast"


@settings(max_examples=30, deadline=None)
@given(parts=st.lists(st.binary(max_size=70), max_size=5), sittings=st.integers(0, 5), seek=st.integers(0, 200))
def test_any_content_comes_back_however_it_was_written_and_from_any_offset(
    parts: list[bytes], sittings: int, seek: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path, content = tmp_path_factory.mktemp("file") / "file", b"".join(parts)
    offset = 0
    for number, part in enumerate(parts):
        with open(path, "r+b" if offset else "w+b") as file:
            writer = FrameWriter(file, HEADER, KEY, offset)
            writer.write(part)
            offset += len(part)
            if number == len(parts) - 1:
                writer.finish()
            else:
                writer.end_sitting()
    if not parts:
        _write(path, b"")
    assert is_encrypted(path)
    assert _read(path) == content
    with io.BufferedReader(_reader(path)) as reader:
        reader.seek(seek)
        assert reader.read(20) == content[seek : seek + 20]
        assert reader.seek(0, 2) == len(content)
        assert reader.read() == b""


def test_what_an_interrupted_sitting_left_is_written_again_under_other_nonces(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with open(path, "w+b") as file:
        writer = FrameWriter(file, HEADER, KEY)
        writer.write(b"a" * 40)
        writer.end_sitting()
        writer.write(b"b" * 40)
        writer.end_sitting()
    before = path.read_bytes()
    with _reader(path, is_finished=False) as reader:
        assert reader.size == 80
    path.write_bytes(before[:-5])
    with open(path, "r+b") as file:
        writer = FrameWriter(file, HEADER, KEY, 40)
        writer.write(b"b" * 40)
        writer.finish()
    assert _read(path) == b"a" * 40 + b"b" * 40
    first, again = _frames(before)[1], _frames(path.read_bytes())[1]
    assert first[:3] == again[:3]
    assert not {frame[4:16] for frame in first[3:]} & {frame[4:16] for frame in again[3:]}
    with open(path, "r+b") as file, pytest.raises(DecryptionError, match="no frame that ends at 41"):
        FrameWriter(file, HEADER, KEY, 41)


def test_every_changed_byte_is_refused(tmp_path: Path) -> None:
    content = _write(tmp_path / "file", b"x" * 40).read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        (tmp_path / "file").write_bytes(changed)
        with pytest.raises(DecryptionError):
            _read(tmp_path / "file")


def test_frames_that_are_cut_exchanged_repeated_or_taken_from_another_file_are_refused(tmp_path: Path) -> None:
    header, parts = _frames(_write(tmp_path / "file", b"abcdefgh" * 8).read_bytes())
    other = Header("slide-2", "leeds", "leeds/case/p1", "00")
    other_header, other_parts = _frames(_write(tmp_path / "other", b"abcdefgh" * 8, other).read_bytes())
    same_header, same_parts = _frames(_write(tmp_path / "same", b"12345678" * 8).read_bytes())
    assert len(parts) == 4
    assert same_header == header
    damaged = {
        "cut after a frame": header + b"".join(parts[:3]),
        "cut within a frame": (header + b"".join(parts))[:-1],
        "no frame": header,
        "exchanged": header + parts[1] + parts[0] + parts[2] + parts[3],
        "left out": header + parts[0] + parts[2] + parts[3],
        "repeated": header + parts[0] + parts[0] + b"".join(parts[1:]),
        "behind the end": header + b"".join(parts) + parts[3],
        "another object's header": other_header + b"".join(parts),
        "another object's frame": header + parts[0] + other_parts[1] + parts[2] + parts[3],
        "an end before the end": header + parts[0] + parts[3],
    }
    for name, content in damaged.items():
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(DecryptionError):
            pytest.fail(f"{name}: {_read(tmp_path / 'file')!r}")
    # With the same key and header, a frame of another version of the file would fit its place; each file has a key of its own.
    (tmp_path / "file").write_bytes(header + parts[0] + same_parts[1] + parts[2] + parts[3])
    assert _read(tmp_path / "file")[16:32] == b"12345678" * 2
    with pytest.raises(DecryptionError), _reader(tmp_path / "file", bytes(32)) as reader:
        reader.copy_to(lambda content: None)
