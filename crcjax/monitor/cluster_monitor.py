"""ClusterMonitor: samples this process and its machine while it trains, and compares the processes of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from crcjax.monitor.fault_watch import FaultWatch
from crcjax.monitor.gpu_sensors import GpuSensors
from crcjax.monitor.heartbeat import HeartbeatWriter, StepTotals
from crcjax.monitor.host_sensors import HostSensors
from crcjax.monitor.logs import log
from crcjax.monitor.metrics_endpoint import MetricsEndpoint, serve_metrics
from crcjax.monitor.peer_echo import PeerEcho, RoundTrip, measure_round_trip
from crcjax.monitor.quantities import sample_values, scalars, spreads
from crcjax.monitor.samples import Sample, SampleWriter, read_sample, read_samples

# With more processes each samples less often, so that the file system gets at most this many files a second.
_MOST_FILES_PER_S = 200
# The longest wait for the last sample, which a hanging disk would delay.
_LAST_WAIT_S = 1.0


@dataclass(frozen=True)
class MonitorSettings:
    """How a process is watched.

    Attributes:
      interval_s: seconds between samples; 0 takes none.
      metrics_port: the port of /metrics for the first process of a machine; 0 opens none.
      metrics_address: the address that /metrics is answered on.
    """

    interval_s: float = 1.0
    metrics_port: int = 0
    metrics_address: str = "127.0.0.1"


@dataclass(frozen=True)
class DeviceMemory:
    """The largest memory that a device of this process has used, None if its backend does not say, and the estimate."""

    peak_bytes: int | None = None
    estimate_bytes: int | None = None


class ClusterMonitor:
    """Samples this process in a thread, from entering the context to leaving it.

    The samples are files in RUN/monitor (`crcjax.monitor.samples`), from which `crcjax monitor RUN` shows all processes, and the
    values of /metrics. They take no lock of the training and do not wait for its devices.

    Args:
      run: the run directory.
      heartbeat: where this process stands.
      settings: how often, and the endpoint.
      device_memory: asks the backend for the devices' memory; called in the thread.
      local_rank: the number of processes of this run on this machine before this one.
      on_samples: called after each sample with the newest samples of all processes, and closed at the end; process 0 has one.
      clock: the seconds since 1970.
      echo_host: the name or address by which the others reach this machine; by default that of the heartbeat.
    """

    def __init__(
        self,
        run: Path,
        heartbeat: HeartbeatWriter,
        settings: MonitorSettings | None = None,
        device_memory: Callable[[], DeviceMemory] = DeviceMemory,
        local_rank: int = 0,
        on_samples: FaultWatch | None = None,
        clock: Callable[[], float] = time.time,
        echo_host: str = "",
    ):
        self._run, self._heartbeat, self._settings = run, heartbeat, settings or MonitorSettings()
        self._device_memory, self._local_rank, self._on_samples = device_memory, local_rank, on_samples
        self._clock, self._echo_host = clock, echo_host or heartbeat.host
        self._writer = SampleWriter(run, heartbeat.process)
        self._host_sensors = HostSensors(run)
        self._newest: Sample | None = None
        self._ending, self._ended = "", threading.Event()
        self._endpoint: MetricsEndpoint | None = None
        self._echo: PeerEcho | None = None
        self._thread: threading.Thread | None = None
        self._totals = StepTotals()
        self._write_s = self._cpu_s = 0.0
        self._trips: dict[int, RoundTrip | None] = {}
        # The next process whose latency is measured, and how long the last sample took.
        self._turn, self._sample_s = 0, 0.0

    def __enter__(self) -> ClusterMonitor:
        """Starts to sample. Raises InputError if the port of /metrics cannot be opened."""
        settings = self._settings
        if settings.metrics_port:
            port = settings.metrics_port + self._local_rank
            self._endpoint = serve_metrics(lambda: self._newest, settings.metrics_address, port)
            log.info(f"metrics at http://{settings.metrics_address}:{port}/metrics")
        if settings.interval_s:
            if self._heartbeat.process_count > 1:
                self._echo = PeerEcho(self._echo_host, self._clock)
            self._thread = threading.Thread(target=self._sample_regularly, daemon=True, name="cluster monitor")
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._ending = "finished" if error is None else type(error).__name__
        self._ended.set()
        if self._thread:
            self._thread.join(_LAST_WAIT_S)
        if self._on_samples:
            self._on_samples.close()
        if self._echo:
            self._echo.close()
        if self._endpoint:
            self._endpoint.close()

    @property
    def newest(self) -> Sample | None:
        """The newest sample of this process."""
        return self._newest

    def scalars(self) -> dict[str, float]:
        """Least, median and largest value of every quantity over all processes, for TensorBoard."""
        samples = read_samples(self._run)
        return scalars(spreads([value for sample in samples for value in sample_values(sample)]))

    def _sample_regularly(self) -> None:
        gpu_sensors = GpuSensors()
        if gpu_sensors.absent:
            log.debug(gpu_sensors.absent)
        interval_s = max(self._settings.interval_s, self._heartbeat.process_count / _MOST_FILES_PER_S)
        before = time.monotonic()
        self._sample(gpu_sensors, 0.0, 0.0)
        while not self._ended.wait(interval_s):
            elapsed_s, before = time.monotonic() - before, time.monotonic()
            # The time of the last sample itself is no lateness.
            self._sample(gpu_sensors, elapsed_s, max(elapsed_s - interval_s - self._sample_s, 0.0))
        self._sample(gpu_sensors, time.monotonic() - before, 0.0)
        gpu_sensors.close()

    def _sample(self, gpu_sensors: GpuSensors, interval_s: float, late_s: float) -> None:
        began, began_cpu_s = time.monotonic(), time.thread_time()
        heartbeat, memory = self._heartbeat.current(), self._device_memory()
        totals, before = self._heartbeat.totals, self._totals
        self._totals, steps = totals, totals.steps - before.steps
        sample = Sample(
            self._run.name,
            heartbeat.process,
            heartbeat.process_count,
            heartbeat.host,
            heartbeat.pid,
            self._clock(),
            interval_s,
            heartbeat.step,
            heartbeat.phase,
            heartbeat.phase_s,
            self._ending,
            totals.steps,
            totals.step_s,
            totals.reading_s,
            (totals.step_s - before.step_s) / steps if steps else None,
            (totals.reading_s - before.reading_s) / steps if steps else None,
            heartbeat.probe_s,
            late_s,
            self._write_s,
            self._cpu_s,
            memory.peak_bytes,
            memory.estimate_bytes,
            self._host_sensors.read(),
            gpu_sensors.read(),
            {process: trip.seconds if trip else None for process, trip in self._trips.items()},
            {process: trip.clock_offset_s for process, trip in self._trips.items() if trip},
            self._echo.address if self._echo else None,
        )
        self._newest = sample
        began_writing = time.monotonic()
        self._writer.write(sample)
        self._write_s = time.monotonic() - began_writing
        if heartbeat.process_count > 1:
            self._compare(sample)
        elif self._on_samples:
            self._on_samples([sample])
        self._sample_s = time.monotonic() - began
        self._cpu_s += time.thread_time() - began_cpu_s

    def _compare(self, sample: Sample) -> None:
        """Measures the latency to the next other process in turn; process 0 also hands on the samples of all."""
        others = [process for process in range(sample.process_count) if process != sample.process]
        process = others[self._turn % len(others)]
        self._turn += 1
        peer = read_sample(self._run, process)
        if peer and peer.echo and not peer.ending:
            self._trips[process] = measure_round_trip(peer.echo, self._clock)
        if self._on_samples:
            self._on_samples(read_samples(self._run))
