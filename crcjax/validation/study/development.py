"""What a plan names of the model's development: its slides, and embeddings of slides."""

from __future__ import annotations

import datetime
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from crcjax.data.cohort import CALIBRATION
from crcjax.data.csv_table import is_missing, read_table, renamed
from crcjax.errors import InputError
from crcjax.validation.leakage import StudySlide

_HASHES = ("slide_sha256", "content_hash")
_COLUMNS = ("slide_id", "case_id", "split", *_HASHES, "block_id", "date", "label")
_REMEDY = "write it with numpy.savez(path, slide_id=…, embedding=…)"


def load_training(path: Path, names: Mapping[str, str]) -> tuple[StudySlide, ...]:
    """Reads the slides that a model was developed on; `names` are the table's names of columns by crcjax's.

    Raises InputError, naming the line: slide_id or case_id is missing, a slide is there twice, a date is none.
    """
    table = renamed(path, read_table(path, (*_COLUMNS, *names.values())), names)
    for name in _COLUMNS[:2]:
        if name not in table.columns:
            raise InputError(f"{path}: has no column {name!r}; its columns are {', '.join(table.columns) or 'none'}")
    slides: dict[str, StudySlide] = {}
    for row in table.rows:
        cells = {name: "" if is_missing(text := row.cells.get(name, "")) else text for name in _COLUMNS}
        place, slide_id = f"{path}, line {row.line}", cells["slide_id"]
        if not slide_id or not cells["case_id"]:
            raise InputError(f"{place}: slide_id and case_id must not be empty; fill them in")
        if slide_id in slides:
            raise InputError(f"{place}: slide {slide_id} is there twice; keep one row")
        slides[slide_id] = StudySlide(
            *(slide_id, cells["case_id"], "calibration" if cells["split"] == CALIBRATION else "development"),
            block_id=cells["block_id"],
            sha256=next((cells[name] for name in _HASHES if cells[name]), ""),
            label=cells["label"],
            date=checked_date(cells["date"], place),
        )
    if not slides:
        raise InputError(f"{path}: has no rows; give the slides that the model was developed on")
    return tuple(slides.values())


def checked_date(text: str, place: str) -> str:
    """A date as YYYY-MM-DD, or nothing. Raises InputError, naming the place, for other text: dates are compared in order."""
    try:
        return datetime.date.fromisoformat(text).isoformat() if text else ""
    except ValueError as error:
        raise InputError(f"{place}: a date must be written as YYYY-MM-DD, got {text!r}; correct it") from error


def load_embeddings(path: Path) -> dict[str, Float[np.ndarray, " feature"]]:
    """Reads the embeddings of slides by slide id.

    Raises InputError: the file is no .npz of slide_id [slide] and embedding [slide, feature], or a slide is there twice.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("slide_id", "embedding") if name not in arrays.files]
            if missing:
                raise InputError(f"{path}: has no array {missing[0]!r}, only {', '.join(arrays.files)}; {_REMEDY}")
            slide_id, embedding = arrays["slide_id"], arrays["embedding"]
    # NumPy answers a single array with one that is no context manager, which is an AttributeError or a TypeError.
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read as a .npz ({error}); {_REMEDY}") from error
    is_numeric = np.issubdtype(embedding.dtype, np.floating)
    if slide_id.ndim != 1 or embedding.ndim != 2 or len(slide_id) != len(embedding) or not is_numeric:
        raise InputError(
            f"{path}: must hold slide_id [slide] and floating-point embedding [slide, feature], got {slide_id.shape} and "
            f"{embedding.dtype} {embedding.shape}; {_REMEDY}"
        )
    ids = [str(name) for name in slide_id.tolist()]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise InputError(f"{path}: slide {twice} is there twice; keep one row")
    return dict(zip(ids, embedding.astype(float), strict=True))
