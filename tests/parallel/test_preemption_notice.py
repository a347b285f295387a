"""Notices of preemption, from files and from local servers that answer as the metadata servers of the clouds do."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from crcjax.parallel import preemption_notice
from crcjax.parallel.preemption_notice import PreemptionNotice

# By method and path: what the server answers, with the headers that it demands.
Answers = dict[tuple[str, str], tuple[str, dict[str, str]]]


@pytest.fixture
def serve() -> Iterator[Callable[[Answers], str]]:
    """serve(answers): the address of a server. It refuses requests without the headers, and has no other pages."""
    servers: list[tuple[HTTPServer, threading.Thread]] = []

    def serve(answers: Answers) -> str:
        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body, headers = answers.get((self.command, self.path), ("", {}))
                if (self.command, self.path) not in answers:
                    self.send_response(404)
                elif any(self.headers.get(name) != value for name, value in headers.items()):
                    self.send_response(403)
                else:
                    self.send_response(200)
                self.end_headers()
                self.wfile.write(body.encode())

            do_GET = do_PUT = answer

            def log_message(self, *_: object) -> None: ...

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_google_says_true(serve) -> None:
    page = ("GET", "/computeMetadata/v1/instance/preempted")
    answers: Answers = {page: ("FALSE", {"Metadata-Flavor": "Google"})}
    notice = PreemptionNotice("gcp", serve(answers))
    assert notice.read() == ""
    answers[page] = ("TRUE", {"Metadata-Flavor": "Google"})
    assert notice.read() == "the instance is preempted"


def test_amazon_has_a_page_for_those_with_a_token_once_there_is_a_notice(serve) -> None:
    answers: Answers = {("PUT", "/latest/api/token"): ("secret", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})}
    notice = PreemptionNotice("aws", serve(answers))
    assert notice.read() == ""
    action = json.dumps({"action": "terminate", "time": "2026-01-31T12:00:00Z"})
    token = {"X-aws-ec2-metadata-token": "secret"}
    answers["GET", "/latest/meta-data/spot/instance-action"] = (action, token)
    assert notice.read() == "terminate at 2026-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("kind", "machine", "is_notice"),
    [("Preempt", "gpu-3", True), ("Terminate", "gpu-3", True), ("Freeze", "gpu-3", False), ("Preempt", "gpu-4", False)],
)
def test_azure_lists_the_events_of_all_machines(serve, kind: str, machine: str, is_notice: bool) -> None:
    header = {"Metadata": "true"}
    events = ("GET", "/metadata/scheduledevents?api-version=2020-07-01")
    name = ("GET", "/metadata/instance/compute/name?api-version=2021-02-01&format=text")
    answers: Answers = {name: ("gpu-3", header), events: (json.dumps({"Events": []}), header)}
    notice = PreemptionNotice("azure", serve(answers))
    assert notice.read() == ""
    event = {"EventType": kind, "Resources": ["gpu-1", machine], "NotBefore": "Mon, 19 Sep 2026 18:29:47 GMT"}
    answers[events] = (json.dumps({"Events": [event]}), header)
    assert notice.read() == (f"{kind} not before Mon, 19 Sep 2026 18:29:47 GMT" if is_notice else "")


@pytest.mark.parametrize(
    ("body", "notice"), [("", ""), ("false", ""), ("NONE", ""), ("in two minutes", "in two minutes")]
)
def test_any_address_gives_notice_by_a_text(serve, body: str, notice: str) -> None:
    address = serve({("GET", "/notice"): (body, {})})
    assert PreemptionNotice(f"{address}/notice").read() == notice
    assert PreemptionNotice(f"{address}/absent").read() == ""


def test_a_file_gives_notice_by_appearing_and_the_watcher_calls_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption_notice, "INTERVAL_S", 0.01)
    file, called, notices = tmp_path / "preempted", threading.Event(), []

    def on_notice(notice: str) -> None:
        notices.append(notice)
        called.set()

    PreemptionNotice(str(file)).watch(on_notice)
    assert not called.wait(0.2)
    file.touch()
    assert called.wait(10)
    assert notices == [f"{file} exists"]


def test_what_starts_while_there_is_a_notice_waits_until_it_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption_notice, "INTERVAL_S", 0.01)
    file = tmp_path / "preempted"
    PreemptionNotice(str(file)).wait_until_gone()
    file.touch()
    waiting = threading.Thread(target=PreemptionNotice(str(file)).wait_until_gone)
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    file.unlink()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_server_that_does_not_answer_or_answers_nonsense_is_reported_once_and_gives_no_notice(
    serve, capsys: pytest.CaptureFixture[str]
) -> None:
    nonsense = {
        ("PUT", "/latest/api/token"): ("t", {}),
        ("GET", "/latest/meta-data/spot/instance-action"): ("<html>", {}),
    }
    for notice in (PreemptionNotice("gcp", "http://127.0.0.1:1"), PreemptionNotice("aws", serve(nonsense))):
        assert notice.read() == notice.read() == ""
    shown = capsys.readouterr().err
    assert shown.count("cannot be read") == 2
    assert "config.train.preemption_notice gcp: cannot be read" in shown
