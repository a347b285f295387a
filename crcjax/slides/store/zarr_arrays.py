"""Zarr v3 arrays with checksums: damaged or missing data raise an error and are never read as zeros."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import tensorstore as ts

from crcjax.errors import InputError

# The statuses of TensorStore errors that damaged data cause; the file system causes all others.
_DAMAGE = ("DATA_LOSS", "NOT_FOUND", "FAILED_PRECONDITION", "INVALID_ARGUMENT", "OUT_OF_RANGE")
_CHECKED: list[dict[str, Any]] = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_PACKED = [_CHECKED[0], {"name": "zstd", "configuration": {"level": 1}}, _CHECKED[1]]


class UnreadableError(InputError):
    """Data cannot be read for a reason of the file system; nothing shows that they are damaged."""


def store_path(path: str | Path) -> Path:
    """A store's folder as its user names it, `~` expanded."""
    return Path(path).expanduser()


def create_array(
    path: Path,
    dtype: str,
    shape: tuple[int, ...],
    shard: tuple[int, ...] | None = None,
    chunk: tuple[int, ...] | None = None,
    *,
    packed: bool = True,
) -> ts.TensorStore:
    """Creates an array. A shard is a file, a chunk the least that is read; both are the whole array by default.

    `packed` compresses with zstd, which does not help data that are already compressed. Raises ValueError.
    """
    shard = shard or tuple(max(1, side) for side in shape)
    sharding = {
        "chunk_shape": chunk or shard,
        "codecs": _PACKED if packed else _CHECKED,
        "index_codecs": _CHECKED,
        "index_location": "end",
    }
    metadata = {
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard}},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    # A shard of black tiles must exist, to be distinguishable from a lost one.
    spec = _spec(path) | {"store_data_equal_to_fill_value": True, "metadata": metadata}
    return ts.open(spec, create=True).result()


def open_array(path: Path) -> ts.TensorStore:
    """Opens an array to read. Opening and reading raise ValueError if it is damaged or a part of it is missing."""
    return ts.open(_spec(path), open=True, read=True).result()


def write_group(path: Path, attributes: dict) -> None:
    """Writes the document that makes a folder a zarr v3 group."""
    document = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    (path / "zarr.json").write_text(json.dumps(document, indent=1, sort_keys=True))


def first_line(error: Exception) -> str:
    """TensorStore's message without the place in its source."""
    return str(error).splitlines()[0].split(" [")[0]


def unreadable(path: Path, error: Exception, remedy: str) -> InputError:
    """The error for data that cannot be read.

    Args:
      path: the folder that holds them.
      error: TensorStore's ValueError, or an OSError.
      remedy: what to do if the data are damaged. It is not shown if they are gone or the file system refuses to read them.
    """
    if not path.exists():
        return UnreadableError(f"{path}: is no longer there; put it back (is its disk mounted?), then start again")
    status, colon, _ = str(error).partition(":")
    of_file_system = isinstance(error, OSError) or (colon and status.isupper() and status not in _DAMAGE)
    if of_file_system:
        reason = (isinstance(error, OSError) and error.strerror) or first_line(error)
        return UnreadableError(
            f"{path}: cannot be read ({reason}); check its permissions and its disk, then start again"
        )
    return InputError(f"{path}: damaged ({first_line(error)}); {remedy}")


def _spec(path: Path) -> dict[str, Any]:
    # TensorStore refuses paths with `..` in them.
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{os.path.realpath(path)}/"},
        "fill_missing_data_reads": False,
    }
