"""STORE/manifest.jsonl: the outcome of every slide."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from crcjax.errors import writing
from crcjax.slides.store.locks import file_lock
from crcjax.slides.store.tile_store import tiled_slides

MANIFEST = "manifest.jsonl"
_SUCCEEDED = ("tiled", "already tiled", "imported", "already imported", "exported")
# Outcomes that follow from the slide's content: the same command gives them again.
REFUSALS = ("no_tissue", "too_coarse", "unsupported", "corrupt", "mpp_missing")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one slide: `status` is `tiled`, `already tiled`, or that of a JobFailed or a SlideError.

    For a tiled slide, `verdict` is the QC result (accept, review or reject), and `reason` gives its reasons and a warning
    about its micrometres per pixel, if any. `seconds` is the duration of the last of its `attempts`, in the process
    `worker` (machine:process).
    """

    slide_id: str
    path: str
    status: str
    reason: str = ""
    regions: int = 0
    tiles: int = 0
    content_hash: str = ""
    seconds: float = 0.0
    attempts: int = 1
    worker: str = ""
    verdict: str = ""

    @property
    def succeeded(self) -> bool:
        return self.status in _SUCCEEDED


def read_manifest(store: Path) -> dict[str, dict]:
    """Reads the newest outcome of every slide from STORE/manifest.jsonl. A line that a killed run cut off is skipped."""
    newest = {}
    path = store / MANIFEST
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            outcome = json.loads(line)
        except ValueError:
            continue
        newest[outcome["slide_id"]] = outcome
    return newest


def tiled_in_manifest(store: Path) -> set[str]:
    tiled = ("tiled", "already tiled")
    return {slide_id for slide_id, outcome in read_manifest(store).items() if outcome["status"] in tiled}


def without_tiles(store: Path) -> dict[str, dict]:
    """The newest outcome of every slide that could not be tiled or imported, and has no older tiles in the store."""
    in_store = set(tiled_slides(store))
    return {
        slide_id: outcome
        for slide_id, outcome in read_manifest(store).items()
        if outcome["status"] not in _SUCCEEDED and slide_id not in in_store
    }


def refused_slides(store: Path) -> dict[str, dict]:
    """The outcomes of `without_tiles` whose status is one of REFUSALS."""
    return {name: outcome for name, outcome in without_tiles(store).items() if outcome["status"] in REFUSALS}


def append_outcome(store: Path, outcome: Outcome) -> None:
    """Adds a line to STORE/manifest.jsonl. Raises OutputError."""
    line = json.dumps(asdict(outcome) | {"seconds": round(outcome.seconds, 3)}) + "\n"
    # The lock keeps lines whole on network file systems too, where appending alone is not atomic.
    lock = file_lock(store / ".partial" / ".manifest.lock")
    with writing(store), lock, open(store / MANIFEST, "a+b") as manifest:
        manifest.seek(max(0, manifest.tell() - 1))
        cut_off = manifest.read(1) not in (b"", b"\n")
        manifest.write(b"\n" * cut_off + line.encode())
