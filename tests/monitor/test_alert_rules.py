"""Prometheus' own tools on the alert rules: each fires on its fault and is silent on its near miss; a real server and a real
Alertmanager carry an alert of a real process to a webhook, and every query of the dashboards finds a series."""

import json
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from crcjax.monitor.cluster_monitor import ClusterMonitor, MonitorSettings
from crcjax.monitor.heartbeat import COMPUTING, READING, HeartbeatWriter

ROOT = Path(__file__).parents[2]
RULES = ROOT / "launch" / "monitoring" / "rules.yml"
DASHBOARDS = ROOT / "launch" / "monitoring" / "dashboards"
ALERTS = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
_GIB, _MIB = 2**30, 2**20
_P = 'run="r",process="0",host="a"'
_GPU = f'{_P},gpu="1",uuid="GPU-1"'
Series = dict[str, str]


def _of_three(name: str, slow: float) -> Series:
    """A quantity of three processes, of which the last one has another value."""
    return {f'{name}{{run="r",process="{p}",host="h{p}"}}': f"{v}x100" for p, v in enumerate((0.1, 0.1, slow))}


# By alert: the series on which it fires, and those on which it does not; one value a minute.
CASES: dict[str, tuple[Series, Series]] = {
    "CrcjaxTrainingAbsent": ({}, {f"crcjax_step{{{_P}}}": "1x100"}),
    "CrcjaxEndpointDown": (
        {'up{job="crcjax-training",instance="a"}': "0x100"},
        {'up{job="crcjax-training",instance="a"}': "1x100", 'up{job="another",instance="b"}': "0x100"},
    ),
    "CrcjaxSamplerSilent": (
        {f"crcjax_sample_time_seconds{{{_P}}}": "0x100"},
        {f"crcjax_sample_time_seconds{{{_P}}}": "-5+60x100"},
    ),
    "CrcjaxStandsStill": ({f"crcjax_phase_seconds{{{_P}}}": "0+60x100"}, {f"crcjax_phase_seconds{{{_P}}}": "590x100"}),
    "CrcjaxNoSteps": ({f"crcjax_steps_total{{{_P}}}": "7x100"}, {f"crcjax_steps_total{{{_P}}}": "0+1x100"}),
    "CrcjaxDataStarved": (
        {
            f"crcjax_steps_data_wait_seconds_total{{{_P}}}": "0+13x100",
            f"crcjax_steps_seconds_total{{{_P}}}": "0+60x100",
        },
        {
            f"crcjax_steps_data_wait_seconds_total{{{_P}}}": "0+11x100",
            f"crcjax_steps_seconds_total{{{_P}}}": "0+60x100",
        },
    ),
    "CrcjaxSlowData": (_of_three("crcjax_data_wait_seconds", 0.21), _of_three("crcjax_data_wait_seconds", 0.19)),
    "CrcjaxSlowDevice": (_of_three("crcjax_probe_seconds", 0.13), _of_three("crcjax_probe_seconds", 0.11)),
    "CrcjaxNoCore": ({f"crcjax_core_wait_ratio{{{_P}}}": "0.3x100"}, {f"crcjax_core_wait_ratio{{{_P}}}": "0.2x100"}),
    "CrcjaxMemoryShort": (
        {f"crcjax_memory_used_bytes{{{_P}}}": "96x100", f"crcjax_memory_total_bytes{{{_P}}}": "100x100"},
        {f"crcjax_memory_used_bytes{{{_P}}}": "94x100", f"crcjax_memory_total_bytes{{{_P}}}": "100x100"},
    ),
    "CrcjaxMemoryLeak": (
        {f"crcjax_process_memory_bytes{{{_P}}}": f"0+{6 * _MIB}x100"},
        {f"crcjax_process_memory_bytes{{{_P}}}": f"0+{4 * _MIB}x100"},
    ),
    "CrcjaxDiskFull": (
        {f"crcjax_disk_free_bytes{{{_P}}}": f"{300 * _GIB}-{_GIB}x100"},
        {f"crcjax_disk_free_bytes{{{_P}}}": f"{900 * _GIB}-{_GIB}x100"},
    ),
    "CrcjaxSlowDisk": (
        {f"crcjax_disk_write_latency_seconds{{{_P}}}": "1.5x100"},
        {f"crcjax_disk_write_latency_seconds{{{_P}}}": "0.9x100"},
    ),
    "CrcjaxSlowNetwork": (
        {f"crcjax_peer_latency_seconds{{{_P}}}": "0.021x100"},
        {f"crcjax_peer_latency_seconds{{{_P}}}": "0.019x100"},
    ),
    "CrcjaxClockSkew": (
        {f"crcjax_clock_offset_seconds{{{_P}}}": "-1.5x100"},
        {f"crcjax_clock_offset_seconds{{{_P}}}": "-0.5x100"},
    ),
    "CrcjaxGpuThrottled": ({f"crcjax_gpu_throttled{{{_GPU}}}": "1x100"}, {f"crcjax_gpu_throttled{{{_GPU}}}": "0x100"}),
    "CrcjaxGpuHot": (
        {f"crcjax_gpu_temperature_celsius{{{_GPU}}}": "89x100"},
        {f"crcjax_gpu_temperature_celsius{{{_GPU}}}": "87x100"},
    ),
    "CrcjaxGpuMemoryErrors": (
        {f"crcjax_gpu_ecc_uncorrected_total{{{_GPU}}}": "5x70 6x90"},
        {f"crcjax_gpu_ecc_uncorrected_total{{{_GPU}}}": "5x100"},
    ),
    "CrcjaxGpuDriverError": (
        {f"crcjax_gpu_xid_errors_total{{{_GPU}}}": "0x70 1x90"},
        {f"crcjax_gpu_xid_errors_total{{{_GPU}}}": "0x100"},
    ),
    "CrcjaxGpuLinkDown": (
        {f"crcjax_gpu_nvlinks_inactive{{{_GPU}}}": "1x100"},
        {f"crcjax_gpu_nvlinks_inactive{{{_GPU}}}": "0x100"},
    ),
    "CrcjaxServiceAbsent": ({}, {'crcjax_workers{instance="s"}': "0x100"}),
    "CrcjaxServiceNoWorker": ({'crcjax_workers{instance="s"}': "0x100"}, {'crcjax_workers{instance="s"}': "1x100"}),
    "CrcjaxServiceErrors": (
        {
            'crcjax_requests_total{instance="s",status="503"}': "0+2x100",
            'crcjax_requests_total{instance="s",status="200"}': "0+100x100",
        },
        {
            'crcjax_requests_total{instance="s",status="404"}': "0+50x100",
            'crcjax_requests_total{instance="s",status="200"}': "0+100x100",
        },
    ),
    "CrcjaxServiceSlow": (
        {
            'crcjax_request_seconds_bucket{instance="s",endpoint="e",le="1"}': "0+80x100",
            'crcjax_request_seconds_bucket{instance="s",endpoint="e",le="5"}': "0+100x100",
            'crcjax_request_seconds_bucket{instance="s",endpoint="e",le="+Inf"}': "0+100x100",
        },
        {
            'crcjax_request_seconds_bucket{instance="s",endpoint="e",le="1"}': "0+99x100",
            'crcjax_request_seconds_bucket{instance="s",endpoint="e",le="5"}': "0+100x100",
            'crcjax_request_seconds_bucket{instance="s",endpoint="e",le="+Inf"}': "0+100x100",
        },
    ),
    "CrcjaxServiceQueueOld": (
        {'crcjax_oldest_queued_seconds{instance="s"}': "1900x100"},
        {'crcjax_oldest_queued_seconds{instance="s"}': "1700x100"},
    ),
    "CrcjaxServiceQuarantined": (
        {'crcjax_jobs{instance="s",status="quarantined"}': "1x100"},
        {
            'crcjax_jobs{instance="s",status="quarantined"}': "0x100",
            'crcjax_jobs{instance="s",status="failed"}': "3x100",
        },
    ),
}


