"""SHA-256 of a training state's arrays: in memory before they are saved, and compared with what was written or restored.

Each process hashes the pieces of the arrays that it writes: one copy of every shard. Hashing the files that were written
would accept whatever went wrong before or while they were written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from jaxtyping import Array, PyTree

from crcjax.runs.checkpoint_folder import ARRAYS, HASHES
from crcjax.slides.jobs.usable_cores import usable_cores

# A piece of an array: the name of the array in the checkpoint, and the range of the piece along each axis.
Piece = tuple[str, tuple[tuple[int, int], ...]]


@dataclass(frozen=True)
class _Shard:
    piece: Piece
    data: Array


def piece_hashes(state: PyTree[Array]) -> dict[Piece, str]:
    """The SHA-256 of the pieces that this process writes. With the pieces of all processes, they cover every array once."""
    shards = list(_shards(state, replicas=False))
    with ThreadPoolExecutor(usable_cores()) as threads:
        return dict(zip((shard.piece for shard in shards), threads.map(_hash_shard, shards), strict=True))


def differing_file_pieces(folder: Path, hashes: dict[Piece, str]) -> list[Piece]:
    """The pieces of a checkpoint that its files lack, or whose hash differs from the one in `hashes`; reads all files."""

    def differs(piece: Piece) -> bool:
        name, bounds = piece
        try:
            return _hash(_open(folder / ARRAYS, name)[_index(bounds)].read().result()) != hashes[piece]
        except (ValueError, OSError):
            return True

    with ThreadPoolExecutor(usable_cores()) as threads:
        return [piece for piece, is_bad in zip(hashes, threads.map(differs, hashes), strict=True) if is_bad]


def differing_pieces(state: PyTree[Array | np.ndarray], hashes: dict[Piece, str]) -> list[Piece]:
    """The pieces of a restored state that have another hash than before they were saved.

    The state may be divided over devices in another way than it was saved. Compared are the shards that are pieces too,
    and all pieces of the arrays that this process has whole.
    """
    shards = {shard.piece: shard for shard in _shards(state, replicas=True)}
    pieces_of: dict[str, list[Piece]] = {}
    for piece in hashes:
        pieces_of.setdefault(piece[0], []).append(piece)
    comparable: dict[Piece, Any] = {piece: shards[piece].data for piece in hashes if piece in shards}
    for name, leaf in _leaves(state):
        others = [piece for piece in pieces_of.get(name, []) if piece not in comparable]
        if others and (isinstance(leaf, np.ndarray) or leaf.is_fully_addressable):
            whole = np.asarray(leaf)
            comparable |= {piece: whole[_index(piece[1])] for piece in others}
    with ThreadPoolExecutor(usable_cores()) as threads:
        actual = threads.map(lambda data: _hash(np.asarray(data)), comparable.values())
        return [piece for piece, digest in zip(comparable, actual, strict=True) if digest != hashes[piece]]


def write_hashes(folder: Path, process: int, hashes: dict[Piece, str]) -> None:
    """Writes the hashes of one process into a checkpoint's folder. Raises OSError."""
    entries = [{"array": name, "bounds": bounds, "sha256": digest} for (name, bounds), digest in hashes.items()]
    path = folder / HASHES / f"process-{process}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(entries, indent=1) + "\n")


def read_hashes(folder: Path) -> dict[Piece, str]:
    """The hashes of all processes in a checkpoint's folder; empty for an older checkpoint, which has none."""
    entries = [entry for path in sorted((folder / HASHES).glob("*.json")) for entry in json.loads(path.read_text())]
    return {
        (entry["array"], tuple((first, last) for first, last in entry["bounds"])): entry["sha256"] for entry in entries
    }


def _leaves(state: PyTree[Any]) -> Iterator[tuple[str, Any]]:
    """The arrays of a state, each with its name in the checkpoint."""
    names = ocp.tree.get_param_names(state, include_empty_nodes=False)
    return zip(jax.tree.leaves(names), jax.tree.leaves(state), strict=True)


def _shards(state: PyTree[Any], replicas: bool) -> Iterator[_Shard]:
    """The shards on this process's devices; without `replicas`, one copy of each among all processes."""
    for name, leaf in _leaves(state):
        # Arrays that are restored without a sharding are NumPy's.
        for shard in () if isinstance(leaf, np.ndarray) else leaf.addressable_shards:
            if replicas or shard.replica_id == 0:
                bounds = tuple(along.indices(size)[:2] for along, size in zip(shard.index, leaf.shape, strict=True))
                yield _Shard((name, bounds), shard.data)


def _hash_shard(shard: _Shard) -> str:
    return _hash(np.asarray(shard.data))


def _hash(values: np.ndarray) -> str:
    return sha256(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data).hexdigest()


def _index(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(first, last) for first, last in bounds)


def _open(folder: Path, name: str) -> ts.TensorStore:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{folder.resolve()}/", "path": f"{name}/"},
        "fill_missing_data_reads": False,
    }
    return ts.open(spec, open=True, read=True).result()
