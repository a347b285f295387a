"""Reads tiles and features from the HDF5 files of CLAM, TRIDENT and STAMP."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Float, Float64

from crcjax.errors import InputError, SlideError

SUFFIXES = (".h5", ".hdf5")
# Datasets of features: of CLAM and TRIDENT; of STAMP and HistoBistro; of older versions of STAMP.
_FEATURES = ("features", "feats", "patch_embeddings")
_CLAM_SIZE_ERROR = 0.005  # relative, of a level-0 size that is computed from another level's
_HISTORIC_PX, _HISTORIC_UM = 224, 256.0  # side of a tile in STAMP's first files, which count in pixels of the tiles


@dataclass(frozen=True)
class ThirdPartyTiles:
    """The tiles of one slide as another tool's file states them; None for values that it does not state.

    Attributes:
      path: the file.
      layout: the tool whose layout it has.
      sources: names and SHA-256 of the slide's files.
      corner: top-left corners (x, y) in `unit`.
      unit: `px` (level-0 px) or `um` (micrometres).
      side: of the tiles, in `unit`.
      tile_px: side in px of the encoder's input.
      mpp: µm per level-0 px.
      power: the objective that the tool assumed.
      size: (width, height) of level 0 in px, correct to within `size_error_px`.
      slide_name: the slide that the file names.
      overlap_px: overlap of neighbours, in px of the encoder's input.
      encoder: the encoder that made `features`.
      synthetic: whether the slide was painted by crcjax.
    """

    path: Path
    layout: str
    sources: dict[str, str]
    corner: Float64[np.ndarray, "tile 2"]
    unit: str = "px"
    side: float | None = None
    tile_px: int | None = None
    mpp: float | None = None
    power: float | None = None
    size: tuple[int, int] | None = None
    size_error_px: int = 0
    slide_name: str | None = None
    overlap_px: int = 0
    features: Float[np.ndarray, "tile feature"] | None = None
    encoder: str | None = None
    synthetic: bool = False


def third_party_files(paths: Sequence[Path]) -> dict[str, list[Path]]:
    """Lists the HDF5 files among files and folders, by slide id: the file's name without suffix and `_patches`.

    Folders are searched to any depth, through links. A file that is reached twice counts once. Hidden files are skipped.
    Raises InputError for a folder that has no such files or cannot be searched.
    """
    files_of: dict[str, list[Path]] = {}
    visited: set[str] = set()
    for path in paths:
        below = list(_files_below(path)) if path.is_dir() else [path]
        if not below:
            raise InputError(f"{path}: no HDF5 files (.h5) in it; name a folder of CLAM, TRIDENT or STAMP")
        for file in below:
            if (target := os.path.realpath(file)) not in visited:
                visited.add(target)
                files_of.setdefault(file.stem.removesuffix("_patches"), []).append(file)
    return files_of


def _files_below(folder: Path) -> Iterator[Path]:
    def stop(error: OSError) -> NoReturn:
        raise InputError(
            f"{error.filename}: the folder cannot be searched ({error.strerror}); check its permissions"
        ) from error

    searched: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        # A link to a folder above would be followed without end.
        searched.add(os.path.realpath(parent))
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".") and os.path.realpath(os.path.join(parent, name)) not in searched
        ]
        for name in sorted(names):
            if not name.startswith(".") and name.lower().endswith(SUFFIXES):
                yield Path(parent, name)


def read_third_party(path: Path) -> ThirdPartyTiles:
    """Reads the tiles of a file, whose layout is recognised by its datasets and attributes.

    Raises:
      SlideError: `missing`; `corrupt`; `unsupported` for another layout; `no_tissue` for a file without tiles.
      InputError: h5py is not installed.
    """
    h5py = open_h5py()
    try:
        with open(path, "rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if not h5py.is_hdf5(path):
            raise SlideError(path, "unsupported", "is not an HDF5 file", "give the .h5 of CLAM, TRIDENT or STAMP")
        with h5py.File(path) as file:
            datasets = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset)}
            attributes = {name: _plain(value) for name, value in file.attrs.items()}
            for name in ("coords", *_FEATURES):
                if name in datasets:
                    attributes |= {key: _plain(value) for key, value in datasets[name].attrs.items()}
            arrays = {name: datasets[name][()] for name in ("coords", *_FEATURES) if name in datasets}
            dataset_names = ", ".join(file) or "nothing"
    except FileNotFoundError:
        raise SlideError(path, "missing", "no such file", "check the path") from None
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise SlideError(path, "corrupt", f"cannot be read ({error})", "copy it again") from error
    return _tiles(path, sha256, arrays, attributes, dataset_names)


def merged(files: Sequence[ThirdPartyTiles]) -> ThirdPartyTiles:
    """Merges the files of one slide: at most one with features, and others that state further values of the same tiles.

    For instance, CLAM states the side of the tiles in its file of coordinates, not in its file of features. Raises SlideError
    (`unsupported`) if several files have features, or the files have different tiles.
    """
    with_features = [tiles for tiles in files if tiles.features is not None]
    if len(with_features) > 1:
        other, one = with_features[:2]
        reason = f"has features of the slide, and {other.path} has features of it too"
        raise SlideError(one.path, "unsupported", reason, "import one encoder's folder at a time")
    first, *others = with_features + [tiles for tiles in files if tiles.features is None]
    for other in others:
        if not np.array_equal(first.corner, other.corner) or first.unit != other.unit:
            reason = f"has other tiles than {other.path}, of the same slide"
            raise SlideError(first.path, "unsupported", reason, "import one of the two")
        stated = ("side", "tile_px", "mpp", "power", "size", "size_error_px", "slide_name", "encoder")
        lacking = {name: getattr(other, name) for name in stated if getattr(first, name) in (None, 0)}
        first = replace(first, sources=first.sources | other.sources, **lacking)
    return first


def open_h5py() -> Any:
    """Imports h5py. Raises InputError if it is not installed."""
    try:
        import h5py
    except ImportError:
        raise InputError("HDF5 files need h5py; run pip install 'crcjax[h5]'") from None
    return h5py


def _plain(value: Any) -> Any:
    """Converts an attribute to Python's numbers, texts and lists."""
    value = value.tolist() if isinstance(value, np.ndarray | np.generic) else value
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _tiles(path: Path, sha256: str, arrays: dict, attributes: dict, datasets: str) -> ThirdPartyTiles:
    if "coords" not in arrays:
        remedy = "import the file that has coords and features of every tile"
        raise SlideError(path, "unsupported", f"has no coordinates of tiles (it has {datasets})", remedy)
    corner, features = _corner(path, arrays["coords"]), _features_of(path, arrays)
    tiles = ThirdPartyTiles(path, "", {path.name: sha256}, corner, features=features)
    name = attributes.get("name")
    tiles = replace(
        tiles, synthetic=bool(attributes.get("synthetic", False)), slide_name=name if isinstance(name, str) else None
    )
    try:
        if "patch_size_level0" in attributes:
            return _trident(tiles, attributes)
        if "patch_level" in attributes:
            return _clam(tiles, attributes)
        if "feats" in arrays or "patch_embeddings" in arrays:
            return _stamp(tiles, attributes)
        if "features" in arrays:
            return replace(tiles, layout="CLAM")  # only the file of coordinates states the side
    except (ValueError, TypeError, KeyError, IndexError, ZeroDivisionError) as error:
        reason = f"its attributes are damaged ({type(error).__name__}: {error})"
        raise SlideError(path, "corrupt", reason, "write it again with the tool that made it") from error
    known = "patch_size_level0 (TRIDENT), patch_level (CLAM), feats (STAMP)"
    reason = f"has an unknown layout (it has {datasets}, with {', '.join(attributes) or 'no'} attributes)"
    raise SlideError(path, "unsupported", reason, f"known are files with {known}")


