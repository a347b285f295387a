"""Faults are injected into real processes that take steps together; process 0 names the machine."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crcjax.monitor import anomalies
from crcjax.monitor.anomalies import Finding
from crcjax.monitor.fault_watch import read_findings
from crcjax.monitor.samples import read_samples

_COUNT, _INTERVAL_S = 4, 0.5
# A process whose steps take 0.1 s. The file RUN/fault-I changes it: it reads more slowly, its memory grows, its clock is wrong.
WORKER = f"""
import sys, threading, time
from pathlib import Path
from crcjax.monitor.cluster_monitor import ClusterMonitor, MonitorSettings
from crcjax.monitor.fault_watch import FaultWatch
from crcjax.monitor.heartbeat import COMPUTING, READING, HeartbeatWriter

run, process, ended, leaked = Path(sys.argv[1]), int(sys.argv[2]), threading.Event(), []
fault = run / f"fault-{{process}}"
def has(kind):
    return fault.exists() and fault.read_text() == kind
heartbeat = HeartbeatWriter(process, {_COUNT}, "localhost")
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
watch = FaultWatch(run) if process == 0 else None
clock = lambda: time.time() + 3 * has("clock")
with ClusterMonitor(run, heartbeat, MonitorSettings({_INTERVAL_S}), on_samples=watch, clock=clock):
    step = 0
    while not ended.is_set():
        step += 1
        heartbeat.report(step, READING)
        time.sleep(0.005 + 0.04 * has("reading"))
        heartbeat.report(step, COMPUTING)
        if has("leak"):
            leaked.append(b"x" * (1 << 20))
        time.sleep(0.095 if not has("hang") else 60)
"""


def _wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def processes(tmp_path: Path, write_gpus: Callable, nvml_library: Path) -> Iterator[list[subprocess.Popen]]:
    write_gpus({}, {})
    started = []
    for process in range(_COUNT):
        own = {"CUDA_VISIBLE_DEVICES": str(process % 2), "LD_LIBRARY_PATH": str(nvml_library.parent)}
        command = [sys.executable, "-c", WORKER, str(tmp_path), str(process)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | own))
    _wait_until(lambda: len(read_samples(tmp_path)) == _COUNT)
    _wait_until(lambda: all(sample.total_steps > 20 and sample.latency_s for sample in read_samples(tmp_path)))
    yield started
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_faults_of_real_processes_are_found_at_their_process(
    processes: list[subprocess.Popen], tmp_path: Path, write_gpus: Callable
) -> None:
    def finding(kind: str, process: int) -> Finding:
        def matching() -> list[Finding]:
            return [f for f in read_findings(tmp_path) if f.kind == kind]

        _wait_until(lambda: bool(matching()))
        assert {f.process for f in matching()} == {process}, matching()
        return matching()[0]

    (tmp_path / "fault-2").write_text("reading")
    assert "it waits for its bags" in finding(anomalies.SLOW_DATA, 2).evidence
    (tmp_path / "fault-2").write_text("")
    (tmp_path / "fault-1").write_text("clock")
    assert "its clock is 3.0 s ahead of the others'" in finding(anomalies.CLOCK_SKEW, 1).evidence
    (tmp_path / "fault-1").write_text("")
    (tmp_path / "fault-3").write_text("leak")
    assert "its memory grows steadily" in finding(anomalies.MEMORY_LEAK, 3).evidence
    (tmp_path / "fault-3").write_text("hang")
    assert "it is computing for" in finding(anomalies.STANDS_STILL, 3).evidence
    processes[2].send_signal(signal.SIGKILL)
    assert "no sample for" in finding(anomalies.LOST_PEER, 2).evidence
    # GPU 1 is that of processes 1 and 3.
    write_gpus({}, {"throttle": 0x40, "temperature": 93})
    _wait_until(lambda: any(f.kind == anomalies.GPU_THROTTLED for f in read_findings(tmp_path)))
    throttled = [f for f in read_findings(tmp_path) if f.kind == anomalies.GPU_THROTTLED]
    assert {f.process for f in throttled} <= {1, 3}
    assert "GPU 1 (GPU-0001-stub): hardware thermal slowdown at 93 °C" in throttled[0].evidence
