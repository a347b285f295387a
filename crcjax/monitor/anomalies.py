"""Online detection of faulty machines, from the samples of all processes: what is wrong, where, the evidence and the remedy.

Two kinds of rules, both robust against outliers. A process is compared with the others at the same time (median and median absolute
deviation over processes), and with its own past (over its last samples). A rule must hold for several samples in series, so that
one late sample is no finding. Thresholds are fixed numbers of this file; none is learned from the run.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from crcjax.monitor.gpu_sensors import GpuReading
from crcjax.monitor.samples import Sample
from crcjax.monitor.spikes import robust_z

SLOW_DATA, SLOW_DEVICE, NO_CORE, PAUSED, STANDS_STILL = "slow_data", "slow_device", "no_core", "paused", "stands_still"
SLOW_DISK, FULL_DISK, SLOW_NETWORK, LOST_PEER = "slow_disk", "full_disk", "slow_network", "lost_peer"
MEMORY_LEAK, MEMORY_SHORT, CLOCK_SKEW = "memory_leak", "memory_short", "clock_skew"
GPU_THROTTLED, GPU_SLOW_CLOCK, GPU_MEMORY_ERRORS = "gpu_throttled", "gpu_slow_clock", "gpu_memory_errors"
GPU_DRIVER_ERROR, GPU_LOST, GPU_LINK_DOWN = "gpu_driver_error", "gpu_lost", "gpu_link_down"

# Samples in series for which a rule must hold, except those of _AT_ONCE.
_SERIES = 2
# A process is slower than its peers from this robust z-score on. The deviation between processes is at least this fraction of a
# step, so that 15 % of a step count.
_LEAST_Z, _LEAST_DEVIATION = 3.0, 0.05
# A slow disk, network or sampler: at least this many seconds, and this many times its own median.
_LEAST_DISK_S, _LEAST_LATENCY_S, _LEAST_LATE_S = 0.05, 0.012, 0.25
_LEAST_FACTOR = 4.0
_LEAST_CLOCK_S = 1.0
# A process that waits for a core for longer than this fraction of the time, and its peers for less than half as long.
_LEAST_CORE_WAIT = 0.25
# A process that has neither sampled nor ended for this long is lost.
_SILENCE_S = 3.0
_FREE_BYTES, _FREE_SECONDS = 2 << 30, 600.0
_MEMORY_LEFT = 0.03
# A leak: a steady growth over this many samples of the process, faster than this; the share of samples that grew.
_LEAK_SAMPLES, _LEAK_BYTES_PER_S, _STEADY = 20, 80 << 10, 0.8
_CLOCK_SHARE, _BUSY = 0.7, 0.5
_HISTORY = 60
# A standstill: longer than this, and this many times a usual step.
_STILL_S, _STILL_FACTOR = 3.0, 10.0
# The phases within a step; a save or an evaluation may take longer.
_IN_STEP = ("computing", "reading its bags")


@dataclass(frozen=True)
class Finding:
    """A fault that was detected.

    Attributes:
      kind: one of the names above.
      process, host: where.
      evidence: the numbers that show it.
      cause: the probable cause.
      remedy: what to do.
    """

    kind: str
    process: int
    host: str
    evidence: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.host}, process {self.process}: {self.evidence}; probably {self.cause}; {self.remedy}"


# By kind: the probable cause, and the remedy.
EXPLANATIONS: dict[str, tuple[str, str]] = {
    SLOW_DATA: (
        "slow storage or too few readers there",
        "raise config.data.read_threads, or check that machine's storage",
    ),
    SLOW_DEVICE: (
        "a device that is throttled or shared",
        "check its temperature and other users; leave that machine out",
    ),
    NO_CORE: ("another program on that machine", "end the other program, or ask for more cores"),
    PAUSED: ("a machine that was suspended, swaps or is overloaded", "check that machine's memory and other programs"),
    STANDS_STILL: ("a process that hangs", "see its log; the run ends after config.train.stall_timeout_s and resumes"),
    SLOW_DISK: ("a disk or file system that is overloaded or fails", "check the storage of the run directory"),
    FULL_DISK: ("checkpoints or other files that fill the disk", "free space, or lower config.train.keep_newest"),
    SLOW_NETWORK: ("a network link that is congested or faulty", "check that machine's network; leave it out"),
    LOST_PEER: (
        "a process that was killed, or a machine or network that failed",
        "the others end and resume without help",
    ),
    MEMORY_LEAK: ("a memory leak", "restart before the memory is used up; report it with the log"),
    MEMORY_SHORT: (
        "too many readers or other programs",
        "lower config.data.prefetch or read_threads, or ask for more memory",
    ),
    CLOCK_SKEW: ("a clock that is not synchronised", "start chrony or ntpd on that machine"),
    GPU_THROTTLED: ("heat or power supply", "check its cooling and power; leave that machine out"),
    GPU_SLOW_CLOCK: (
        "a power or clock limit",
        "compare nvidia-smi -q -d CLOCK,POWER with another GPU; reset the limit",
    ),
    GPU_MEMORY_ERRORS: (
        "failing memory of the GPU",
        "drain that machine, reset the GPU, and replace it if errors return",
    ),
    GPU_DRIVER_ERROR: ("a fault of the GPU, its driver or the program", "look the Xid number up; drain that machine"),
    GPU_LOST: ("a GPU that fell off the bus", "drain and reboot that machine"),
    GPU_LINK_DOWN: ("a broken NVLink", "drain that machine; check nvidia-smi nvlink -s"),
}


# Changes, long pauses and trends that no single late sample imitates.
_AT_ONCE = (PAUSED, STANDS_STILL, FULL_DISK, MEMORY_LEAK, GPU_MEMORY_ERRORS, GPU_DRIVER_ERROR, GPU_LOST)


@dataclass
class _Past:
    """The last samples of a process, and which rules held in them."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=_HISTORY))
    series: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))


