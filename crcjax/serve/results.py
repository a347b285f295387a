"""The result of a prediction on disk: one folder for each attempt, of which the queue commits one.

STATE/results/JOB_ID/TOKEN/heatmaps/CONTENT.png, attention/CONTENT.npz
"""

from __future__ import annotations

import io
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from crcjax.serve.queue import Lease
from crcjax.serve.vault import Vault

# Digits of the content hash that name a slide within a job: the result depends on no name that a user gave.
_ID_DIGITS = 16


def slide_id(content: str) -> str:
    """The name of a slide in the files and rows of a job."""
    return content[:_ID_DIGITS]


def attempt_folder(results: Path, lease: Lease) -> Path:
    """The folder of one attempt at a job."""
    return results / lease.job_id / str(lease.token)


def remove_other_attempts(results: Path, lease: Lease) -> None:
    """Removes what earlier attempts, which were killed, left behind."""
    for folder in attempt_folder(results, lease).parent.iterdir():
        if folder.name != str(lease.token):
            shutil.rmtree(folder, ignore_errors=True)


def sync(folder: Path) -> None:
    """Returns once all files of a folder are on the disk."""
    for path in (folder.parent, folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def result_object(lease: Lease) -> str:
    """How the objects of an attempt begin: a file's object is its path below the results."""
    return f"{lease.job_id}/{lease.token}/"


def job_key(site: str, job_id: str) -> str:
    """The name of the key of a job's results."""
    return f"{site}/job/{job_id}"


def open_result(vault: Vault, results: Path, path: Path) -> io.BufferedReader:
    """Opens a file of a result, encrypted or plain. Raises DecryptionError."""
    return vault.open(path, str(path.relative_to(results)))


def heatmap(vault: Vault, results: Path, job_id: str, token: int, content: str) -> bytes | None:
    """The heatmap of a slide as PNG; None without one."""
    path = results / job_id / str(token) / "heatmaps" / f"{slide_id(content)}.png"
    if not path.is_file():
        return None
    with open_result(vault, results, path) as file:
        return file.read()


def attention_file(results: Path, job_id: str, token: int, content: str) -> Path:
    """The file of a slide's attention and attribution; a slide without a prediction has none."""
    return results / job_id / str(token) / "attention" / f"{slide_id(content)}.npz"


def regions_geojson(vault: Vault, results: Path, job_id: str, token: int, content: str) -> dict[str, Any] | None:
    """The predicted regions of a slide with their attention and attribution as GeoJSON in level-0 px; None without a prediction."""
    path = attention_file(results, job_id, token, content)
    if not path.is_file():
        return None
    with open_result(vault, results, path) as file, np.load(file) as saved:
        side = float(saved["region_px"])
        attribution = saved["attribution"].sum(axis=1)
        features = [
            _feature(float(x), float(y), side, float(attention), float(evidence))
            for (x, y), attention, evidence in zip(saved["origin"], saved["attention"], attribution, strict=True)
            # Regions without a tile that passed quality control have none.
            if attention > 0
        ]
    return {"type": "FeatureCollection", "features": features}


def _feature(left: float, top: float, side: float, attention: float, attribution: float) -> dict[str, Any]:
    corners = [[left, top], [left + side, top], [left + side, top + side], [left, top + side], [left, top]]
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [corners]},
        "properties": {"objectType": "annotation", "attention": attention, "attribution": attribution},
    }
