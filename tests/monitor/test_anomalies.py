"""Each kind of fault is found in the samples of a run by its machine, and a healthy run shows none."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from crcjax.monitor import anomalies
from crcjax.monitor.anomalies import EXPLANATIONS, Detector, Finding
from crcjax.monitor.gpu_sensors import GpuReading
from crcjax.monitor.host_sensors import HostReading
from crcjax.monitor.samples import Sample

_HOST = HostReading(0.5, 2.0, 0.01, 8 << 30, 64 << 30, 2 << 30, 2 << 30, 500 << 30, 0.0, 0.0, 0.0, 0.0)
_GPU = GpuReading(
    *(0, "GPU-1", "stand-in", 0.95, 1 << 30, 80 << 30, 60, 400.0, 1e6, 1900, 1980),
    **{"throttle_reasons": (), "ecc_corrected": 0, "ecc_uncorrected": 0, "nvlinks_active": 18, "nvlinks_inactive": 0},
)
_FAULTY, _PROCESSES, _BEGIN, _END = 2, 4, 40, 75
Change = Callable[[Sample, int], Sample]


def _healthy(process: int, number: int, noise: random.Random) -> Sample:
    step_s = 1.0 * noise.uniform(0.97, 1.03)
    memory = _HOST.process_memory_bytes + noise.randrange(4 << 20)
    host = replace(_HOST, process_memory_bytes=memory, process_wait_share=noise.uniform(0, 0.05))
    latency_s = {other: noise.uniform(2e-4, 9e-4) for other in range(_PROCESSES) if other != process}
    return Sample(
        *("r", process, _PROCESSES, f"node-{process}", 1, float(number), 1.0, number, "computing", 0.5, ""),
        *(number, number * step_s, number * 0.05, step_s, noise.uniform(0.04, 0.06), noise.uniform(0.0099, 0.0101)),
        *(noise.uniform(0, 0.02), noise.uniform(1e-3, 4e-3), 0.1, None, None, host, (_GPU,), latency_s),
        clock_offset_s={other: noise.gauss(0, 0.01) for other in latency_s},
    )


def _samples(change: Change | None = None, seed: int = 0, count: int = _END) -> Iterator[list[Sample]]:
    noise = random.Random(seed)
    for number in range(count):
        samples = [_healthy(process, number, noise) for process in range(_PROCESSES)]
        if change and number >= _BEGIN:
            samples[_FAULTY] = change(samples[_FAULTY], number)
        yield samples


def _findings(samples: Iterator[list[Sample]]) -> list[tuple[int, Finding]]:
    detector = Detector()
    return [(number, finding) for number, s in enumerate(samples) for finding in detector.update(s, float(number))]


def _host(**changes: float) -> Change:
    return lambda sample, number: replace(sample, host_reading=replace(sample.host_reading, **changes))


def _gpu(**changes: object) -> Change:
    return lambda sample, number: replace(sample, gpus=(replace(_GPU, **changes),))


def _growing(bytes_per_s: int) -> Change:
    def change(sample: Sample, number: int) -> Sample:
        size = sample.host_reading.process_memory_bytes + (number - _BEGIN) * bytes_per_s
        return replace(sample, host_reading=replace(sample.host_reading, process_memory_bytes=size))

    return change


# The weakest faults of the specification are 1.3 times the step time, 20 ms and, without the noise of bags, 10 MB a minute.
_FAULTS: dict[str, Change] = {
    anomalies.SLOW_DATA: lambda s, n: replace(s, reading_s=s.reading_s + 0.3, step_s=1.3),
    anomalies.SLOW_DEVICE: lambda s, n: replace(s, probe_s=0.013, step_s=1.3),
    anomalies.NO_CORE: _host(process_wait_share=0.3),
    anomalies.PAUSED: lambda s, n: replace(s, late_s=0.4),
    anomalies.STANDS_STILL: lambda s, n: replace(s, phase_s=11.0),
    anomalies.SLOW_DISK: lambda s, n: replace(s, write_s=0.06),
    anomalies.FULL_DISK: _host(disk_free_bytes=20 << 20),
    anomalies.SLOW_NETWORK: lambda s, n: replace(s, latency_s=dict.fromkeys(s.latency_s, 0.0205)),
    anomalies.LOST_PEER: lambda s, n: replace(s, time_s=float(_BEGIN - 1)),
    anomalies.MEMORY_LEAK: _growing(8 << 20),
    anomalies.MEMORY_SHORT: _host(memory_used_bytes=63 << 30),
    anomalies.CLOCK_SKEW: lambda s, n: replace(s, clock_offset_s=dict.fromkeys(s.clock_offset_s, 2.0)),
    anomalies.GPU_THROTTLED: _gpu(throttle_reasons=("hardware thermal slowdown",), temperature_c=92),
    anomalies.GPU_SLOW_CLOCK: _gpu(sm_clock_mhz=1200),
    anomalies.GPU_MEMORY_ERRORS: _gpu(ecc_uncorrected=1),
    anomalies.GPU_DRIVER_ERROR: _gpu(xid=79, xid_count=1),
    anomalies.GPU_LOST: _gpu(**dict.fromkeys(("memory_total_bytes", "memory_used_bytes", "utilisation"))),
    anomalies.GPU_LINK_DOWN: _gpu(nvlinks_active=17, nvlinks_inactive=1),
}


@pytest.mark.parametrize("kind", EXPLANATIONS)
def test_a_fault_is_found_once_within_seconds_at_its_machine_with_evidence_and_remedy(kind: str) -> None:
    findings = _findings(_samples(_FAULTS[kind]))
    assert [(finding.kind, finding.host) for _, finding in findings] == [(kind, f"node-{_FAULTY}")]
    ((number, finding),) = findings
    # A leak shows after twenty samples.
    assert _BEGIN <= number <= _BEGIN + (20 if kind == anomalies.MEMORY_LEAK else 3)
    assert finding.evidence
    assert str(finding).startswith(f"node-2, process 2: {finding.evidence}; probably {finding.cause}; ")


def test_a_healthy_run_of_a_thousand_samples_shows_nothing() -> None:
    assert _findings(_samples(seed=1, count=1000)) == []


def test_a_single_late_sample_a_larger_bag_and_a_save_are_no_faults() -> None:
    def once(sample: Sample, number: int) -> Sample:
        if number == _BEGIN:
            return replace(sample, write_s=0.3, reading_s=0.5, latency_s=dict.fromkeys(sample.latency_s, 0.2))
        if number == _BEGIN + 5:
            return replace(sample, phase="saving", phase_s=60.0)
        # From here on it has a larger bag.
        size = sample.host_reading.process_memory_bytes + (300 << 20 if number > _BEGIN + 10 else 0)
        return replace(sample, host_reading=replace(sample.host_reading, process_memory_bytes=size))

    assert _findings(_samples(once)) == []


def test_a_fault_is_reported_again_only_after_it_was_gone() -> None:
    def twice(sample: Sample, number: int) -> Sample:
        return _FAULTS[anomalies.GPU_THROTTLED](sample, number) if number not in range(50, 55) else sample

    assert [number for number, _ in _findings(_samples(twice))] == [_BEGIN + 1, 56]


def test_a_process_that_ended_is_not_lost_and_neither_is_one_of_an_earlier_attempt() -> None:
    ended = (
        [replace(sample, ending="finished", time_s=5.0) for sample in samples] if number > 5 else samples
        for number, samples in enumerate(_samples())
    )
    assert _findings(ended) == []
    earlier = ([*samples[:3], replace(samples[3], time_s=-100.0)] for samples in _samples())
    assert _findings(earlier) == []