class Detector:
    """Reads the samples of all processes as they come, and reports each fault when it begins.

    A fault is reported again only after it was gone for a sample.
    """

    def __init__(self) -> None:
        self._past: defaultdict[int, _Past] = defaultdict(_Past)
        self._since: dict[int, tuple[float, float]] = {}

    def update(self, samples: Sequence[Sample], now_s: float) -> list[Finding]:
        """The faults that begin with these samples.

        Args:
          samples: the newest sample of each process; those that were seen before count for silence alone.
          now_s: a monotonic time in seconds, by which silence is measured, so that no machine's clock matters.
        """
        findings = [finding for sample in samples if (finding := self._lost(sample, now_s))]
        new = [sample for sample in samples if self._is_new(sample)]
        running = [sample for sample in samples if not sample.ending]
        for sample in new:
            past = self._past[sample.process]
            evidence = dict(
                _evidence(sample, past.samples, [other for other in running if other.process != sample.process])
            )
            past.samples.append(sample)
            for kind in EXPLANATIONS:
                if kind == LOST_PEER:
                    continue
                past.series[kind] = past.series[kind] + 1 if kind in evidence else 0
                if past.series[kind] == _needed(kind):
                    findings.append(_finding(kind, sample, evidence[kind]))
        return findings

    def _is_new(self, sample: Sample) -> bool:
        past = self._past[sample.process].samples
        return not sample.ending and (not past or past[-1].time_s != sample.time_s)

    def _lost(self, sample: Sample, now_s: float) -> Finding | None:
        time_s, since_s = self._since.get(sample.process, (sample.time_s, now_s))
        if time_s != sample.time_s:
            since_s = now_s
        self._since[sample.process] = sample.time_s, since_s
        silent_s = now_s - since_s
        series = self._past[sample.process].series
        # A single sample may be of an earlier attempt. The interval may be long in a run of many processes.
        has_lived = len(self._past[sample.process].samples) > 1
        is_lost = has_lived and not sample.ending and silent_s > max(_SILENCE_S, 3 * sample.interval_s)
        series[LOST_PEER] = series[LOST_PEER] + 1 if is_lost else 0
        return _finding(LOST_PEER, sample, f"no sample for {silent_s:.1f} s") if series[LOST_PEER] == 1 else None


