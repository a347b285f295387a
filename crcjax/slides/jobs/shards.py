"""Divides work among the tasks of a SLURM array, which agree without communicating."""

from __future__ import annotations

from collections.abc import Mapping

from crcjax.errors import InputError


def largest_first(sizes: Mapping[str, int]) -> list[str]:
    """Names by size, so that none of the large ones is left to the end; names of one size are in alphabetical order."""
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def shard_numbers(shard: str) -> tuple[int, int]:
    """The numbers of a shard I/N, from 1/N to N/N. Raises InputError."""
    try:
        number, count = map(int, shard.split("/"))
        if not 1 <= number <= count:
            raise ValueError
    except ValueError:
        raise InputError(f"shard {shard!r}: write I/N with I from 1 to N, such as 3/8") from None
    return number, count


def names_of_shard(sizes: Mapping[str, int], shard: str) -> list[str]:
    """The names of shard I/N, the largest first: every name is in one shard, and shards have similar sizes.

    Args:
      sizes: the size of each item by its name; they alone decide.
      shard: I/N.

    Raises:
      InputError: there is no such shard.
    """
    number, count = shard_numbers(shard)
    loads, mine = [0] * count, []
    for name in largest_first(sizes):
        least = loads.index(min(loads))
        loads[least] += max(1, sizes[name])
        if least == number - 1:
            mine.append(name)
    return mine