@pytest.fixture(scope="session")
def prometheus(required: Callable[[str], bool]) -> dict[str, str]:
    """The paths of Prometheus' programs."""
    paths = {name: shutil.which(f"prometheus-{name}") or shutil.which(name) for name in ("promtool", "alertmanager")}
    paths["prometheus"] = shutil.which("prometheus")
    if not all(paths.values()):
        message = "no Prometheus: make prometheus-packages"
        if required("prometheus"):
            pytest.fail(message)
        pytest.skip(message)
    return paths  # type: ignore[return-value]


def _promtool_test(alert: str, series: Series, fires: bool) -> dict:
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": f'count(ALERTS{{alertname="{alert}",alertstate="firing"}}) > bool 0 or vector(0)',
                "eval_time": "80m",
                "exp_samples": [{"value": float(fires)}],
            }
        ],
    }


@pytest.mark.slow
def test_every_alert_fires_on_its_fault_and_is_silent_on_a_near_miss(prometheus: dict, tmp_path: Path) -> None:
    assert set(CASES) == {rule["alert"] for rule in ALERTS}
    tests = [
        _promtool_test(alert, series, fires)
        for alert, pair in CASES.items()
        for series, fires in zip(pair, (True, False), strict=True)
    ]

    def run(all_tests: list[dict]) -> subprocess.CompletedProcess:
        path = tmp_path / "tests.yml"
        path.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": all_tests}))
        return subprocess.run([prometheus["promtool"], "test", "rules", str(path)], capture_output=True, text=True)

    done = run(tests)
    assert done.returncode == 0, done.stdout + done.stderr
    # The tests can fail: these do with the other expectation.
    for test in tests[:2]:
        (sample,) = test["promql_expr_test"][0]["exp_samples"]
        sample["value"] = 1 - sample["value"]
    assert (run(tests[:1]).returncode, run(tests[1:2]).returncode) == (1, 1)


