"""Readings of a process and its machine: processor, memory, disk and network, from /proc by psutil."""

from __future__ import annotations

import resource
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class HostReading:
    """One reading of a process and its machine. Rates are means since the reading before; None before the second one.

    Attributes:
      cpu_share: fraction of the machine's cores that were busy.
      process_cores: cores that the process used.
      process_wait_share: fraction of the time in which its main thread was ready to run and had no core.
      memory_used_bytes, memory_total_bytes: the memory of the machine.
      process_memory_bytes, process_peak_bytes: the resident memory of the process, and its maximum.
      disk_free_bytes: free space where the run directory is.
      disk_read_bytes_s, disk_write_bytes_s: of all disks of the machine.
      network_receive_bytes_s, network_send_bytes_s: of all network interfaces except loopback.
    """

    cpu_share: float | None
    process_cores: float | None
    process_wait_share: float | None
    memory_used_bytes: int
    memory_total_bytes: int
    process_memory_bytes: int
    process_peak_bytes: int
    disk_free_bytes: int | None
    disk_read_bytes_s: float | None
    disk_write_bytes_s: float | None
    network_receive_bytes_s: float | None
    network_send_bytes_s: float | None


@dataclass(frozen=True)
class _Counters:
    """Values that only grow; a rate is a difference of two of them."""

    time_s: float
    busy_s: float
    machine_s: float
    process_s: float
    waited_s: float
    disk: tuple[float, float] | None
    network: tuple[float, float]


class HostSensors:
    """Reads this process and its machine.

    `folder` is where free space is measured.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._process = psutil.Process()
        self._before: _Counters | None = None

    def read(self) -> HostReading:
        """A reading; it takes about half a millisecond."""
        now, before = self._counters(), self._before
        self._before = now
        memory, resident_bytes = psutil.virtual_memory(), self._process.memory_info().rss

        def rate(later: float, earlier: float, seconds: float) -> float:
            return max(later - earlier, 0.0) / seconds if seconds > 0 else 0.0

        elapsed_s = now.time_s - before.time_s if before else 0.0

        def rates(later: tuple[float, float] | None, earlier: tuple[float, float] | None) -> list[float] | list[None]:
            if later is None or earlier is None:
                return [None, None]
            return [rate(*pair, elapsed_s) for pair in zip(later, earlier, strict=True)]

        return HostReading(
            rate(now.busy_s, before.busy_s, now.machine_s - before.machine_s) if before else None,
            rate(now.process_s, before.process_s, elapsed_s) if before else None,
            rate(now.waited_s, before.waited_s, elapsed_s) if before else None,
            memory.total - memory.available,
            memory.total,
            resident_bytes,
            # The system counts its maximum a little late.
            max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, resident_bytes),
            _free_bytes(self._folder),
            *rates(now.disk, before.disk if before else None),
            *rates(now.network, before.network if before else None),
        )

    def _counters(self) -> _Counters:
        machine = psutil.cpu_times()
        total_s = sum(machine[:8])
        idle_s = machine.idle + getattr(machine, "iowait", 0.0)
        process = self._process.cpu_times()
        disk = psutil.disk_io_counters()
        interfaces = psutil.net_io_counters(pernic=True)
        received = sum(counts.bytes_recv for name, counts in interfaces.items() if name != "lo")
        sent = sum(counts.bytes_sent for name, counts in interfaces.items() if name != "lo")
        return _Counters(
            time.monotonic(),
            total_s - idle_s,
            total_s,
            process.user + process.system,
            _waited_s(),
            (float(disk.read_bytes), float(disk.write_bytes)) if disk else None,
            (float(received), float(sent)),
        )


def _waited_s() -> float:
    """Seconds that the main thread was ready to run and had no core; 0 on a kernel that does not count them."""
    with suppress(OSError, IndexError, ValueError):
        return int(Path("/proc/self/schedstat").read_text().split()[1]) / 1e9
    return 0.0


def _free_bytes(folder: Path) -> int | None:
    with suppress(OSError):
        return psutil.disk_usage(str(folder)).free
    return None
