from pathlib import Path

import jax
import numpy as np

from crcjax.data.bags import open_stores, read_bag
from crcjax.data.cohort import load_cohort


def test_the_memory_of_a_bag_is_recycled_only_when_neither_host_nor_device_uses_it(painted: Path, small_config) -> None:
    cohort = load_cohort(painted / "cohort.csv", small_config.data.classes).split("train")
    stores, label = open_stores(small_config.data.store, cohort)[:1], np.zeros(1, np.int32)

    def read(first: int, count: int) -> np.ndarray:
        return read_bag(stores, [np.arange(first, first + count)], label, 5).tiles

    expected = stores[0].read_pixels(range(5))
    addresses: set[int] = set()
    host, device = read(0, 5)[0, 1:], jax.device_put(read(0, 5))
    jax.block_until_ready(device)
    for first in range(4):
        short = read(first, 1)
        np.testing.assert_array_equal(short[0, 0], expected[first])
        assert not short[0, 1:].any(), "padding is zero, whatever the memory held"
        addresses.add(short.ctypes.data)
        del short
    assert len(addresses) == 1
    np.testing.assert_array_equal(host, expected[1:])
    np.testing.assert_array_equal(device[0], expected)
    address = device.unsafe_buffer_pointer()
    assert address not in addresses
    del device
    jax.device_put(label)  # JAX lets go of what is deleted when it is next called
    batches = [read(0, 5) for _ in range(2)]
    assert {tiles.ctypes.data for tiles in batches} == {*addresses, address}, "both are used again, and nothing else"