def test_every_alert_has_a_runbook() -> None:
    page = (ROOT / "docs" / "runbooks.md").read_text()
    sections = {heading.lower(): heading for heading in re.findall(r"^### (\w+)$", page, re.M)}
    anchors = {rule["annotations"]["runbook"].removeprefix("docs/runbooks.md#"): rule["alert"] for rule in ALERTS}
    assert sections == anchors


def _queries(name: str) -> list[str]:
    panels = json.loads((DASHBOARDS / f"{name}.json").read_text())["panels"]
    return [target["expr"].replace("$run", ".*") for panel in panels for target in panel["targets"]]


def test_the_queries_of_the_dashboards_and_alerts_name_metrics_that_exist() -> None:
    from crcjax.monitor.quantities import GPU_QUANTITIES, PROCESS_QUANTITIES

    names = {q.name + "_total" * q.is_counter for q in (*PROCESS_QUANTITIES, *GPU_QUANTITIES)}
    names |= {"crcjax_requests_total", "crcjax_request_seconds_bucket", "crcjax_jobs"}
    names |= {"crcjax_oldest_queued_seconds", "crcjax_workers", "crcjax_recent_slides", "crcjax_recent_mean"}
    names |= {"crcjax_recent_predicted_slides", "crcjax_recent_quality_slides"}
    used = {
        name
        for query in [
            *(rule["expr"] for rule in ALERTS),
            *_queries("training"),
            *_queries("resources"),
            *_queries("service"),
        ]
        for name in re.findall(r"crcjax_\w+", query)
    }
    assert used - names == set()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.slow
def test_a_real_prometheus_sees_a_real_process_and_a_real_alertmanager_delivers(
    prometheus: dict, tmp_path: Path, write_gpus: Callable, webhook: tuple
) -> None:
    webhook_port, received = webhook
    metrics_port, server_port, manager_port = _free_port(), _free_port(), _free_port()
    (tmp_path / "alertmanager.yml").write_text(
        yaml.safe_dump(
            {
                "route": {"receiver": "hook", "group_wait": "1s", "group_by": ["alertname"]},
                "receivers": [
                    {"name": "hook", "webhook_configs": [{"url": f"http://127.0.0.1:{webhook_port}/hook"}]},
                ],
            }
        )
    )
    config = yaml.safe_load((RULES.parent / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"] = [f"127.0.0.1:{manager_port}"]
    config["scrape_configs"] = config["scrape_configs"][:1]
    targets = [f"127.0.0.1:{metrics_port}", f"127.0.0.1:{metrics_port + 1}"]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = targets
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    commands = [
        [
            *(
                prometheus["alertmanager"],
                f"--config.file={tmp_path}/alertmanager.yml",
                f"--storage.path={tmp_path}/am",
            ),
            *(f"--web.listen-address=127.0.0.1:{manager_port}", "--cluster.listen-address="),
        ],
        [
            *(prometheus["prometheus"], f"--config.file={tmp_path}/prometheus.yml"),
            *(f"--storage.tsdb.path={tmp_path}/data", f"--web.listen-address=127.0.0.1:{server_port}"),
        ],
    ]

    def series(query: str) -> list:
        url = f"http://127.0.0.1:{server_port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        try:
            with urllib.request.urlopen(url, timeout=5) as reply:
                return json.loads(reply.read())["data"]["result"]
        except OSError:
            return []

    def wait_until(condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.2)

    write_gpus({}, {})
    programs = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for command in commands]
    heartbeats = [HeartbeatWriter(process, 2, "localhost") for process in range(2)]
    monitors = [
        ClusterMonitor(tmp_path / "run-7", heartbeat, MonitorSettings(0.3, metrics_port), local_rank=rank)
        for rank, heartbeat in enumerate(heartbeats)
    ]
    ended = threading.Event()

    def take_steps() -> None:
        step = 0
        while not ended.wait(0.02):
            step += 1
            for heartbeat in heartbeats:
                heartbeat.report(step, READING)
                heartbeat.report(step, COMPUTING)

    steps = threading.Thread(target=take_steps)
    steps.start()
    try:
        with monitors[0], monitors[1]:
            for query in [*_queries("training"), *_queries("resources")]:
                wait_until(lambda query=query: series(query))
            assert {result["metric"]["process"] for result in series("crcjax_step")} == {"0", "1"}
            write_gpus({}, {"xid": 79, "xid_number": 1})
            wait_until(lambda: received)
    finally:
        ended.set()
        steps.join()
        for program in programs:
            program.terminate()
            program.wait()
    alert = received[0]["alerts"][0]
    assert alert["labels"]["alertname"] == "CrcjaxGpuDriverError"
    assert (alert["labels"]["run"], alert["labels"]["gpu"]) == ("run-7", "1")
    assert alert["annotations"]["summary"] == "the driver reports an error of GPU 1 of localhost"
