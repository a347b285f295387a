"""Notifications without Prometheus: findings go to webhooks, e-mail and other services, and a file.

A TOML file says where:

    file = "alerts.jsonl"                         # one JSON line for each notification
    webhooks = ["$SLACK_WEBHOOK"]                 # receive {"text": …}, as Slack, Mattermost and Rocket.Chat take it
    apprise = ["mailtos://user:$MAIL_PASSWORD@example.org?to=oncall@example.org"]  # any address of apprise, with the extra monitor
    group_s = 30                                  # findings of this many seconds are one notification
    repeat_s = 3600                               # the same finding of the same machine is not repeated within this time
    silence = ["slow_disk", "memory_leak@node-7"] # kinds, or KIND@HOST; * stands for any text

$NAME is replaced by the environment variable, so that the file holds no secret.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import tomllib
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from pathlib import Path

from crcjax.errors import InputError
from crcjax.monitor.anomalies import Finding
from crcjax.monitor.logs import log

_TIMEOUT_S = 10.0
_LONGEST_TEXT = 3500


@dataclass(frozen=True)
class NotifierSettings:
    """Where notifications go, and how often; the fields are those of the file."""

    file: str = ""
    webhooks: tuple[str, ...] = ()
    apprise: tuple[str, ...] = ()
    group_s: float = 30.0
    repeat_s: float = 3600.0
    silence: tuple[str, ...] = ()


def load_settings(path: str | Path, environment: Mapping[str, str] = os.environ) -> NotifierSettings:
    """Reads the file. Raises InputError for a field or a variable that does not exist, and for values of another type."""
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); see docs/monitoring.md") from error
    names = {field.name: str(field.type) for field in fields(NotifierSettings)}
    read: dict[str, object] = {}
    for name, value in values.items():
        if name not in names:
            raise InputError(f"{path}: {name}: there is no such field; use {', '.join(names)}")
        if names[name] == "float" and type(value) in (int, float) and value >= 0:
            read[name] = float(value)
        elif names[name] == "str" and isinstance(value, str):
            read[name] = _expanded(value, path, environment)
        elif names[name].startswith("tuple") and isinstance(value, list) and all(isinstance(v, str) for v in value):
            read[name] = tuple(_expanded(item, path, environment) for item in value)
        else:
            kind = {"float": "a number of seconds", "str": "a text"}.get(names[name], "a list of texts")
            raise InputError(f"{path}: {name} must be {kind}, got {value!r}")
    return NotifierSettings(**read)  # type: ignore[arg-type]


class Notifier:
    """Groups findings and sends them in a thread, so that a slow receiver does not hold up the monitor.

    Args:
      run: the name of the run, with which each notification begins.
      settings: where they go.
      clock: seconds, by which groups and repetitions are timed.
    """

    def __init__(self, run: str, settings: NotifierSettings, clock: Callable[[], float] = time.monotonic):
        self._run, self._settings, self._clock = run, settings, clock
        self._sent_s: dict[tuple[str, str], float] = {}
        self._pending: list[Finding] = []
        self._since_s = 0.0
        self._thread: threading.Thread | None = None

    def add(self, findings: Sequence[Finding]) -> None:
        """Adds findings, and sends the group if it is due. Call it regularly, also without findings."""
        now = self._clock()
        for finding in findings:
            key = finding.kind, finding.host
            if self._is_silent(finding) or now - self._sent_s.get(key, -float("inf")) < self._settings.repeat_s:
                continue
            self._sent_s[key] = now
            self._since_s = self._since_s if self._pending else now
            self._pending.append(finding)
        if self._pending and now - self._since_s >= self._settings.group_s:
            self._start()

    def close(self, timeout_s: float = 5.0) -> None:
        """Sends what is pending, and waits for that."""
        if self._pending:
            self._start()
        if self._thread:
            self._thread.join(timeout_s)

    def _is_silent(self, finding: Finding) -> bool:
        names = finding.kind, f"{finding.kind}@{finding.host}"
        return any(fnmatch(name, pattern) for name in names for pattern in self._settings.silence)

    def _start(self) -> None:
        group, self._pending = self._pending, []
        earlier = self._thread

        def send() -> None:
            if earlier:
                earlier.join()
            send_group(self._run, group, self._settings)

        self._thread = threading.Thread(target=send, daemon=True, name="notifier")
        self._thread.start()


def send_group(run: str, findings: Sequence[Finding], settings: NotifierSettings) -> None:
    """Sends one notification to every receiver. A receiver that fails is logged, and the others still get it."""
    title = f"crcjax run {run}: {len(findings)} finding{'s' if len(findings) > 1 else ''}"
    text = "\n".join(f"{finding.kind}: {finding}" for finding in findings)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + " …"
    if settings.file:
        line = {"time_s": time.time(), "run": run, "findings": [vars(finding) for finding in findings]}
        try:
            with open(settings.file, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.error(f"{settings.file}: the notification cannot be written ({error.strerror})")
    for number, webhook in enumerate(settings.webhooks, 1):
        body = json.dumps({"text": f"{title}\n{text}"}).encode()
        request = urllib.request.Request(webhook, body, {"Content-Type": "application/json"})
        try:
            urllib.request.urlopen(request, timeout=_TIMEOUT_S).close()
        except (OSError, ValueError) as error:
            # Its address is a secret.
            log.error(f"webhook {number} of the notifier does not take the notification ({type(error).__name__})")
    if settings.apprise:
        _send_by_apprise(title, text, settings.apprise)


def _send_by_apprise(title: str, text: str, addresses: Sequence[str]) -> None:
    try:
        import apprise
    except ImportError:
        log.error("notifications to apprise's services need apprise: pip install 'crcjax[monitor]'")
        return
    for number, address in enumerate(addresses, 1):
        receiver = apprise.Apprise()
        if not receiver.add(address) or not receiver.notify(title=title, body=text):
            log.error(f"address {number} of apprise in the notifier does not take the notification")


def _expanded(text: str, path: str | Path, environment: Mapping[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1] not in environment:
            raise InputError(f"{path}: the environment has no {match[1]}; export it before training")
        return environment[match[1]]

    return re.sub(r"\$([A-Z_][A-Z0-9_]*)", value, text)
