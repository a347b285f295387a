"""Samples of real threads and processes, their files, their spread, and the endpoint that Prometheus reads."""

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.monitor import samples
from crcjax.monitor.cluster_monitor import ClusterMonitor, DeviceMemory, MonitorSettings
from crcjax.monitor.heartbeat import COMPUTING, READING, HeartbeatWriter
from crcjax.monitor.metrics_endpoint import read_metrics
from crcjax.monitor.peer_echo import PeerEcho, measure_round_trip
from crcjax.monitor.quantities import formatted, imbalances, readable, sample_values, spreads
from crcjax.monitor.samples import Sample, read_history, read_samples

# A process that computes steps of 20 ms for as long as standard input is open.
WORKER = """
import sys, threading, time
from pathlib import Path
from crcjax.monitor.cluster_monitor import ClusterMonitor, MonitorSettings
from crcjax.monitor.heartbeat import COMPUTING, READING, HeartbeatWriter

run, process, count, reading_s = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
heartbeat, ended = HeartbeatWriter(process, count, "localhost"), threading.Event()
threading.Thread(target=lambda: (sys.stdin.read(), ended.set()), daemon=True).start()
with ClusterMonitor(run, heartbeat, MonitorSettings(0.1), local_rank=process):
    step = 0
    while not ended.is_set():
        step += 1
        heartbeat.report(step, READING)
        time.sleep(reading_s)
        heartbeat.report(step, COMPUTING)
        time.sleep(0.02)
"""


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """A real sample of this process."""
    with ClusterMonitor(tmp_path / "sampled", HeartbeatWriter(0, 1, "node-0"), MonitorSettings(0.01)) as monitor:
        _wait_until(lambda: monitor.newest is not None and monitor.newest.interval_s > 0)
    return monitor.newest


def _wait_until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_sample_has_the_steps_since_the_one_before_and_real_readings_of_the_machine(tmp_path: Path) -> None:
    heartbeat = HeartbeatWriter(0, 1, "node-0")
    with ClusterMonitor(tmp_path, heartbeat, MonitorSettings(0.02), lambda: DeviceMemory(5 << 30, 6 << 30)) as monitor:
        for step in range(1, 40):
            heartbeat.report(step, READING)
            time.sleep(0.002)
            heartbeat.report(step, COMPUTING)
            time.sleep(0.01)
        _wait_until(lambda: monitor.newest.total_steps == 38)
        (running,) = read_samples(tmp_path)
    (ended,) = read_samples(tmp_path)
    assert (running.step, running.phase, running.ending) == (39, COMPUTING, "")
    assert ended.ending == "finished"
    assert 0.011 < ended.total_step_s / ended.total_steps < 0.1
    assert 0.001 < ended.total_reading_s / ended.total_steps < ended.total_step_s / ended.total_steps
    machine = ended.host_reading
    assert 0 < machine.process_memory_bytes <= machine.process_peak_bytes < machine.memory_total_bytes
    assert 0 <= machine.cpu_share <= 1
    assert machine.disk_free_bytes > 0
    assert (ended.device_peak_bytes, ended.device_estimate_bytes) == (5 << 30, 6 << 30)
    assert read_history(tmp_path, 0)[-1] == ended
    values = {value.quantity: value.value for value in sample_values(ended)}
    assert values["crcjax_device_peak_memory_bytes"] == 5 << 30
    assert values["crcjax_steps"] == 38
    assert monitor.scalars()["monitor/device_peak_memory_bytes/max"] == 5 << 30


