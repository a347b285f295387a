"""Uploads lose nothing and accept nothing else than was announced."""

import hashlib
import shutil
import sqlite3
import struct
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from crcjax.serve.queue import JobRequest, Status
from crcjax.serve.service import Service, open_service
from crcjax.serve.slide_records import NewSlide, SlideRecord, SlideRefusedError
from crcjax.serve.uploads import NoRoomError, OffsetError, Upload, Uploads

# A TIFF file's shortest beginning that the service accepts: one directory, without an image.
TIFF_START = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0)
CONTENT = TIFF_START + bytes(range(256)) * 40
NEW = NewSlide("leeds", "dr.frost", "A-017", "a.svs")


def _append(
    uploads: Uploads, upload: Upload, offset: int, content: bytes, breaks: bool = False
) -> Upload | SlideRecord:
    async def chunk() -> AsyncIterator[bytes]:
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]
        if breaks:
            raise ConnectionError

    async def append() -> Upload | SlideRecord:
        return await uploads.append(upload, offset, chunk())

    # In a thread: tests of pages leave an event loop running in this one.
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(anyio.run, append).result()


@pytest.fixture
def uploads(open_state: Callable[..., Service]) -> Uploads:
    return open_state().uploads


def test_a_broken_chunk_is_sent_again_and_another_start_of_the_service_goes_on(
    uploads: Uploads, open_state: Callable[..., Service], tmp_path: Path
) -> None:
    upload = uploads.begin(NEW, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert _append(uploads, upload, 0, CONTENT[:3000]).offset == 3000
    with pytest.raises(ConnectionError):
        _append(uploads, upload, 3000, b"x" * 2500, breaks=True)
    for offset in (0, 2999, 5500):
        with pytest.raises(OffsetError) as caught:
            _append(uploads, upload, offset, b"x")
        assert caught.value.offset == 3000
    restarted = open_state()
    slide = _append(restarted.uploads, upload, 3000, CONTENT[3000:])
    assert isinstance(slide, SlideRecord)
    assert slide.path.read_bytes() == CONTENT
    assert slide.path.parent == tmp_path / "state" / "slides"
    assert restarted.slides.slide(upload.id) == slide
    assert restarted.uploads.upload(upload.id) is None
    assert not list((tmp_path / "state" / "uploads").iterdir())


def test_a_complete_upload_whose_slide_was_not_yet_added_is_added_at_the_next_start(
    uploads: Uploads, open_state: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = uploads.begin(NEW, len(CONTENT), "")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(uploads._slides, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            _append(uploads, upload, 0, CONTENT)
    slide = open_state().slides.slide(upload.id)
    assert slide is not None
    assert slide.path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("content", "sha256", "words"),
    [
        (CONTENT + b"x", "", "must have 10266 bytes as announced"),
        (CONTENT, "0" * 64, "the SHA-256 must be 0000"),
        (b"PK\3\4" + CONTENT[4:], "", "does not begin as a TIFF file"),
        (CONTENT[:22] + struct.pack("<I", 8) + CONTENT[26:], "", "a directory at byte 8 that leads back to itself"),
    ],
)
def test_what_is_not_as_announced_is_refused_and_removed(
    content: bytes, sha256: str, words: str, uploads: Uploads, tmp_path: Path
) -> None:
    upload = uploads.begin(NEW, len(CONTENT), sha256)
    with pytest.raises(SlideRefusedError, match=words):
        _append(uploads, upload, 0, content)
    assert uploads.upload(upload.id) is None
    assert not list((tmp_path / "state" / "uploads").iterdir())
    assert not list((tmp_path / "state" / "slides").iterdir())


@pytest.mark.parametrize("name", ["a.exe", "a", "../../a.zip", "a.mrxs"])
def test_other_names_are_refused_before_a_byte_is_sent(name: str, uploads: Uploads) -> None:
    with pytest.raises(SlideRefusedError, match="name must end with one of"):
        uploads.begin(NewSlide("leeds", "dr.frost", "A", name), 10, "")


def test_an_upload_that_nobody_finished_is_discarded_after_a_week(
    uploads: Uploads, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = uploads.begin(NEW, 10, "")
    later = time.time() + 8 * 24 * 3600
    monkeypatch.setattr("crcjax.serve.uploads.time.time", lambda: later)
    second = uploads.begin(NEW, 10, "")
    assert uploads.upload(first.id) is None
    assert uploads.upload(second.id) == second


def test_a_full_disk_refuses_what_cannot_be_stored_and_loses_nothing(
    small_disk: Path, bundle_folder: Path, tmp_path: Path
) -> None:
    service = open_service(small_disk / "state", bundle_folder, {})
    with pytest.raises(NoRoomError, match="no room for 10 bytes"):
        service.uploads.begin(NEW, 10, "")
    accepted = set()

    def fill() -> None:
        for number in range(10_000):
            request = JobRequest(str(number), "leeds/dr.frost", {"text": "x" * 20_000})
            accepted.add(service.queue.submit(request).id)

    for _ in range(2):
        with pytest.raises(sqlite3.OperationalError, match="full"):
            fill()
    assert len(accepted) > 20
    # It is still read where it is, and goes on where there is room.
    shutil.copytree(small_disk / "state", tmp_path / "state")
    roomy = open_service(tmp_path / "state", bundle_folder, {})
    for opened in (service, roomy):
        assert all(opened.queue.job(job_id) is not None for job_id in accepted)
        assert opened.queue.stats().counts == {Status.QUEUED: len(accepted)}
    assert roomy.queue.claim("w") is not None
