"""Detection of silent data corruption: some steps are computed again, and the results must be equal bit for bit.

Every config.health.recompute_every steps:

* Where there are several devices, each of them, in all processes, computes the same small step alone: the bags of the first
  device. A device that differs from the majority is faulty.
* The step is computed a second time, from a copy of the state before it. Where a process has several devices, each does
  the work of its neighbour. A difference that the first comparison does not explain is a transient error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, PyTree, UInt32

from crcjax.data.bags import Bag
from crcjax.errors import CorruptionError
from crcjax.parallel.mesh import AXES, device_mesh, local_mesh, on_local_mesh, replicated
from crcjax.parallel.replica_check import local_checksums
from crcjax.runs.train_state import TrainState

# A compiled step; it donates its state.
Step = Callable[[TrainState, Bag], tuple[TrainState, dict[str, Array]]]
CORRUPTION = "silent_corruption"


class Recomputation:
    """Takes the steps of a run, and computes every `every`-th again (0: none).

    Args:
      step: the compiled step.
      build: returns the jitted step for another mesh.
      mesh: the devices of `step`.
      every: config.health.recompute_every.
      on_event: called with the kind and the facts of an event before the error is raised.
    """

    def __init__(
        self, step: Step, build: Callable[[Mesh], Step], mesh: Mesh, every: int, on_event: Callable[..., None]
    ):
        self._step, self._mesh, self._every, self._on_event = step, mesh, every, on_event
        if not every:
            return
        # These steps are compiled when they are first called.
        self._neighbours = exchange_devices(mesh)
        self._step_of_neighbours = build(self._neighbours) if self._neighbours != mesh else step
        meshes = [device_mesh(devices=[device]) for device in jax.local_devices()]
        self._steps_alone = [(one, build(one)) for one in meshes] if mesh.size > 1 else []

    def __call__(self, number: int, state: TrainState, batch: Bag) -> tuple[TrainState, dict[str, Array]]:
        """Takes step `number`. Raises CorruptionError, in all processes, if it was computed again with another result."""
        if not self._every or number % self._every:
            return self._step(state, batch)
        before = jax.tree.map(lambda leaf: leaf.copy(), state)
        after, metrics = self._step(state, batch)
        # Checksums are compared on the host.
        with jax.transfer_guard("allow"):
            if self._steps_alone:
                self._compare_devices(number, before, batch)
            self._compare_again(number, before, batch, after)
        return after, metrics

    def _compare_devices(self, number: int, state: TrainState, batch: Bag) -> None:
        """Raises CorruptionError if a device computes another result than the others for the bags of the first device."""
        local = local_mesh()
        local_state = on_local_mesh(state, self._mesh, local)
        bags = _bags_of_first_device(batch, self._mesh)
        checksums = []
        for (one, step), device in zip(self._steps_alone, jax.local_devices(), strict=True):
            after, metrics = step(_on_device(local_state, device, one), jax.device_put(bags, replicated(one)))
            checksums.append(_checksums_of_device({"loss": metrics["loss"], "state": vars(after)}, device))
        names = sorted(checksums[0])
        by_device = process_allgather(np.array([[sums[name] for name in names] for sums in checksums], np.uint32))
        if difference := differing_device(by_device):
            process, device, leaf = difference
            self._fail(
                number,
                f"device {device} of process {process} computes another {names[leaf]} than the other devices for the same "
                "bags: it is faulty; leave that machine out",
                process=process,
                device=device,
            )

    def _compare_again(self, number: int, before: TrainState, batch: Bag, after: TrainState) -> None:
        """Raises CorruptionError if the step has another result when it is computed again."""
        if self._neighbours != self._mesh:
            before, batch = (_on_mesh(tree, self._neighbours) for tree in (before, batch))
        again, _ = self._step_of_neighbours(before, batch)
        differing = differing_shards(vars(after), vars(again))
        by_process = process_allgather(np.int32(len(differing)))
        if by_process.any():
            process = int(by_process.argmax())
            name = differing[0] if differing else "state"
            self._fail(
                number,
                f"the {name} of process {process} had another value when the step was computed again: a transient error of a "
                "device or its memory; if it happens again, test that machine",
                process=process,
            )

    def _fail(self, number: int, reason: str, **facts: int) -> None:
        self._on_event(CORRUPTION, step=number, reason=reason, done="the run ended", **facts)
        raise CorruptionError(f"step {number} was computed again: {reason}")


def exchange_devices(mesh: Mesh) -> Mesh:
    """The mesh in which each device does the work of the next one of its process; the same mesh if a process has one."""
    devices = mesh.devices.reshape(-1)
    places_of_process: dict[int, list[int]] = {}
    for place, device in enumerate(devices):
        places_of_process.setdefault(device.process_index, []).append(place)
    exchanged = devices.copy()
    for places in places_of_process.values():
        exchanged[places] = devices[np.roll(places, -1)]
    return Mesh(exchanged.reshape(mesh.devices.shape), AXES, axis_types=mesh.axis_types)


def differing_device(
    checksums: UInt32[np.ndarray, "process device leaf"],
) -> tuple[int, int, int] | None:
    """The process, the device and the leaf of the first checksum that differs from the majority; None if all are equal.

    Of two devices, the second one differs.
    """
    for leaf in range(checksums.shape[-1]):
        majority = Counter(checksums[..., leaf].ravel().tolist()).most_common(1)[0][0]
        for process, device in np.argwhere(checksums[..., leaf] != majority).tolist():
            return process, device, leaf
    return None


def differing_shards(one: PyTree[Array], other: PyTree[Array]) -> list[str]:
    """The names of the shards, or whole leaves, of this process that differ between two trees or between devices."""
    values: dict[str, set[int]] = {}
    for tree in (one, other):
        for checksums in local_checksums(tree):
            for name, checksum in checksums.items():
                values.setdefault(name, set()).add(checksum)
    return [name for name, checksums in values.items() if len(checksums) > 1]


def _bags_of_first_device(batch: Bag, mesh: Mesh) -> Bag:
    """The bags of the mesh's first device, on the host of every process."""
    first = mesh.devices.flat[0] if jax.process_index() == 0 else jax.local_devices()[0]
    shards = [
        next(np.asarray(shard.data) for shard in leaf.addressable_shards if shard.device == first)
        for leaf in jax.tree.leaves(batch)
    ]
    # The broadcast is a sum, which has a wider type.
    received = [
        np.asarray(total).astype(shard.dtype) for total, shard in zip(broadcast_one_to_all(shards), shards, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(batch), received)


def _on_device(tree: Any, device: jax.Device, mesh: Mesh) -> Any:
    """Copies of replicated arrays on the mesh of one device."""

    def copied(leaf: Array) -> Array:
        (data,) = (shard.data for shard in leaf.addressable_shards if shard.device == device)
        return jax.make_array_from_single_device_arrays(leaf.shape, replicated(mesh), [data.copy()])

    return jax.tree.map(copied, tree)


def _on_mesh(tree: Any, mesh: Mesh) -> Any:
    """The same shards on a mesh in which the devices of each process are exchanged."""

    def moved(leaf: Array) -> Array:
        assert isinstance(leaf.sharding, NamedSharding)
        sharding = NamedSharding(mesh, leaf.sharding.spec)
        data_at = {_bounds(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}
        indices = sharding.addressable_devices_indices_map(leaf.shape)
        shards = [
            jax.device_put(data_at[_bounds(index, leaf.shape)], device)
            for device, index in indices.items()
            if index is not None
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, sharding, shards)

    return jax.tree.map(moved, tree)


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    return tuple(axis.indices(size) for axis, size in zip(index, shape, strict=True))


def _checksums_of_device(tree: PyTree[Array], device: jax.Device) -> dict[str, int]:
    return local_checksums(tree)[jax.local_devices().index(device)]
