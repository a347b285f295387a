"""The memory budget of a compiled step, and the number of micro-batches with which it fits the devices."""

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

# Usable fraction of a device's memory: fragmentation and communication buffers take the rest.
_USABLE = 0.9
# Batches on the devices besides the prefetched ones: of the running step, of the queued step, and one in transfer.
_BATCHES_IN_USE = 3
_FILE = "memory.json"


@dataclass(frozen=True)
class Budget:
    """The memory of each device while steps run, in bytes.

    Attributes:
      parameters: the parameters.
      optimizer: the optimiser state.
      bags: the batches of running, queued and prefetched steps.
      temporary: activations and gradients.
      program: the compiled program.
      step: the memory of one step alone, with its state and batch.
    """

    parameters: int
    optimizer: int
    bags: int
    temporary: int
    program: int
    step: int

    @property
    def total(self) -> int:
        """The sum of all except `step`, which is contained in the others."""
        return self.parameters + self.optimizer + self.bags + self.temporary + self.program

    def __str__(self) -> str:
        bytes_by_use = {
            "parameters": self.parameters,
            "optimiser": self.optimizer,
            "bags": self.bags,
            "activations and gradients": self.temporary,
            "program": self.program,
        }
        uses = ", ".join(f"{name} {_size(value)}" for name, value in bytes_by_use.items())
        return f"{_size(self.total)} a device: {uses}"


@dataclass(frozen=True)
class MicroBatches:
    """The number of micro-batches of a step, and the numbers that are possible. RUN/memory.json has these fields."""

    count: int
    possible: Sequence[int]


def step_budget(
    step: jax.stages.Wrapped, state: TrainState, bag: Bag, prefetched: int = 0
) -> tuple[jax.stages.Compiled, Budget]:
    """Compiles a step and returns its memory budget by the compiler's analysis. Nothing is allocated.

    Args:
      step: the jitted step.
      state: the abstract state.
      bag: the abstract batch.
      prefetched: batches held ready on the devices, config.data.device_prefetch.

    Raises:
      InputError: the platform's compiler has no memory analysis.
    """
    compiled = step.lower(state, bag).compile()
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise InputError(
            f"{jax.local_devices()[0].platform}: its compiler has no memory analysis; use a version of jax that has one"
        )
    parameters, state_bytes, batch = (_bytes_on_device(tree) for tree in (state.params, state, bag))
    # The step's outputs reuse the memory of the donated state, except for outputs that the compiler could not alias.
    not_aliased = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    temporary, program = analysis.temp_size_in_bytes + max(0, not_aliased), analysis.generated_code_size_in_bytes
    batches = batch * (prefetched + _BATCHES_IN_USE)
    step_alone = analysis.argument_size_in_bytes + temporary + program
    return compiled, Budget(parameters, state_bytes - parameters, batches, temporary, program, step_alone)


def fitting_step(
    build: Callable[[ConfigDict], Any],
    config: ConfigDict,
    mesh: Mesh,
    state: TrainState,
    bag: Bag,
    run: Path,
) -> tuple[jax.stages.Compiled, Budget, MicroBatches]:
    """Compiles the step with the fewest micro-batches that fit the devices. Nothing is allocated.

    Args:
      build: maps a config to a jitted step.
      config: the whole config. config.train.micro_batches is the least number of micro-batches.
      mesh: the devices.
      state: the abstract state.
      bag: the abstract batch.
      run: the run directory. The number that an earlier start recorded there is a lower bound too.

    Returns:
      The compiled step, its budget and its micro-batches.

    Raises:
      InputError: the step does not fit even with one bag per device at a time.
    """
    limit = device_memory(config.train.memory_gib)
    device_bags = config.data.batch_size // mesh.shape["data"]
    divisors = [count for count in range(1, device_bags + 1) if device_bags % count == 0]
    # The contrastive loss compares all bags of a batch with each other.
    possible = [1] if config.train.contrastive_weight else divisors
    least = max(config.train.micro_batches, _recorded_micro_batches(run).count)
    for count in [count for count in possible if count >= least] or possible[-1:]:
        step = build(_with_micro_batches(config, count))
        compiled, budget = step_budget(step, state, bag, config.data.device_prefetch)
        if budget.total <= limit:
            return compiled, budget, MicroBatches(count, tuple(possible))
    raise InputError(
        f"a step does not fit the devices: with {device_bags // count} of {device_bags} bags a device at a time it takes {budget}, and a "
        f"device has {_size(limit)} to use; lower config.data.regions_per_bag, config.model.encode_regions or the model's width, "
        "or divide it over more devices (config.mesh)"
    )


