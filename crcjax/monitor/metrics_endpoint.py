"""The endpoint /metrics of a training process, which Prometheus reads, and the reading of such endpoints."""

from __future__ import annotations

import threading
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from crcjax.errors import InputError
from crcjax.monitor.quantities import GPU_QUANTITIES, PROCESS_QUANTITIES, Value
from crcjax.monitor.samples import Sample

_TIMEOUT_S = 5.0
_LABELS = ("run", "process", "host")


@dataclass(frozen=True)
class MetricsEndpoint:
    """A server of /metrics. `port` is where it listens."""

    port: int
    _server: Any
    _thread: threading.Thread

    def close(self) -> None:
        """Ends the server."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_metrics(newest: Callable[[], Sample | None], address: str, port: int) -> MetricsEndpoint:
    """Answers Prometheus with the newest sample of this process.

    The endpoint belongs to one process, and its children have none, so that nothing is counted twice. Prometheus adds up or compares
    the processes by the labels `run`, `process` and `host`.

    Raises InputError if prometheus-client is missing or the port cannot be opened.
    """
    try:
        import prometheus_client
    except ImportError as error:
        raise InputError(
            "config.monitor.metrics_port needs prometheus-client; pip install 'crcjax[monitor]', or set it to 0"
        ) from error
    registry = prometheus_client.CollectorRegistry()
    registry.register(_SampleCollector(newest))
    try:
        server, thread = prometheus_client.start_http_server(port, address, registry)
    except OSError as error:
        raise InputError(
            f"config.monitor.metrics_port {port} cannot be opened on {address} ({error.strerror}); try another port, or 0"
        ) from error
    return MetricsEndpoint(server.server_port, server, thread)


class _SampleCollector:
    """Makes Prometheus' metrics of the newest sample when it asks for them."""

    def __init__(self, newest: Callable[[], Sample | None]):
        self._newest = newest

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        sample = self._newest()
        if sample is None:
            return
        labels = [sample.run, str(sample.process), sample.host]
        for quantity in PROCESS_QUANTITIES:
            kind = CounterMetricFamily if quantity.is_counter else GaugeMetricFamily
            if (value := quantity.value(sample)) is not None:
                family = kind(quantity.name, quantity.meaning, labels=_LABELS)
                family.add_metric(labels, value)
                yield family
        for gpu_quantity in GPU_QUANTITIES:
            kind = CounterMetricFamily if gpu_quantity.is_counter else GaugeMetricFamily
            family = kind(gpu_quantity.name, gpu_quantity.meaning, labels=(*_LABELS, "gpu", "uuid"))
            for gpu in sample.gpus:
                if (value := gpu_quantity.value(gpu)) is not None:
                    family.add_metric([*labels, str(gpu.index), gpu.uuid], value)
            if family.samples:
                yield family


def read_metrics(addresses: Sequence[str]) -> list[Value]:
    """The values of running processes from their endpoints, each HOST:PORT. Raises InputError for one that does not answer."""
    from prometheus_client.parser import text_string_to_metric_families

    counters = {quantity.name for quantity in (*PROCESS_QUANTITIES, *GPU_QUANTITIES) if quantity.is_counter}
    values = []
    for address in addresses:
        try:
            # Endpoints are inside the cluster; a proxy of the environment would not reach them.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(f"http://{address}/metrics", timeout=_TIMEOUT_S) as reply:
                text = reply.read().decode()
        except (OSError, ValueError) as error:
            raise InputError(
                f"http://{address}/metrics does not answer ({error}); give HOST:PORT of a process whose "
                "config.monitor.metrics_port is not 0, or the run directory"
            ) from error
        for family in text_string_to_metric_families(text):
            for metric in family.samples:
                name = metric.name.removesuffix("_total") if family.name in counters else metric.name
                if name.startswith("crcjax_") and "process" in metric.labels:
                    gpu = int(metric.labels["gpu"]) if "gpu" in metric.labels else None
                    values.append(Value(name, int(metric.labels["process"]), metric.labels["host"], gpu, metric.value))
    return values
