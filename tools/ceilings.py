"""The measured limits of a device (matrix products, memory traffic), the least work of a computation, and its median time."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Work:
    """The floating-point operations of all products, and the bytes of memory that must be read or written."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Ceilings:
    """Operations per second of a product, by type, and bytes per second that a copy reads and writes."""

    flops: dict[str, float]
    bytes: float

    def seconds(self, work: Work, dtype: str) -> tuple[float, str]:
        """The shortest time for a computation, and the limit that sets it."""
        compute, memory = work.flops / self.flops[dtype], work.bytes / self.bytes
        return (compute, "products") if compute > memory else (memory, "memory")

    def __str__(self) -> str:
        products = ", ".join(f"{rate / 1e12:.3g} TFLOP/s in {dtype}" for dtype, rate in self.flops.items())
        return f"products of {products}, copies of {self.bytes / 1e9:.3g} GB/s"


def ceilings(dtypes: Sequence[str]) -> Ceilings:
    """Measures this device through JAX: a product of two large square matrices of random numbers, and a copy."""
    on_cpu = jax.default_backend() == "cpu"
    side, count = (1024, 2**26) if on_cpu else (8192, 2**30)
    flops = {}
    for dtype in dtypes:
        matrix = jax.random.normal(jax.random.key(0), (side, side), dtype)
        flops[dtype] = 2 * side**3 / _seconds(jax.jit(jnp.matmul), matrix, matrix)
    values = jnp.arange(count, dtype=jnp.float32)
    return Ceilings(flops, 8 * count / _seconds(jax.jit(lambda values: values + 1), values))


def torch_work(call: Callable[[], object]) -> float:
    """The operations of all products in PyTorch, none computed twice; `call` works on tensors of the device meta."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def median_seconds(
    call: Callable[[], object], repeats: int, most_s: float = math.inf, once_s: float = math.inf
) -> float:
    """The median time of several calls, after two that compile or allocate.

    Args:
      call: the function.
      repeats: the largest number of timed calls.
      most_s: after this time no call follows the third.
      once_s: if the first call takes longer, its time is returned.
    """

    def seconds() -> float:
        begun = time.perf_counter()
        call()
        return time.perf_counter() - begun

    if (first := seconds()) > once_s:
        return first
    call()
    times: list[float] = []
    while len(times) < repeats and (len(times) < 3 or sum(times) < most_s):
        times.append(seconds())
    return statistics.median(times)


def wait_for_torch() -> None:
    """Waits until PyTorch's device has finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _seconds(program: Callable[..., jax.Array], *values: jax.Array) -> float:
    return median_seconds(lambda: jax.block_until_ready(program(*values)), 10)
