"""Notifications reach real HTTP servers and files: grouped, not repeated, silenced."""

import json
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.monitor.anomalies import Finding
from crcjax.monitor.notifier import Notifier, NotifierSettings, load_settings, send_group

# apprise loads it for Python before 3.13.
pytestmark = pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning")


@pytest.fixture
def receiver(webhook: tuple[int, list]) -> tuple[str, list]:
    """The address of a webhook, and the bodies that it received."""
    port, received = webhook
    return f"127.0.0.1:{port}", received


def _finding(kind: str = "slow_disk", host: str = "node-1") -> Finding:
    return Finding(kind, 1, host, "a file takes 2 s", "a disk that fails", "check the storage")


def test_a_group_goes_to_a_webhook_in_slacks_form_to_a_file_and_to_apprise(receiver: tuple, tmp_path: Path) -> None:
    address, received = receiver
    settings = NotifierSettings(
        str(tmp_path / "alerts.jsonl"), (f"http://{address}/hook",), (f"json://{address}/apprise",)
    )
    send_group("run-7", [_finding(), _finding("memory_leak", "node-2")], settings)
    slack, by_apprise = received
    assert list(slack) == ["text"]
    assert slack["text"].startswith(
        "crcjax run run-7: 2 findings\nslow_disk: node-1, process 1: a file takes 2 s; probably"
    )
    assert "memory_leak: node-2" in slack["text"]
    assert (by_apprise["title"], "memory_leak" in by_apprise["message"]) == ("crcjax run run-7: 2 findings", True)
    (line,) = (tmp_path / "alerts.jsonl").read_text().splitlines()
    assert [finding["host"] for finding in json.loads(line)["findings"]] == ["node-1", "node-2"]


def test_findings_are_grouped_not_repeated_and_silenced(receiver: tuple) -> None:
    address, received = receiver
    now = [0.0]
    settings = NotifierSettings(webhooks=(f"http://{address}",), silence=("memory_*", "slow_disk@node-9"))
    notifier = Notifier("r", settings, lambda: now[0])
    for second, findings in (
        (0, [_finding()]),
        (10, [_finding(host="node-2"), _finding("memory_leak"), _finding(host="node-9")]),
        (20, [_finding()]),
        (29, []),
        (31, []),
        (1000, [_finding()]),
        (3700, [_finding()]),
    ):
        now[0] = float(second)
        notifier.add(findings)
    notifier.close()
    assert [body["text"].count("slow_disk: ") for body in received] == [2, 1]
    assert "node-9" not in str(received)
    assert "memory" not in str(received)


def test_the_other_receivers_get_what_one_does_not_take(receiver: tuple, tmp_path: Path) -> None:
    address, received = receiver
    settings = NotifierSettings(
        str(tmp_path / "absent" / "alerts.jsonl"), ("http://127.0.0.1:9/secret", f"http://{address}"), ("no-address",)
    )
    send_group("r", [_finding()], settings)
    assert len(received) == 1


def test_a_wrong_file_is_one_line_with_the_field(tmp_path: Path) -> None:
    path = tmp_path / "notifications.toml"
    path.write_text('webhooks = ["$HOOK"]\nrepeat_s = 60\n')
    assert load_settings(path, {"HOOK": "https://h"}) == NotifierSettings(webhooks=("https://h",), repeat_s=60.0)
    with pytest.raises(InputError, match="the environment has no HOOK"):
        load_settings(path, {})
    for text, message in (
        ("hooks = []", "hooks: there is no such field; use file, webhooks"),
        ("group_s = -1", "group_s must be a number of seconds, got -1"),
        ('silence = "a"', "silence must be a list of texts, got 'a'"),
        ("a = ", "cannot be read"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            load_settings(path, {})
    with pytest.raises(InputError, match="cannot be read"):
        load_settings(tmp_path / "absent.toml", {})
