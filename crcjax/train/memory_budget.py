"""Memory as a number: what a compiled step takes of its devices, and the fewest parts of a step's bags that fit them."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import psutil
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Mesh
from ml_collections import ConfigDict

from crcjax.data.bags import Bag
from crcjax.errors import CrcjaxError, DeviceMemoryError, InputError, writing
from crcjax.monitor.logs import log
from crcjax.runs.train_state import TrainState

_USABLE = 0.9  # of a device: the rest is lost between allocations, and to buffers of the communication
_BAGS_IN_USE = 3  # of the step that runs, of the one queued, and one on its way, beside those held ready
_NOTE = "memory.json"


@dataclass(frozen=True)
class Budget:
    """Bytes of each device while steps run, by part; `step` is what one step takes, its state and bags included."""

    parameters: int
    optimizer: int
    bags: int
    temporary: int  # activations and gradients
    program: int
    step: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.optimizer + self.bags + self.temporary + self.program

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameters,
            "optimiser": self.optimizer,
            "bags": self.bags,
            "activations and gradients": self.temporary,
            "program": self.program,
        }
        return f"{_size(self.total)} a device: " + ", ".join(f"{name} {_size(value)}" for name, value in parts.items())


@dataclass(frozen=True)
class Parts:
    """The parts in which a step's bags are computed, and how many there can be."""

    count: int
    possible: Sequence[int]


def step_budget(
    step: jax.stages.Wrapped, state: TrainState, bag: Bag, bags_ahead: int = 0
) -> tuple[jax.stages.Compiled, Budget]:
    """The step compiled for an abstract state and bag, and what it takes by the compiler's own account.

    `bags_ahead` is config.data.device_prefetch. Nothing is allocated. Raises InputError where the compiler does not count.
    """
    compiled = step.lower(state, bag).compile()
    counted = compiled.memory_analysis()
    if counted is None:
        raise InputError(
            f"{jax.local_devices()[0].platform}: its compiler does not count memory; use a version of jax that does"
        )
    parameters, whole, bags = (_bytes_on_device(tree) for tree in (state.params, state, bag))
    # The outputs of the step reuse the memory of its donated state, except where the compiler could not.
    returned = counted.output_size_in_bytes - counted.alias_size_in_bytes
    temporary, program = counted.temp_size_in_bytes + max(0, returned), counted.generated_code_size_in_bytes
    bags_held = bags * (bags_ahead + _BAGS_IN_USE)
    alone = counted.argument_size_in_bytes + temporary + program
    return compiled, Budget(parameters, whole - parameters, bags_held, temporary, program, alone)


def fitting_step(
    build: Callable[[ConfigDict], Any],  # a jitted step
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
    bag: Bag,
    run: Path,
) -> tuple[jax.stages.Compiled, Budget, Parts]:
    """The step that computes its bags in the fewest parts that fit the devices, its budget, and the parts.

    At least as many as config.train.micro_batches and as were kept in the run; the step is the same whatever their number.
    `state` and `bag` are abstract: nothing is allocated. Raises InputError, with the budget in words, if not even single
    bags fit.
    """
    limit = device_memory(config.train.memory_gib)
    each = config.data.batch_size // mesh.shape["data"]
    # The contrastive loss compares all bags with each other.
    counts = [1] if config.train.contrastive_weight else [count for count in range(1, each + 1) if each % count == 0]
    least = max(config.train.micro_batches, _recorded_parts(run).count)
    for count in [count for count in counts if count >= least] or counts[-1:]:
        compiled, budget = step_budget(build(_with_parts(config, count)), state, bag, config.data.device_prefetch)
        if budget.total <= limit:
            return compiled, budget, Parts(count, tuple(counts))
    raise InputError(
        f"a step does not fit the devices: with {each // count} of {each} bags a device at a time it takes {budget}, and a "
        f"device has {_size(limit)} to use; lower config.data.regions_per_bag, config.model.encode_regions or the model's width, "
        "or divide it over more devices (config.mesh)"
    )


