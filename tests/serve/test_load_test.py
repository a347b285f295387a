"""`crcjax loadtest` measures a running service and counts what went wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def token(server, tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text(server.service.accounts.add_service("load", "leeds") + "\n")
    return path


@pytest.mark.slow
def test_it_prints_latency_throughput_and_errors_of_each_kind_of_request(
    server, token: Path, start_worker: Callable, write_slide: Callable, crcjax: Callable, tmp_path: Path
) -> None:
    (tmp_path / "slides").mkdir()
    for number in range(3):
        write_slide(f"slides/{number}.svs", size=50_000)
    start_worker()
    options = ("--token", token, "--certificate", server.certificate, "--users", 4, "--duration-s", 3)
    done = crcjax("loadtest", server.url, tmp_path / "slides", *options, "--out", tmp_path / "load.json")
    assert done.returncode == 0, done.stderr
    rows = {row["name"].partition(" (")[0]: row for row in json.loads((tmp_path / "load.json").read_text())}
    assert {name: row["requests"] for name, row in rows.items()} == {
        **{"upload": 3, "prediction": 3},
        **{"status": 4, "result": 4, "worklist": 4},
    }
    for row in rows.values():
        assert row["errors"] == 0
        assert 0 < row["median_s"] <= row["p99_s"] < 10
    for words in ("upload", "MB/s", "slides/h", "p99 ms", "worklist"):
        assert words in done.stdout
    # A slide that cannot be predicted is an error of the service for the one who measures it.
    done = crcjax("loadtest", server.url, write_slide("bad.svs", "bad"), *options[:-1], 1)
    assert done.returncode == 1


def test_what_cannot_be_measured_is_one_line(
    server, token: Path, crcjax: Callable, tmp_path: Path, write_slide: Callable
) -> None:
    (tmp_path / "wrong").write_text("no token")
    certificate = ("--certificate", server.certificate)
    for arguments, words in (
        ((server.url, write_slide(), "--token", tmp_path / "wrong", *certificate), "the service answered 401"),
        ((server.url, write_slide(), "--token", tmp_path / "absent", *certificate), "absent: cannot be read"),
        ((server.url, tmp_path / "absent.svs", "--token", token, *certificate), "absent.svs: is no file"),
    ):
        done = crcjax("loadtest", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