def test_the_history_stays_small_and_a_broken_line_is_left_out(
    tmp_path: Path, sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_HISTORY_BYTES", 8_000)
    writer = samples.SampleWriter(tmp_path, 0)
    for step in range(600):
        writer.write(replace(sample, step=step, ending=""))
    history = read_history(tmp_path, 0)
    assert 3 < len(history) < 20
    assert {later.step - earlier.step for earlier, later in pairwise(history)} == {10}
    with open(tmp_path / samples.FOLDER / "process-0.jsonl", "a") as file:
        file.write('{"run": "r", "proc')
    assert read_history(tmp_path, 0) == history


def test_processes_of_an_earlier_attempt_and_damaged_files_are_no_samples(tmp_path: Path, sample: Sample) -> None:
    folder = tmp_path / samples.FOLDER
    for process in range(3):
        samples.SampleWriter(tmp_path, process).write(replace(sample, process=process, process_count=3, time_s=1.0))
    for process in range(2):
        samples.SampleWriter(tmp_path, process).write(replace(sample, process=process, process_count=2, time_s=9.0))
    assert [read.process for read in read_samples(tmp_path)] == [0, 1]
    (folder / "process-1.json").write_text('{"run": ')
    values = json.loads((folder / "process-0.json").read_text()) | {"added_by_a_newer_version": 1}
    (folder / "process-0.json").write_text(json.dumps(values))
    assert read_samples(tmp_path) == [replace(sample, process=0, process_count=2, time_s=9.0)]


def test_the_spread_names_the_process_and_an_imbalance_above_a_tenth(sample: Sample) -> None:
    def with_peak(process: int, gib: float) -> Sample:
        reading = replace(sample.host_reading, process_peak_bytes=int(gib * 2**30))
        return replace(sample, process=process, process_count=3, host=f"node-{process}", host_reading=reading)

    def spread_of(*peaks: float):
        values = [value for process, gib in enumerate(peaks) for value in sample_values(with_peak(process, gib))]
        return spreads(values)

    (peak,) = [s for s in spread_of(4, 4.1, 5) if s.quantity == "crcjax_process_peak_memory_bytes"]
    assert (peak.least / 2**30, peak.who_least) == (4, "node-0")
    assert (round(peak.largest / 2**30), peak.who_largest) == (5, "node-2")
    (sentence,) = imbalances(spread_of(4, 4.1, 5))
    assert sentence == "imbalance: node-2 has 5 GiB of process peak memory, 22% more than the median (4.1 GiB)"
    assert imbalances(spread_of(4, 4.1, 4.5)) == []
    # With two processes the median lies between them.
    assert len(imbalances(spread_of(4, 5))) == 1


def test_numbers_have_units_that_can_be_read() -> None:
    assert formatted("crcjax_step_seconds", 0.0123) == "12.3 ms"
    assert formatted("crcjax_step_seconds", 12.3) == "12.3 s"
    assert formatted("crcjax_memory_used_bytes", 3 * 2.0**30) == "3 GiB"
    assert formatted("crcjax_network_send_bytes_per_second", 2.0**20) == "1 MiB/s"
    assert formatted("crcjax_cpu_ratio", 0.5) == "50 %"
    assert (formatted("crcjax_steps", 12.0), readable("crcjax_data_wait_seconds")) == ("12", "data wait")


def test_an_echo_measures_the_latency_and_the_clock_of_the_other_process_and_answers_nobody_else() -> None:
    echo = PeerEcho("127.0.0.1", clock=lambda: time.time() + 30)
    trip = measure_round_trip(echo.address)
    assert 0 < trip.seconds < 0.2
    assert trip.clock_offset_s == pytest.approx(30, abs=0.2)
    assert measure_round_trip(replace(echo.address, token="00" * 16)) is None
    echo.close()
    assert measure_round_trip(echo.address) is None
    assert measure_round_trip(replace(echo.address, host="no-such-machine.invalid")) is None


def test_metrics_have_the_labels_of_the_run_and_are_read_back(
    tmp_path: Path, write_gpus: Callable, crcjax: Callable
) -> None:
    write_gpus({"temperature": 2**32 - 1}, {"temperature": 70})
    heartbeat = HeartbeatWriter(0, 1, "node-0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with ClusterMonitor(tmp_path / "run-7", heartbeat, MonitorSettings(0.05, port)) as monitor:
        _wait_until(lambda: monitor.newest is not None)
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        values = read_metrics([f"127.0.0.1:{port}"])
        view = crcjax("monitor", f"127.0.0.1:{port}", "--once")
        with pytest.raises(InputError, match=r"config\.monitor\.metrics_port .* cannot be opened"):
            ClusterMonitor(tmp_path, heartbeat, MonitorSettings(0.05, port)).__enter__()
    temperatures = [line for line in text.splitlines() if line.startswith("crcjax_gpu_temperature")]
    labels = 'run="run-7"', 'process="0"', 'host="node-0"', 'gpu="1"', 'uuid="GPU-0001-stub"'
    assert len(temperatures) == 1
    assert all(label in temperatures[0] for label in labels)
    assert "crcjax_steps_total{" in text
    assert [value.value for value in values if value.quantity == "crcjax_gpu_temperature_celsius"] == [70]
    assert {"crcjax_steps", "crcjax_gpu_ecc_corrected", "crcjax_step"} <= {value.quantity for value in values}
    assert "1 processes on 1 machines" in view.stdout
    assert "node-0 GPU 1" in view.stdout
    with pytest.raises(InputError, match="does not answer"):
        read_metrics([f"127.0.0.1:{port}"])


def test_two_processes_are_compared_while_they_run_at_a_two_hundredth_of_their_time(
    tmp_path: Path, crcjax: Callable
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-c", WORKER, str(run)]
    processes = [
        subprocess.Popen([*command, str(index), "2", str(reading_s)], stdin=subprocess.PIPE)
        for index, reading_s in enumerate((0.002, 0.03))
    ]
    try:
        _wait_until(lambda: len(read_samples(run)) == 2)
        _wait_until(lambda: all(s.latency_s and s.total_steps > 10 for s in read_samples(run)))
        # A step may be longer than a sample.
        _wait_until(lambda: all(s.reading_s is not None for s in read_samples(run)))
        view = crcjax("monitor", run, "--once")
        earlier = read_samples(run)
        _wait_until(lambda: read_samples(run)[0].time_s > earlier[0].time_s + 1.0)
        later = read_samples(run)
    finally:
        for process in processes:
            process.communicate()
    for before, after in zip(earlier, later, strict=True):
        cpu_share = (after.sampler_cpu_s - before.sampler_cpu_s) / (after.time_s - before.time_s)
        # They sample ten times as often as a training does.
        assert cpu_share / 10 < 0.005
    first, second = read_samples(run)
    assert 0 < first.latency_s[1] < 0.5
    assert abs(second.clock_offset_s[0]) < 0.5
    assert view.returncode == 0
    assert "2 processes on 1 machines" in view.stdout
    assert "imbalance: localhost process 1 has " in view.stdout
    assert "of data wait" in view.stdout


def test_a_folder_without_samples_is_one_line_with_a_remedy(tmp_path: Path, crcjax: Callable) -> None:
    done = crcjax("monitor", tmp_path, "--once")
    assert done.returncode == 2
    assert f"{tmp_path}: has no samples; give the --workdir of a training that has begun" in done.stderr


def test_the_threads_end_with_the_block(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with ClusterMonitor(tmp_path, HeartbeatWriter(1, 2, "localhost"), MonitorSettings(0.01)):
        assert len(set(threading.enumerate()) - before) == 2
    _wait_until(lambda: not set(threading.enumerate()) - before)
