"""The quantities of samples, under one name each on the terminal, at /metrics and in TensorBoard, and their spread."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from crcjax.monitor.gpu_sensors import GpuReading
from crcjax.monitor.samples import Sample

# Above this fraction of the median, the largest value of a process is an imbalance that is named.
_IMBALANCE = 0.1
# A difference of less than this does not matter, whatever its fraction: seconds, and bytes.
_LEAST_SECONDS, _LEAST_BYTES = 1e-3, 64 << 20
_UNITS = {
    "_bytes": (2**30, "GiB"),
    "_seconds": (1e-3, "ms"),
    "_bytes_per_second": (2**20, "MiB/s"),
    "_ratio": (1e-2, "%"),
}


@dataclass(frozen=True)
class Quantity:
    """A named number of a process; `is_counter` if it only grows, `is_balanced` if it should be alike in all processes."""

    name: str
    meaning: str
    value: Callable[[Sample], float | None]
    is_counter: bool = False
    is_balanced: bool = False


@dataclass(frozen=True)
class GpuQuantity:
    """A named number of a GPU."""

    name: str
    meaning: str
    value: Callable[[GpuReading], float | None]
    is_counter: bool = False


@dataclass(frozen=True)
class Value:
    """A value of a quantity, and the process, machine and GPU (None: of none) that it is of."""

    quantity: str
    process: int
    host: str
    gpu: int | None
    value: float


@dataclass(frozen=True)
class Spread:
    """A quantity over all processes or GPUs: least, median and largest value, and which one has it."""

    quantity: str
    least: float
    median: float
    largest: float
    who_least: str
    who_largest: str


PROCESS_QUANTITIES = (
    Quantity("crcjax_step", "Step that the process computes", lambda s: s.step),
    Quantity("crcjax_step_seconds", "Mean time of the steps since the sample before", lambda s: s.step_s),
    Quantity("crcjax_data_wait_seconds", "Part of a step that waited for bags", lambda s: s.reading_s, False, True),
    Quantity(
        "crcjax_probe_seconds", "Time of the slowest device for a fixed computation", lambda s: s.probe_s, False, True
    ),
    Quantity("crcjax_steps", "Steps that were finished", lambda s: s.total_steps, True),
    Quantity("crcjax_steps_seconds", "Seconds of the finished steps", lambda s: s.total_step_s, True),
    Quantity(
        "crcjax_steps_data_wait_seconds", "Seconds of them that waited for bags", lambda s: s.total_reading_s, True
    ),
    Quantity("crcjax_phase_seconds", "Time since the process last reported what it does", lambda s: s.phase_s),
    Quantity("crcjax_sample_time_seconds", "Time of the sample, since 1970", lambda s: s.time_s),
    Quantity("crcjax_sampler_late_seconds", "By how much the sampler woke up too late", lambda s: s.late_s),
    Quantity("crcjax_sampler_cpu_seconds", "Processor time of the sampler", lambda s: s.sampler_cpu_s, True),
    Quantity("crcjax_disk_write_latency_seconds", "Time to write a sample to the run directory", lambda s: s.write_s),
    Quantity("crcjax_cpu_ratio", "Busy fraction of the machine's cores", lambda s: s.host_reading.cpu_share),
    Quantity("crcjax_process_cores", "Cores that the process uses", lambda s: s.host_reading.process_cores),
    Quantity(
        "crcjax_core_wait_ratio", "Time without a core although ready", lambda s: s.host_reading.process_wait_share
    ),
    Quantity("crcjax_memory_used_bytes", "Memory of the machine in use", lambda s: s.host_reading.memory_used_bytes),
    Quantity("crcjax_memory_total_bytes", "Memory of the machine", lambda s: s.host_reading.memory_total_bytes),
    Quantity(
        "crcjax_process_memory_bytes", "Resident memory", lambda s: s.host_reading.process_memory_bytes, False, True
    ),
    Quantity(
        "crcjax_process_peak_memory_bytes", "Its maximum", lambda s: s.host_reading.process_peak_bytes, False, True
    ),
    Quantity(
        "crcjax_device_peak_memory_bytes", "Largest memory of a device", lambda s: s.device_peak_bytes, False, True
    ),
    Quantity("crcjax_device_estimated_memory_bytes", "That memory by the compiler", lambda s: s.device_estimate_bytes),
    Quantity("crcjax_disk_free_bytes", "Free space at the run directory", lambda s: s.host_reading.disk_free_bytes),
    Quantity("crcjax_disk_read_bytes_per_second", "Disks of the machine", lambda s: s.host_reading.disk_read_bytes_s),
    Quantity("crcjax_disk_write_bytes_per_second", "Disks of the machine", lambda s: s.host_reading.disk_write_bytes_s),
    Quantity(
        "crcjax_network_receive_bytes_per_second", "Without loopback", lambda s: s.host_reading.network_receive_bytes_s
    ),
    Quantity("crcjax_network_send_bytes_per_second", "Without loopback", lambda s: s.host_reading.network_send_bytes_s),
    Quantity("crcjax_peer_latency_seconds", "Median round trip to the other processes", lambda s: _median_latency_s(s)),
    Quantity("crcjax_clock_offset_seconds", "Median offset of the others' clocks", lambda s: _median_offset_s(s)),
)
GPU_QUANTITIES = (
    GpuQuantity("crcjax_gpu_utilisation_ratio", "Time in which a kernel ran", lambda g: g.utilisation),
    GpuQuantity("crcjax_gpu_memory_used_bytes", "Memory in use", lambda g: g.memory_used_bytes),
    GpuQuantity("crcjax_gpu_memory_total_bytes", "Memory of the board", lambda g: g.memory_total_bytes),
    GpuQuantity("crcjax_gpu_temperature_celsius", "Temperature", lambda g: g.temperature_c),
    GpuQuantity("crcjax_gpu_power_watts", "Power", lambda g: g.power_w),
    GpuQuantity("crcjax_gpu_energy_joules", "Energy since the driver was loaded", lambda g: g.energy_j, True),
    GpuQuantity("crcjax_gpu_sm_clock_mhz", "Clock of the processors", lambda g: g.sm_clock_mhz),
    GpuQuantity("crcjax_gpu_sm_clock_max_mhz", "Its maximum", lambda g: g.max_sm_clock_mhz),
    GpuQuantity(
        "crcjax_gpu_throttled",
        "1 if heat or power supply slow it",
        lambda g: None if g.throttle_reasons is None else float(bool(g.throttle_reasons)),
    ),
    GpuQuantity("crcjax_gpu_ecc_corrected", "Corrected memory errors", lambda g: g.ecc_corrected, True),
    GpuQuantity("crcjax_gpu_ecc_uncorrected", "Uncorrected memory errors", lambda g: g.ecc_uncorrected, True),
    GpuQuantity("crcjax_gpu_xid_errors", "Errors that the driver reported", lambda g: g.xid_count, True),
    GpuQuantity("crcjax_gpu_nvlinks_inactive", "NVLinks that are down", lambda g: g.nvlinks_inactive),
    GpuQuantity("crcjax_gpu_nvlink_errors", "Errors of its NVLinks", lambda g: g.nvlink_errors, True),
)
_BALANCED = {quantity.name for quantity in PROCESS_QUANTITIES if quantity.is_balanced}


def sample_values(sample: Sample) -> list[Value]:
    """The values of a sample. Quantities that were not measured are left out."""
    measured: list[tuple[str, int | None, float | None]] = [
        (quantity.name, None, quantity.value(sample)) for quantity in PROCESS_QUANTITIES
    ]
    measured += [(quantity.name, gpu.index, quantity.value(gpu)) for gpu in sample.gpus for quantity in GPU_QUANTITIES]
    return [
        Value(name, sample.process, sample.host, gpu, float(value))
        for name, gpu, value in measured
        if value is not None
    ]


def spreads(values: Sequence[Value]) -> list[Spread]:
    """The spread of each quantity over all processes and GPUs, in the order of the values."""
    shared_hosts = Counter(value.host for value in values if value.quantity == "crcjax_step")
    by_quantity: dict[str, list[Value]] = {}
    for value in values:
        by_quantity.setdefault(value.quantity, []).append(value)
    result = []
    for quantity, of_quantity in by_quantity.items():
        least, largest = min(of_quantity, key=_number), max(of_quantity, key=_number)
        median = statistics.median(value.value for value in of_quantity)
        names = (_name(value, shared_hosts[value.host] > 1) for value in (least, largest))
        result.append(Spread(quantity, least.value, median, largest.value, *names))
    return result


def imbalances(all_spreads: Sequence[Spread]) -> list[str]:
    """One sentence for each quantity that should be alike, and of which one process has over 10 % more than the median."""
    sentences = []
    for spread in all_spreads:
        least_difference = _LEAST_BYTES if spread.quantity.endswith("_bytes") else _LEAST_SECONDS
        excess = spread.largest - spread.median
        if spread.quantity in _BALANCED and excess > max(_IMBALANCE * spread.median, least_difference):
            share = f"{excess / spread.median:.0%} more than" if spread.median else "more than"
            sentences.append(
                f"imbalance: {spread.who_largest} has {formatted(spread.quantity, spread.largest)} of "
                f"{readable(spread.quantity)}, {share} the median ({formatted(spread.quantity, spread.median)})"
            )
    return sentences


def scalars(all_spreads: Sequence[Spread]) -> dict[str, float]:
    """The spreads as scalars for TensorBoard, such as monitor/step_seconds/median."""
    return {
        f"monitor/{spread.quantity.removeprefix('crcjax_')}/{statistic}": value
        for spread in all_spreads
        for statistic, value in (("min", spread.least), ("median", spread.median), ("max", spread.largest))
    }


def readable(quantity: str) -> str:
    """The name of a quantity in words, without its unit."""
    name = quantity.removeprefix("crcjax_")
    for ending in ("_bytes_per_second", "_bytes", "_seconds", "_ratio"):
        name = name.removesuffix(ending)
    return name.replace("_", " ")


def formatted(quantity: str, value: float) -> str:
    """A value with its unit."""
    # The longest ending counts: _bytes_per_second is no time.
    for ending, (factor, unit) in sorted(_UNITS.items(), key=lambda item: -len(item[0])):
        if quantity.endswith(ending):
            scaled = value / factor
            if unit == "ms" and scaled >= 1e3:
                scaled, unit = value, "s"
            return f"{scaled:.3g} {unit}" if scaled < 1e3 else f"{scaled:.0f} {unit}"
    return f"{value:.4g}" if value != int(value) else f"{int(value)}"


def _number(value: Value) -> float:
    return value.value


def _name(value: Value, host_is_shared: bool) -> str:
    gpu = "" if value.gpu is None else f" GPU {value.gpu}"
    return f"{value.host}{f' process {value.process}' if host_is_shared else ''}{gpu}"


def _median_latency_s(sample: Sample) -> float | None:
    known = [latency_s for latency_s in sample.latency_s.values() if latency_s is not None]
    return statistics.median(known) if known else None


def _median_offset_s(sample: Sample) -> float | None:
    return statistics.median(sample.clock_offset_s.values()) if sample.clock_offset_s else None
