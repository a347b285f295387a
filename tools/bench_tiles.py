"""Tiles of a slide through sign-in, scope check and ETag, in one process, compared with large_image behind the same endpoint.

large_image is no dependency of crcjax. Its rows are measured if it can be imported:

    pip install large-image large-image-source-tiff large-image-source-openslide
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import multiprocessing
import socket
import ssl
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import uvicorn
from record import Row, record

from crcjax.serve.app import create_app
from crcjax.serve.permissions import Role
from crcjax.serve.service import open_service
from crcjax.serve.slide_records import NewSlide, SlideRecord
from crcjax.serve.slide_tiles import SlideTiles
from crcjax.serve.tls import certificate_files
from crcjax.serve.vault import Vault
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

SIZE_PX = (16384, 12288)
TILE_PX = 256
CONNECTIONS = 8
ROUNDS = 2
TARGET_TILES_S, TARGET_P99_MS = 1000, 20


class _LargeImageTiles(SlideTiles):
    """The tiles of large_image, in place of ours."""

    def __init__(self, vault: Vault) -> None:
        super().__init__(vault)
        self._sources: dict[Path, object] = {}

    def cached_tile(self, record: SlideRecord, level: int, column: int, row: int) -> bytes | None:
        """large_image has a cache of its own."""
        return None

    def tile(self, record: SlideRecord, level: int, column: int, row: int) -> bytes:
        import large_image

        if record.path not in self._sources:
            self._sources[record.path] = large_image.open(str(record.path))
        source = self._sources[record.path]
        # Deep Zoom counts levels from one pixel, large_image from one tile.
        return source.getTile(column, row, level - TILE_PX.bit_length() + 1)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Address:
    """Where the service answers, and with what."""

    port: int
    token: str
    slide: str
    certificate: str


def serve(slide: str, is_rival: bool, is_tls: bool, connection: Connection) -> None:
    """Serves one slide until the process is ended; sends the address."""
    state = Path(tempfile.mkdtemp())
    bundle = state / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text(json.dumps({"target": {"name": "subtype", "classes": ["a", "b"]}}))
    service = open_service(state / "state", bundle, {"leeds": [Path(slide).parent]})
    service.accounts.redeem(service.accounts.invite("dr.frost", Role.PATHOLOGIST, "leeds"), "correct horse battery")
    token, _ = service.accounts.sign_in("dr.frost", "correct horse battery")
    record = service.slides.add_reference(NewSlide("leeds", "dr.frost", "A", "a.svs"), slide)
    app = create_app(service)
    if is_rival:
        app.state.viewer.tiles = _LargeImageTiles(service.vault)
    certificate, key = certificate_files(state / "tls", "127.0.0.1")
    listener = socket.create_server(("127.0.0.1", 0))
    connection.send(Address(listener.getsockname()[1], token, record.id, str(certificate)))
    tls = {"ssl_certfile": str(certificate), "ssl_keyfile": str(key)} if is_tls else {}
    uvicorn.Server(uvicorn.Config(app, log_level="warning", **tls)).run([listener])


async def _load(
    address: Address, requests: list[tuple[str, str]], is_tls: bool
) -> tuple[float, list[float], list[tuple[int, str, str]]]:
    """Sends (path, ETag) over CONNECTIONS connections; returns the seconds, those of each request, and status and ETag."""
    context = ssl.create_default_context(cafile=address.certificate) if is_tls else None
    pending = list(reversed(requests))
    times: list[float] = []
    answers: list[tuple[int, str, str]] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", address.port, ssl=context)
        while pending:
            path, etag = pending.pop()
            known = f"If-None-Match: {etag}\r\n" if etag else ""
            begun = time.monotonic()
            writer.write(
                f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {address.token}\r\n{known}\r\n".encode()
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            headers = dict(line.split(": ", 1) for line in head.splitlines()[1:] if line)
            await reader.readexactly(int(headers.get("content-length", 0)))
            times.append(time.monotonic() - begun)
            answers.append((int(head.split()[1]), path, headers.get("etag", "")))
        writer.close()

    begun = time.monotonic()
    await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return time.monotonic() - begun, times, answers


@dataclass(frozen=True)
class Measured:
    """Tiles a second, and the 99th percentile of the milliseconds of a request."""

    tiles_s: float
    p99_ms: float


def measure(slide: Path, is_rival: bool, is_tls: bool) -> dict[str, Measured]:
    """Every native tile of the slide once, once more from memory, and once more by its ETag."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(str(slide), is_rival, is_tls, theirs))
    process.start()
    address = ours.recv()
    level = math.ceil(math.log2(max(SIZE_PX)))
    paths = [
        f"/v1/slides/{address.slide}/image_files/{level}/{column}_{row}.jpeg"
        for row in range(SIZE_PX[1] // TILE_PX)
        for column in range(SIZE_PX[0] // TILE_PX)
    ]
    np.random.default_rng(0).shuffle(paths)
    results: dict[str, Measured] = {}
    answers: list[tuple[int, str, str]] = []
    try:
        # Opens the slide, as the first tile that a person sees does.
        asyncio.run(_load(address, [(paths[0], "")], is_tls))
        for name in ("first", "memory", "etag"):
            requests = [(path, "") for path in paths]
            if name == "etag":
                requests = [(path, etag) for _, path, etag in answers]
            seconds, times, answers = asyncio.run(_load(address, requests, is_tls))
            assert {status for status, _, _ in answers} == {304 if name == "etag" else 200}
            results[name] = Measured(len(times) / seconds, 1000 * float(np.quantile(times, 0.99)))
    finally:
        process.terminate()
        process.join()
    return results


NAMES = {
    "first": "native tiles, each for the first time",
    "memory": "the same from memory",
    "etag": "the same by ETag (304)",
}


def main() -> None:
    rows: list[Row] = []
    has_rival = importlib.util.find_spec("large_image") is not None
    with tempfile.TemporaryDirectory() as folder:
        slide = paint_slide(Path(folder) / "slide.svs", SlideSpec("immune", 0, size_px=SIZE_PX), workers=2)
        cases = [(False, False), (False, True), *([(True, False), (True, True)] if has_rival else [])]
        rounds = [{case: measure(slide, *case) for case in cases} for _ in range(ROUNDS)]
    for is_tls in (False, True):
        scheme = "HTTPS" if is_tls else "HTTP"
        for name, text in NAMES.items():
            own = _best([result[False, is_tls][name] for result in rounds])
            rival = _best([result[True, is_tls][name] for result in rounds]) if has_rival else None
            ratio, against = (own.tiles_s / rival.tiles_s, "large_image") if rival else (None, "")
            rows.append(Row(f"{scheme}, {text}", own.tiles_s, "tiles/s", ratio, against))
            rows.append(Row(f"{scheme}, {text}: 99 % within", own.p99_ms, "ms"))
            if rival:
                rows.append(Row(f"{scheme}, {text}, by large_image", rival.tiles_s, "tiles/s"))
                rows.append(Row(f"{scheme}, {text}, by large_image: 99 % within", rival.p99_ms, "ms"))
    about = (
        "Tiles of a slide through sign-in, scope check and ETag, in one process, compared with large_image behind the same "
        "endpoint.\n\n"
        f"* A synthetic slide of {SIZE_PX[0]} x {SIZE_PX[1]} px; all of its native JPEG tiles of {TILE_PX} px, in random order,"
        f" over {CONNECTIONS} connections. The program that asks runs on the same cores.\n"
        f"* The best of {ROUNDS} rounds, which alternate between both.\n"
        f"* The target is {TARGET_TILES_S} tiles/s with 99 % within {TARGET_P99_MS} ms, and twice large_image."
    )
    record("tiles", "python tools/bench_tiles.py", rows, about)


def _best(results: list[Measured]) -> Measured:
    return max(results, key=lambda result: result.tiles_s)


if __name__ == "__main__":
    sys.exit(main())