def _corner(path: Path, coords: np.ndarray) -> np.ndarray:
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iuf":
        reason = f"coords of shape {coords.shape} and type {coords.dtype} are not (x, y) of tiles"
        raise SlideError(path, "unsupported", reason, "give a file of CLAM, TRIDENT or STAMP")
    if not len(coords):
        raise SlideError(path, "no_tissue", "has no tiles", "look at the slide; leave it out if it is empty")
    if not np.isfinite(coords).all():
        raise SlideError(path, "corrupt", "has coordinates that are not finite", "write it again")
    return coords.astype(np.float64)


def _features_of(path: Path, arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    name = next((name for name in _FEATURES if name in arrays), None)
    if name is None:
        return None
    features, count = arrays[name], len(arrays["coords"])
    if features.ndim == 3 and len(features) == 1:
        features = features[0]  # early versions of TRIDENT and forks of CLAM store a batch of one
    if features.ndim != 2 or features.dtype.kind != "f":
        reason = f"{name} of shape {features.shape} and type {features.dtype} are not one row of numbers for each tile"
        raise SlideError(path, "unsupported", reason, "give the features of tiles, not of the slide")
    if len(features) != count:
        reason = f"has {len(features)} rows of {name} and {count} coordinates"
        raise SlideError(path, "corrupt", reason, "write it again with the tool that made it")
    if not np.isfinite(features).all():
        row = int(np.flatnonzero(~np.isfinite(features).all(axis=1))[0])
        raise SlideError(path, "corrupt", f"{name} of tile {row} are not finite", "compute the features again")
    return features if features.dtype == np.float16 else features.astype(np.float32)


def _trident(tiles: ThirdPartyTiles, attributes: dict) -> ThirdPartyTiles:
    width, height = (attributes.get(f"level0_{name}") for name in ("width", "height"))
    return replace(
        tiles,
        layout="TRIDENT",
        side=_positive(attributes["patch_size_level0"]),
        tile_px=int(_positive(attributes["patch_size"])),
        mpp=_optional(attributes.get("level0_mpp")),  # crcjax writes it, TRIDENT does not
        power=_optional(attributes.get("level0_magnification")),
        size=(int(width), int(height)) if width and height else None,
        overlap_px=int(attributes.get("overlap", 0)),
        encoder=_text(attributes.get("encoder")),
    )


def _clam(tiles: ThirdPartyTiles, attributes: dict) -> ThirdPartyTiles:
    """Reads CLAM's attributes: `patch_size` is in px of `patch_level`, while `coords` are in level-0 px."""
    given = attributes["downsample"] if attributes["patch_level"] else attributes.get("downsample", 1.0)
    downsample = float(np.mean([_positive(value) for value in np.ravel(given)]))
    patch, level = _positive(attributes["patch_size"]), attributes.get("level_dim")
    # Level sizes are rounded down to whole pixels: the slide may be larger by less than one pixel of the level.
    width, height = (round(float(px) * downsample) + math.ceil(downsample) - 1 for px in level or (0, 0))
    tiles = replace(tiles, layout="CLAM", side=patch * downsample, tile_px=int(patch))
    if not level:
        return tiles
    # `downsample` is a mean over both axes, whose rounding differs.
    error_px = math.ceil(2 * downsample + _CLAM_SIZE_ERROR * max(width, height)) if downsample > 1 else 0
    return replace(tiles, size=(width, height), size_error_px=error_px)


def _stamp(tiles: ThirdPartyTiles, attributes: dict) -> ThirdPartyTiles:
    """Reads the three generations of STAMP: `tile_size_um`; `tile_size` with its unit; coordinates in pixels of 256 / 224 µm."""
    tiles = replace(tiles, layout="STAMP", encoder=_text(attributes.get("extractor")))
    tile_px = int(_positive(attributes.get("tile_size_px", _HISTORIC_PX)))
    stated = attributes.get("tile_size_um", attributes.get("tile_size") if attributes.get("unit") == "um" else None)
    if stated is not None:
        return replace(tiles, unit="um", side=_positive(stated), tile_px=tile_px)
    if attributes.get("unit", "px") != "px":
        raise ValueError(f"unit {attributes['unit']!r}")
    step = attributes.get("tile_size") or _step(tiles.corner)
    if step is not None and round(float(step)) == _HISTORIC_PX:
        corner = tiles.corner * (_HISTORIC_UM / _HISTORIC_PX)
        return replace(tiles, corner=corner, unit="um", side=_HISTORIC_UM, tile_px=_HISTORIC_PX)
    return replace(tiles, layout="HistoBistro")  # the user must give the side and the resolution


def _step(corner: np.ndarray) -> float | None:
    """The smallest distance between columns or rows of tiles; None for a single tile."""
    steps = [np.diff(np.unique(along)) for along in corner.T]
    return min((float(step.min()) for step in steps if len(step)), default=None)


def _positive(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{value} is not a number above 0")
    return number


def _optional(value: Any) -> float | None:
    return None if value is None else _positive(value)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
