"""Encodes regions of many slides in chunks of one size, which are filled across the boundaries of slides."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import Float32, Int, UInt8

from crcjax.predict.ensemble import EnsembleMember, SlideStains, memory_errors

# Chunks that the device may hold besides the one that is being filled: while it encodes one, the next is transferred.
_IN_FLIGHT = 2
_OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"

S = TypeVar("S")


@dataclass(frozen=True)
class Shard(Generic[S]):
    """Regions of one slide that are to be encoded.

    Attributes:
      slide: tells the slides apart; it comes back with the features.
      regions: the number of each region in its slide.
      pixels: their tiles.
      stains: the slide's stain estimate for each ensemble member; None for a member without stain normalisation.
    """

    slide: S
    regions: Int[np.ndarray, " region"]
    pixels: UInt8[np.ndarray, "region slot y x 3"]
    stains: SlideStains


@dataclass(frozen=True)
class EncodedRegions(Generic[S]):
    """The features of regions of one slide by each ensemble member; fields as in `Shard`."""

    slide: S
    regions: Int[np.ndarray, " region"]
    features: list[Float32[np.ndarray, "region slot feature"]]


def encode_regions(
    members: Sequence[EnsembleMember], shards: Iterable[Shard[S] | None]
) -> Iterator[EncodedRegions[S] | tuple[list[S], Exception]]:
    """Encodes shards of any slides, in any order, and yields the features of their regions as they are finished.

    The device gets one full chunk after the other, whichever slides its regions are of; features do not depend on the other
    regions of their chunk. If the device's memory runs out, the chunk is halved, for good, and its regions are encoded again.

    Args:
      members: the ensemble members; all encode every region.
      shards: the regions; None in place of a shard has the begun chunk encoded, padded, without waiting for more regions.

    Yields:
      Features, a run of regions of one slide at a time; in place of them, for a chunk that the device cannot encode at all,
      its slides and the error.
    """
    running: deque[tuple[_Chunk[S], list[Any] | Exception]] = deque()
    begun: _Chunk[S] = _Chunk(members)
    for shard in chain(shards, [None]):
        if shard is None:
            if begun.filled:
                running.append((begun, begun.start()))
                begun = _Chunk(members)
            while running:
                yield from _finish(*running.popleft())
            continue
        first = 0
        while first < len(shard.regions):
            first = begun.fill(shard, first)
            if begun.is_full:
                running.append((begun, begun.start()))
                begun = _Chunk(members)
            while len(running) > _IN_FLIGHT:
                yield from _finish(*running.popleft())


@dataclass
class _Chunk(Generic[S]):
    members: Sequence[EnsembleMember]
    parts: list[Shard[S]] = field(default_factory=list)
    filled: int = 0

    def __post_init__(self) -> None:
        self.size = self.members[0].chunk

    @property
    def is_full(self) -> bool:
        return self.filled == self.size

    def fill(self, shard: Shard[S], first: int) -> int:
        """Takes regions of a shard from number `first` on, as many as there is room for; returns the first one not taken."""
        end = min(len(shard.regions), first + self.size - self.filled)
        self.parts.append(Shard(shard.slide, shard.regions[first:end], shard.pixels[first:end], shard.stains))
        self.filled += end - first
        return end

    def start(self) -> list[Any] | Exception:
        """Starts the encoding by every member; an error of the device is returned, to be treated in the chunk's turn."""
        if self.filled > self.members[0].chunk:
            return MemoryError("the chunk was begun before an earlier one did not fit")
        counts = [len(part.regions) for part in self.parts]
        pixels = np.concatenate([part.pixels for part in self.parts]) if len(counts) > 1 else self.parts[0].pixels
        try:
            return [
                member.encode(pixels, [part.stains[number] for part in self.parts], counts)
                for number, member in enumerate(self.members)
            ]
        except memory_errors() as error:
            return error

    def halves(self) -> list[_Chunk[S]]:
        """The regions in chunks of the members' present, smaller size."""
        chunks: list[_Chunk[S]] = [_Chunk(self.members)]
        for part in self.parts:
            first = 0
            while first < len(part.regions):
                if chunks[-1].is_full:
                    chunks.append(_Chunk(self.members))
                first = chunks[-1].fill(part, first)
        return chunks


def _finish(
    chunk: _Chunk[S], started: list[Any] | Exception
) -> Iterator[EncodedRegions[S] | tuple[list[S], Exception]]:
    """Waits for a chunk's features and hands them out by slide."""
    error = started if isinstance(started, Exception) else None
    features: list[np.ndarray] = []
    if not isinstance(started, Exception):
        try:
            features = [np.asarray(array) for array in started]
        except memory_errors() as raised:
            error = raised
    if error is not None:
        if _is_out_of_memory(error) and all(member.halve(chunk.size) for member in chunk.members):
            for half in chunk.halves():
                yield from _finish(half, half.start())
        else:
            yield [part.slide for part in chunk.parts], error
        return
    first = 0
    for part in chunk.parts:
        end = first + len(part.regions)
        yield EncodedRegions(part.slide, part.regions, [of_member[first:end] for of_member in features])
        first = end


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or _OUT_OF_MEMORY in str(error)
