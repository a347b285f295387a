"""Chunks are filled across slides, and a chunk that does not fit the device's memory is halved."""

from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.predict.predictor import Predictor
from crcjax.predict.region_encoder import EncodedRegions, Shard, encode_regions

CHUNK = 4


@pytest.fixture
def predictor(run: Path) -> Predictor:
    predictor = Predictor(run)
    assert predictor.members[0].forward.chunk == CHUNK
    return predictor


@pytest.fixture
def calls(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of regions of each call of the encoder."""
    counts: list[int] = []
    forward = predictor.members[0].forward
    encode = forward.encode

    def counted(params, pixels, stain):
        counts.append(len(pixels))
        return encode(params, pixels, stain)

    monkeypatch.setattr(forward, "encode", counted)
    return counts


def _shards(counts: dict[str, list[int]]) -> Iterator[Shard[str]]:
    """Shards of random pixels, so many regions each, of the slides in turn."""
    rng = np.random.default_rng(0)
    for slide, sizes in counts.items():
        first = 0
        for size in sizes:
            pixels = rng.integers(0, 255, (size, 1, 64, 64, 3), np.uint8)
            yield Shard(slide, np.arange(first, first + size), pixels, [None])
            first += size


def _features(predictor: Predictor, shards) -> dict[tuple[str, int], np.ndarray]:
    found: dict[tuple[str, int], np.ndarray] = {}
    for result in encode_regions(predictor.members, shards):
        assert isinstance(result, EncodedRegions)
        for region, features in zip(result.regions, result.features[0], strict=True):
            assert (result.slide, int(region)) not in found
            found[result.slide, int(region)] = features
    return found


def _limit_memory(predictor: Predictor, most_regions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the compiled encoder fail like a device without memory for more regions."""
    forward = predictor.members[0].forward
    encode = forward._encode

    def limited(params, pixels, stain):
        if len(pixels) > most_regions:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return encode(params, pixels, stain)

    monkeypatch.setattr(forward, "_encode", limited)


def test_chunks_are_full_whichever_slides_their_regions_are_of_and_neighbours_change_no_bit(
    predictor: Predictor, calls: list[int]
) -> None:
    sizes = {"a": [3, 2], "b": [1], "c": [9]}
    together = _features(predictor, _shards(sizes))
    assert calls == [CHUNK, CHUNK, CHUNK, 3]
    assert len(together) == 15
    shards = list(_shards(sizes))
    for slide in sizes:
        alone = _features(predictor, (shard for shard in shards if shard.slide == slide))
        for place, features in alone.items():
            np.testing.assert_array_equal(features, together[place])


def test_regions_at_hand_are_encoded_at_once_when_asked_for(predictor: Predictor, calls: list[int]) -> None:
    def shards() -> Iterator[Shard[str] | None]:
        for shard in _shards({"a": [2], "b": [5]}):
            yield shard
            yield None

    assert len(_features(predictor, shards())) == 7
    assert calls == [2, CHUNK, 1]


def test_without_memory_the_chunk_is_halved_and_its_regions_are_encoded_again(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"a": [3, 2], "b": [4]}
    expected = _features(predictor, _shards(sizes))
    _limit_memory(predictor, 1, monkeypatch)
    found = _features(predictor, _shards(sizes))
    assert predictor.members[0].forward.chunk == 1
    assert found.keys() == expected.keys()
    for place, features in expected.items():
        # Another size of chunk is another program.
        np.testing.assert_allclose(found[place], features, atol=1e-5)


def test_a_device_without_memory_for_one_region_fails_the_slides_of_the_chunk_by_name(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    _limit_memory(predictor, 0, monkeypatch)
    failed = {
        name for slides, error in encode_regions(predictor.members, _shards({"a": [3], "b": [3]})) for name in slides
    }
    assert failed == {"a", "b"}