def _finding(kind: str, sample: Sample, evidence: str) -> Finding:
    return Finding(kind, sample.process, sample.host, evidence, *EXPLANATIONS[kind])


def _needed(kind: str) -> int:
    """The samples in series that a kind of fault needs."""
    return 1 if kind in _AT_ONCE else _SERIES


def _evidence(sample: Sample, past: Sequence[Sample], others: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """The kinds of fault that a sample shows, each with its evidence."""
    yield from _slow_work(sample, others)
    yield from _machine(sample, past)
    yield from _network(sample, past)
    yield from _memory(sample, past)
    for gpu in sample.gpus:
        earlier = next((g for s in reversed(past) for g in s.gpus if g.index == gpu.index), None)
        yield from _gpu(gpu, earlier)


def _slow_work(sample: Sample, others: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """Work that a process does alone, so that only the slow one is slow at it."""
    measures: Mapping[str, tuple[str, Callable[[Sample], float | None]]] = {
        SLOW_DATA: ("it waits for its bags", lambda s: s.reading_s),
        SLOW_DEVICE: ("its slowest device takes for a fixed computation", lambda s: s.probe_s),
    }
    for kind, (activity, value_of) in measures.items():
        seconds = value_of(sample)
        peers = [value for other in others if (value := value_of(other)) is not None]
        if seconds is None or not peers:
            continue
        median = statistics.median(peers)
        scale = max(sample.step_s or 0.0, median) if kind == SLOW_DATA else median
        if robust_z(seconds, peers, max(_LEAST_DEVIATION * scale, 1e-4)) >= _LEAST_Z:
            yield kind, f"{activity} {seconds:.3g} s a step, the others {median:.3g} s"
    waited = sample.host_reading.process_wait_share
    waits = [share for other in others if (share := other.host_reading.process_wait_share) is not None]
    if waited is not None and waited > _LEAST_CORE_WAIT and waited > 2 * _usual(waits):
        yield NO_CORE, f"it was ready for {waited:.0%} of the time and had no core"


def _machine(sample: Sample, past: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    if sample.late_s > _LEAST_LATE_S + 4 * _usual([s.late_s for s in past]):
        yield PAUSED, f"it stood still for {sample.late_s:.2g} s"
    step_s = _usual([s.step_s for s in past if s.step_s is not None])
    if sample.total_steps and sample.phase in _IN_STEP and sample.phase_s > max(_STILL_S, _STILL_FACTOR * step_s):
        yield STANDS_STILL, f"it is {sample.phase} for {sample.phase_s:.1f} s, usually a step takes {step_s:.2g} s"
    if sample.write_s > max(_LEAST_DISK_S, _LEAST_FACTOR * _usual([s.write_s for s in past])):
        yield SLOW_DISK, f"a file of 2 kB in the run directory takes {sample.write_s:.2g} s"
    free, earlier = sample.host_reading.disk_free_bytes, past[0] if len(past) >= 5 else None
    if free is not None and earlier and earlier.host_reading.disk_free_bytes is not None:
        rate = (earlier.host_reading.disk_free_bytes - free) / max(sample.time_s - earlier.time_s, 1e-3)
        if free < _FREE_BYTES and rate > 0 and free / rate < _FREE_SECONDS:
            yield FULL_DISK, f"{free / 2**20:.0f} MiB are free and {rate / 2**20:.2g} MiB/s are used"
    if free is not None and free < _FREE_BYTES // 64:
        yield FULL_DISK, f"{free / 2**20:.0f} MiB are free at the run directory"


def _network(sample: Sample, past: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    """A process is slow to reach if most of the others are far from it; otherwise the other end is at fault."""
    latencies = sorted(latency_s for latency_s in sample.latency_s.values() if latency_s is not None)
    before = [statistics.median(known) for s in past if (known := [v for v in s.latency_s.values() if v is not None])]
    if latencies and len(before) >= 3:
        median, usual = statistics.median(latencies), _usual(before)
        if median > max(_LEAST_LATENCY_S, _LEAST_FACTOR * usual):
            yield SLOW_NETWORK, f"a round trip to the others takes {median * 1e3:.3g} ms, before {usual * 1e3:.2g} ms"
    offsets = list(sample.clock_offset_s.values())
    # With one other process, the two clocks differ and nobody knows which is wrong; the one that is behind is named.
    if offsets and abs(offset := statistics.median(offsets)) > _LEAST_CLOCK_S and (len(offsets) > 1 or offset > 0):
        yield CLOCK_SKEW, f"its clock is {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} the others'"


def _memory(sample: Sample, past: Sequence[Sample]) -> Iterator[tuple[str, str]]:
    reading = sample.host_reading
    if reading.memory_used_bytes > (1 - _MEMORY_LEFT) * reading.memory_total_bytes:
        yield MEMORY_SHORT, f"{reading.memory_used_bytes / reading.memory_total_bytes:.1%} of the memory are in use"
    recent = [s for s in list(past)[-_LEAK_SAMPLES:] if s.total_steps]
    if len(recent) < _LEAK_SAMPLES:
        return
    sizes = [s.host_reading.process_memory_bytes for s in recent] + [reading.process_memory_bytes]
    rises = sum(later > earlier for earlier, later in pairwise(sizes)) / _LEAK_SAMPLES
    # The median of slopes over half of the samples (after Theil 1950): one jump, as a larger bag causes, is no growth.
    half = len(sizes) // 2
    seconds = max(sample.time_s - recent[0].time_s, 1e-3)
    slope = statistics.median(later - earlier for earlier, later in zip(sizes, sizes[half:], strict=False)) / (
        seconds / 2
    )
    if slope > _LEAK_BYTES_PER_S and rises >= _STEADY:
        yield MEMORY_LEAK, f"its memory grows steadily by {slope * 60 / 2**20:.3g} MiB a minute"


def _gpu(gpu: GpuReading, earlier: GpuReading | None) -> Iterator[tuple[str, str]]:
    name = f"GPU {gpu.index} ({gpu.uuid})"
    if gpu.throttle_reasons:
        yield GPU_THROTTLED, f"{name}: {', '.join(gpu.throttle_reasons)} at {gpu.temperature_c} °C"
    is_busy = gpu.utilisation is not None and gpu.utilisation > _BUSY
    if is_busy and gpu.sm_clock_mhz and gpu.max_sm_clock_mhz and gpu.sm_clock_mhz < _CLOCK_SHARE * gpu.max_sm_clock_mhz:
        yield GPU_SLOW_CLOCK, f"{name}: {gpu.sm_clock_mhz} of {gpu.max_sm_clock_mhz} MHz while it computes"
    if gpu.nvlinks_inactive and gpu.nvlinks_active:
        yield GPU_LINK_DOWN, f"{name}: {gpu.nvlinks_inactive} of its NVLinks are down"
    if earlier is None:
        return
    if gpu.memory_total_bytes is None and earlier.memory_total_bytes is not None:
        yield GPU_LOST, f"{name} no longer answers"
    if gpu.xid_count > earlier.xid_count:
        yield GPU_DRIVER_ERROR, f"{name}: Xid {gpu.xid}"
    if (gpu.ecc_uncorrected or 0) > (earlier.ecc_uncorrected if earlier.ecc_uncorrected is not None else 2**63):
        yield GPU_MEMORY_ERRORS, f"{name}: {gpu.ecc_uncorrected} uncorrected memory errors"


def _usual(values: Sequence[float]) -> float:
    return statistics.median(values) if values else 0.0
