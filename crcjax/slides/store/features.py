"""Features of a slide's tiles in its store: one array for each encoder, written atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import tensorstore as ts
from jaxtyping import Float

from crcjax.errors import InputError, writing
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.store.zarr_arrays import create_array, open_array, store_path, unreadable, write_group

# The least that is read. Training samples few of many regions: the rest of their chunks is read in vain.
_CHUNK_BYTES = 8192
_SHARD_CHUNKS = 1024
# Compress where fewer slots are filled: features themselves shrink by less than a tenth, and decompression takes longer.
_PACKED_BELOW = 0.8


def write_features(
    store: str | Path,
    slide_id: str,
    encoder: str,
    features: Float[np.ndarray, "region slot feature"],
    attributes: dict,
) -> None:
    """Stores features under the encoder's name and replaces older ones atomically; a crash leaves the older or the new ones.

    Features are float16 or float32, and are set to zero where the mask is False. `attributes` state their origin: at least
    `encoder`, `weights_sha256`, `mpp` and `dtype`, None where an imported file does not state it. Raises InputError if the
    shape does not fit the slide's or the name cannot be a folder's, OutputError if the store cannot be written.
    """
    opened = open_store(store, slide_id)
    final = _folder(opened.path, encoder)
    if features.shape[:2] != opened.mask.shape:
        raise InputError(
            f"{final}: features of {features.shape[:2]} regions and slots, the slide has {opened.mask.shape}"
        )
    regions, slots, width = features.shape
    chunk = min(regions, max(1, _CHUNK_BYTES // (slots * width * features.itemsize)))
    shard = min(-(-regions // chunk), _SHARD_CHUNKS) * chunk
    partial, older = (final.with_name(f".{encoder}.{kind}") for kind in (f"partial-{os.getpid()}", "older"))
    values = np.where(opened.mask[..., None], features, features.dtype.type(0))
    remedy = "ask for permission to write into the store"
    with writing(final, remedy, catch=(OSError, ValueError)), ExitStack() as stack:
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        final.parent.mkdir(exist_ok=True)
        write_group(final.parent, {})
        shutil.rmtree(partial, ignore_errors=True)
        packed = bool(opened.mask.mean() < _PACKED_BELOW)
        sides = (shard, slots, width), (chunk, slots, width)
        array = create_array(partial, str(values.dtype), values.shape, *sides, packed=packed)
        array.write(values).result()
        document = json.loads((partial / "zarr.json").read_text()) | {"attributes": attributes}
        (partial / "zarr.json").write_text(json.dumps(document, indent=1, sort_keys=True))
        # A folder cannot replace one that is not empty: between the two renames, `_folder` finds the older one.
        if final.exists():
            shutil.rmtree(older, ignore_errors=True)
            final.rename(older)
        partial.rename(final)
        shutil.rmtree(older, ignore_errors=True)


def read_features(store: str | Path, slide_id: str, encoder: str) -> Float[np.ndarray, "region slot feature"]:
    """Reads all features of a slide. Raises InputError if it has none of that name, or they are damaged."""
    folder = _features_folder(store, slide_id, encoder)
    with _checked(folder):
        return open_array(folder).read().result()


class FeatureReader:
    """Reads a slide's features, any regions at a time; any number of threads may read. Raises InputError if there are none."""

    def __init__(self, store: str | Path, slide_id: str, encoder: str):
        self.path = _features_folder(store, slide_id, encoder)
        self.attributes = feature_attributes(store, slide_id, encoder) or {}
        with _checked(self.path):
            self._array = open_array(self.path)
        self.width: int = self._array.shape[-1]
        self.dtype: np.dtype = self._array.dtype.numpy_dtype

    def read(
        self, indices: Sequence[int] | np.ndarray, out: Float[np.ndarray, "region slot feature"] | None = None
    ) -> Float[np.ndarray, "region slot feature"]:
        """Reads the features of these regions, into `out` if it is given. Raises InputError if they are damaged or not finite."""
        with _checked(self.path):
            chosen = self._array[np.asarray(indices, np.int64)]
            if out is None:
                features = chosen.read().result()
            else:
                ts.array(out).write(chosen).result()
                features = out
        if not _all_finite(features):
            raise InputError(f"{self.path}: holds features that are not finite; delete it and make them again")
        return features


def feature_attributes(store: str | Path, slide_id: str, encoder: str) -> dict | None:
    """The origin of a slide's features (see `write_features`); None if it has none of that name. Raises InputError if they are damaged."""
    if encoder not in feature_names(store, slide_id):
        return None
    folder = _features_folder(store, slide_id, encoder)
    try:
        return json.loads((folder / "zarr.json").read_text())["attributes"]
    except (OSError, ValueError, KeyError) as error:
        raise unreadable(folder, error, "delete it and make the features again") from error


def feature_names(store: str | Path, slide_id: str) -> list[str]:
    """The encoders whose features a slide has, sorted."""
    folders = (store_path(store) / f"{slide_id}.zarr" / "features").glob("*/zarr.json")
    return sorted({_name(path.parent) for path in folders} - {""})


def _all_finite(values: np.ndarray) -> bool:
    if values.dtype != np.float16:
        return bool(np.isfinite(values).all())
    # A value is infinite or NaN if its exponent is all ones. NumPy would convert float16 first, which takes twenty times as long.
    return not ((values.view(np.uint16) & 0x7C00) == 0x7C00).any()


@contextmanager
def _checked(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise unreadable(folder, error, "delete it and make the features again") from error


def _name(folder: Path) -> str:
    """The encoder of a folder of features; none for a partial one."""
    name = folder.name.removesuffix(".older")
    return name.removeprefix(".") if name != folder.name else "" if name.startswith(".") else name


def _folder(slide: Path, encoder: str) -> Path:
    if not encoder or encoder.startswith(".") or "/" in encoder:
        raise InputError(f"features of the name {encoder!r}: choose one that can be a folder's")
    return slide / "features" / encoder


def _features_folder(store: str | Path, slide_id: str, encoder: str) -> Path:
    folder = _folder(store_path(store) / f"{slide_id}.zarr", encoder)
    older = folder.with_name(f".{encoder}.older")
    if not folder.exists() and not older.exists():
        have = ", ".join(feature_names(store, slide_id)) or "none"
        raise InputError(f"{folder}: no such features (there are {have}); run crcjax embed, or crcjax import")
    return folder if folder.exists() else older
