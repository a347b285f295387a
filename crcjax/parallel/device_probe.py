"""Measures how fast each device of this process is by itself, to find the one that makes all others wait."""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

# Products of square matrices that take some milliseconds on each kind of device.
_PRODUCTS = 16
_WIDTH = {"cpu": 256}
_WIDTH_OF_ACCELERATORS = 2048
# The median of several measurements, since other programs disturb single ones.
_REPEATS = 5


class DeviceProbe:
    """Times a fixed computation on every device of this process, at most every `interval_s` seconds.

    Call it between steps, when the devices are idle.
    """

    def __init__(self, interval_s: float = 10.0):
        self._interval_s, self._next_time = interval_s, 0.0
        self._inputs: list[Float32[Array, "row column"]] = []

    def __call__(self) -> float | None:
        """The seconds that the slowest device took; None if it is too early for another measurement."""
        if time.monotonic() < self._next_time:
            return None
        if not self._inputs:
            devices = jax.local_devices()
            width = _WIDTH.get(devices[0].platform, _WIDTH_OF_ACCELERATORS)
            with jax.transfer_guard("allow"):
                self._inputs = [jax.device_put(jnp.full((width, width), 1.0 / width), device) for device in devices]
            # The first call compiles.
            for values in self._inputs:
                _products(values).block_until_ready()
        seconds = [statistics.median(_seconds(values) for _ in range(_REPEATS)) for values in self._inputs]
        self._next_time = time.monotonic() + self._interval_s
        return max(seconds)


def _seconds(values: Float32[Array, "row column"]) -> float:
    start = time.perf_counter()
    _products(values).block_until_ready()
    return time.perf_counter() - start


@jax.jit
def _products(values: Float32[Array, "row column"]) -> Float32[Array, "row column"]:
    return jax.lax.fori_loop(0, _PRODUCTS, lambda _, product: product @ values, values)
