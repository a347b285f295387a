"""The cluster monitor of a training run: its settings, the devices' memory and the findings."""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from crcjax.monitor.cluster_monitor import ClusterMonitor, DeviceMemory, MonitorSettings
from crcjax.monitor.fault_watch import FaultWatch
from crcjax.monitor.notifier import Notifier, load_settings
from crcjax.parallel.process_group import ProcessGroup
from crcjax.train.memory_budget import Budget


def cluster_monitor(config: ConfigDict, run: Path, group: ProcessGroup, budget: Budget) -> ClusterMonitor:
    """The monitor of this process, not yet started; `config` is config.monitor, `budget` the step's memory."""

    def device_memory() -> DeviceMemory:
        statistics = [device.memory_stats() for device in jax.local_devices()]
        peaks = [stats["peak_bytes_in_use"] for stats in statistics if stats and "peak_bytes_in_use" in stats]
        return DeviceMemory(max(peaks, default=None), budget.total)

    settings = MonitorSettings(config.interval_s, config.metrics_port, config.metrics_address)
    notifier = Notifier(run.name, load_settings(config.notifications)) if config.notifications else None
    watch = FaultWatch(run, notifier) if group.is_main else None
    return ClusterMonitor(run, group.heartbeat, settings, device_memory, group.local_rank, watch)
