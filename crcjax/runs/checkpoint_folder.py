"""The folders of a run's checkpoints on disk, their names and their steps.

RUN/checkpoints/STEP/
  default/              the arrays of the training state, written by Orbax
  checkpoint.json       config, code version, and what training remembers beside its state
  hashes/process-I.json SHA-256 of the arrays in the memory of process I, before they were written
  manifest.json         validation metrics, and the SHA-256 of every other file; written last
  manifest.sig          Ed25519 signature of manifest.json, if the run has a key
RUN/checkpoints/unfinished-STEP/     a save that was interrupted; the next finished save removes it
RUN/checkpoints/damaged-STEP-REASON/ a checkpoint that failed verification, or that training went back from (suspect)

Older checkpoints have metrics/metrics (JSON) if they were evaluated, and no checkpoint.json, hashes or manifest.
"""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER = "checkpoints"
ARRAYS, ABOUT, HASHES = "default", "checkpoint.json", "hashes"
MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
_UNFINISHED, _DAMAGED, _REMOVED = "unfinished-", "damaged-", ".removed-"
# Orbax gives such a name to a folder until it is complete; older runs have it in place of unfinished-STEP.
_ORBAX_PARTIAL = ".orbax-checkpoint-tmp"


def step_folder(run: str | Path, step: int) -> Path:
    """The folder of a run's checkpoint."""
    return Path(run) / FOLDER / str(step)


def unfinished_folder(run: Path, step: int) -> Path:
    """The folder of a checkpoint while it is written."""
    return run / FOLDER / f"{_UNFINISHED}{step}"


def finished_steps(run: str | Path) -> list[int]:
    """The steps of a run's checkpoints, oldest first, whether they are damaged or not."""
    names = (path.name for path in (Path(run) / FOLDER).glob("*") if path.is_dir())
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def unfinished_folders(run: Path) -> list[Path]:
    """The folders of saves that were interrupted."""
    names = ((run / FOLDER).glob(pattern) for pattern in (f"{_UNFINISHED}*", f"*{_ORBAX_PARTIAL}*"))
    return sorted(path for paths in names for path in paths)


def damaged_folders(run: Path) -> list[Path]:
    """The folders of checkpoints that failed verification and were renamed."""
    return sorted((run / FOLDER).glob(f"{_DAMAGED}*"))


def read_about(folder: Path) -> dict[str, Any]:
    """The values in checkpoint.json. Empty if an earlier version made the checkpoint, or the file is damaged."""
    try:
        about = json.loads((folder / ABOUT).read_bytes())
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def set_aside(folder: Path, reason: str) -> Path:
    """Renames a damaged or suspect checkpoint to damaged-STEP-REASON, or to that name with a number if there is one; returns the path."""
    name = f"{_DAMAGED}{folder.name}-{reason}"
    number = 1
    while (aside := folder.with_name(name if number == 1 else f"{name}-{number}")).exists():
        number += 1
    return folder.rename(aside)


def remove_step(run: Path, step: int) -> None:
    """Removes a checkpoint. If it is interrupted, nothing is left that looks like a damaged checkpoint."""
    folder = step_folder(run, step)
    removed = folder.with_name(f"{_REMOVED}{step}")
    shutil.rmtree(removed, ignore_errors=True)
    with suppress(FileNotFoundError):
        folder.rename(removed)
    shutil.rmtree(removed, ignore_errors=True)