def device_memory(max_gib: float) -> int:
    """The bytes of each device that a run may use, equal in all processes; at most `max_gib`, if that is not 0."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    limits = [device_stats["bytes_limit"] for device_stats in stats if "bytes_limit" in device_stats]
    local = min(limits) if limits else _host_memory() // jax.local_device_count()
    # In MiB, since process_allgather converts int64 to int32.
    smallest = int(np.min(process_allgather(np.int64(local // 2**20)))) * 2**20
    return min(int(smallest * _USABLE), int(max_gib * 2**30) or smallest)


def _host_memory() -> int:
    """The bytes of this machine's memory, or of the container's memory limit."""
    limit_bytes = psutil.virtual_memory().total
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(path).exists() and (limit := Path(path).read_text().strip()).isdigit():
            limit_bytes = min(limit_bytes, int(limit))
    return limit_bytes


@contextmanager
def memory_errors(make_error: Callable[[str], CrcjaxError]) -> Iterator[None]:
    """Raises `make_error(message)` in place of JAX's error where a device runs out of memory."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # A computation that depends on the failed one raises an internal error that contains one of these texts.
        if not any(text in str(error) for text in ("RESOURCE_EXHAUSTED", "Out of memory")):
            raise
        raise make_error(str(error).splitlines()[0]) from error


def step_memory_errors(micro_batches: MicroBatches) -> AbstractContextManager[None]:
    """Raises DeviceMemoryError where a step runs out of memory. JAX reports this when the step's results are awaited."""
    return memory_errors(lambda message: DeviceMemoryError(message, micro_batches.count))


def record_micro_batches(run: Path, micro_batches: MicroBatches) -> None:
    """Writes RUN/memory.json, which the next start reads. Raises OutputError."""
    with writing(run, "choose another --workdir"):
        partial = run / f".{_FILE}.{jax.process_index()}"
        partial.write_text(json.dumps(asdict(micro_batches)) + "\n")
        partial.replace(run / _FILE)


def halve_micro_batch(run: Path, tried: int) -> int:
    """Records more micro-batches for the next start, after a step with `tried` micro-batches ran out of memory.

    Several processes may call it for the same step.

    Returns:
      The new number: at least twice `tried`, so that a micro-batch has half the bags or fewer.

    Raises:
      InputError: a micro-batch had one bag per device already.
    """
    recorded = _recorded_micro_batches(run)
    larger_counts = [count for count in recorded.possible if count >= 2 * tried]
    if not larger_counts:
        raise InputError(
            f"{run}: the devices ran out of memory in a step of {tried} micro-batches, and there can be no more; lower "
            "config.data.regions_per_bag, config.model.encode_regions or the model's width, or end other programs on the devices"
        )
    record_micro_batches(run, MicroBatches(larger_counts[0], recorded.possible))
    return larger_counts[0]


def retry_with_smaller_micro_batches(run: Path, train: Callable[[], None]) -> None:
    """Calls `train` until it ends, each time with half the micro-batch after a step ran out of memory.

    Training resumes from the run's last checkpoint, since a step donates its state; a copy of the state would need more
    memory. Raises DeviceMemoryError in a run of several processes, which have to be started again.
    """
    while True:
        try:
            return train()
        except DeviceMemoryError as error:
            count = halve_micro_batch(run, error.micro_batches)
            message = f"{run}: {error} Steps are computed in {count} micro-batches from now on"
            # The other processes still wait in the step's communication.
            if jax.process_count() > 1:
                raise DeviceMemoryError(f"{message}; give the same command again", error.micro_batches) from error
            log.info(message)
        # Frees the arrays that the frames of the failed step refer to.
        gc.collect()


def _recorded_micro_batches(run: Path) -> MicroBatches:
    """The micro-batches of the run's last start; one for a new run.

    A damaged memory.json is renamed, and counts as a new run.
    """
    path = run / _FILE
    try:
        recorded = MicroBatches(**json.loads(path.read_text()))
        is_count = isinstance(recorded.count, int) and recorded.count >= 1
        if not (is_count and all(isinstance(count, int) for count in recorded.possible)):
            raise ValueError("count must be an integer from 1, possible a list of integers")
        return recorded
    except FileNotFoundError:
        return MicroBatches(1, (1,))
    except (ValueError, TypeError) as error:
        damaged = path.with_name(f"{_FILE}.damaged")
        log.warning(
            f"{path}: is damaged ({str(error).partition(chr(10))[0]}); renamed to {damaged.name}, and the number of "
            "micro-batches is chosen anew"
        )
        if jax.process_index() == 0:
            with writing(damaged, "choose another --workdir"):
                path.replace(damaged)
        return MicroBatches(1, (1,))


def _with_micro_batches(config: ConfigDict, count: int) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.train.micro_batches = count
    return config


def _bytes_on_device(tree: Any) -> int:
    """The bytes of arrays, concrete or abstract, on each device."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