def device_memory(most_gib: float) -> int:
    """Bytes of each device that a run may use: at most `most_gib` if that is not 0, and the same for all processes."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    counted = [memory_stats["bytes_limit"] for memory_stats in stats if "bytes_limit" in memory_stats]
    own = min(counted) if counted else _host_memory() // jax.local_device_count()
    least = int(np.min(process_allgather(np.int64(own // 2**20)))) * 2**20  # int64 becomes int32 on the way
    return min(int(least * _USABLE), int(most_gib * 2**30) or least)


def _host_memory() -> int:
    """Bytes of this machine, or of the part of it that a container may use."""
    limit_bytes = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(path).exists() and (limit := Path(path).read_text().strip()).isdigit():
            limit_bytes = min(limit_bytes, int(limit))
    return limit_bytes


@contextmanager
def memory_errors(made_of: Callable[[str], CrcjaxError]) -> Iterator[None]:
    """Raises what is made of JAX's own words where a device's memory does not suffice for what is within."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # Where a later computation waits for the one that lacked memory, JAX reports an internal error with these words.
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        raise made_of(str(error).splitlines()[0]) from error


def memory_of_step(parts: Parts) -> AbstractContextManager[None]:
    """Raises DeviceMemoryError where memory does not suffice for steps of `parts`; JAX says so when they are waited for."""
    return memory_errors(lambda words: DeviceMemoryError(words, parts.count))


def keep_parts(run: Path, parts: Parts) -> None:
    """Keeps them for the next start. Raises OutputError."""
    with writing(run, "choose another --workdir"):
        partial = run / f".{_NOTE}.{jax.process_index()}"
        partial.write_text(json.dumps(asdict(parts)) + "\n")
        partial.replace(run / _NOTE)


def more_parts(run: Path, tried: int) -> int:
    """Halves the micro-batch for the next start, after memory did not suffice for `tried` parts; returns the new parts.

    Several processes may say so of the same step. Raises InputError if bags came one by one already.
    """
    parts = _recorded_parts(run)
    larger = [count for count in parts.possible if count >= 2 * tried]
    if not larger:
        raise InputError(
            f"{run}: the devices' memory does not suffice for a step of {tried} parts, and there can be no more; lower "
            "config.data.regions_per_bag, config.model.encode_regions or the model's width, or free the devices of other programs"
        )
    keep_parts(run, Parts(larger[0], parts.possible))
    return larger[0]


def train_in_smaller_parts(run: Path, train: Callable[[], None]) -> None:
    """Calls `train`, and again with half the micro-batch whenever the memory of a device did not suffice for a step.

    Training then resumes from the run's last checkpoint: a step donates its state, and a copy of it would take the memory
    that lacks. Raises DeviceMemoryError where several processes have to be started again for that.
    """
    while True:
        try:
            return train()
        except DeviceMemoryError as error:
            message = f"{run}: {error} Steps are computed in {more_parts(run, error.parts)} parts from now on"
            if jax.process_count() > 1:  # the other processes wait within the step
                raise DeviceMemoryError(f"{message}; give the same command again", error.parts) from error
            log.info(message)
        gc.collect()  # frees what the frames of the failed step held


def _recorded_parts(run: Path) -> Parts:
    """The parts of the run's last start; one part for a new run, and where memory.json is damaged, which is set aside."""
    path = run / _NOTE
    try:
        parts = Parts(**json.loads(path.read_text()))
        if not (isinstance(parts.count, int) and parts.count >= 1 and all(isinstance(n, int) for n in parts.possible)):
            raise ValueError("count must be an integer from 1, possible a list of integers")
        return parts
    except FileNotFoundError:
        return Parts(1, (1,))
    except (ValueError, TypeError) as error:
        aside = path.with_name(f"{_NOTE}.damaged")
        log.warning(
            f"{path}: is damaged ({str(error).partition(chr(10))[0]}); renamed to {aside.name}, and the number of "
            "micro-batches is chosen anew"
        )
        if jax.process_index() == 0:
            with writing(aside, "choose another --workdir"):
                path.replace(aside)
        return Parts(1, (1,))


def _with_parts(config: ConfigDict, count: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.train.micro_batches = count
    return config


def _bytes_on_device(tree: Any) -> int:
    """Bytes of arrays, concrete or abstract, on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
