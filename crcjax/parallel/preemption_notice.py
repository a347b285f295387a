"""Notices of preemption: a file that appears, or the metadata server of a cloud's instance that announces its end.

Sources: Google Compute Engine "Detect preemption", Amazon EC2 "Spot Instance interruption notices" (IMDSv2), Azure "Scheduled
Events for Linux VMs", API version 2020-07-01.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

from crcjax.monitor.logs import log

INTERVAL_S = 5.0
_TIMEOUT_S = 2.0
_GOOGLE = "http://metadata.google.internal"
_LINK_LOCAL = "http://169.254.169.254"
# Events of Azure after which the processes of the machine are gone. A freeze takes seconds.
_AZURE_ENDINGS = ("Preempt", "Terminate", "Reboot", "Redeploy")
# Answers of an address while no preemption is announced.
_NO_NOTICE = ("", "FALSE", "NONE", "NULL")


class PreemptionNotice:
    """Looks for a notice at `source`: gcp, aws or azure, an http(s) address, or the path of a file.

    `server` is the address of the cloud's metadata server, by default its own.
    """

    def __init__(self, source: str, server: str = ""):
        self._source, self._server = source, server
        # The metadata servers are on the machine's own network, where no proxy is.
        self._opener = build_opener(ProxyHandler({}))
        self._azure_name = ""
        self._unreachable = ""

    def read(self) -> str:
        """The text of the notice, or "" without one. The log says once if the source cannot be reached."""
        try:
            return self._read()
        except (OSError, HTTPException, ValueError, TypeError, KeyError, AttributeError) as error:
            if not self._unreachable:
                self._unreachable = str(error)
                log.warning(
                    f"config.train.preemption_notice {self._source}: cannot be read ({error}); a preemption is noticed by its "
                    "signal alone"
                )
            return ""

    def wait_until_gone(self) -> None:
        """Waits while there is a notice: what starts on this machine now would be stopped at once, again and again."""
        announced = self.read()
        if announced:
            log.warning(f"notice of preemption: {announced}; waiting until it is gone")
        while announced:
            time.sleep(INTERVAL_S)
            announced = self.read()

    def watch(self, on_notice: Callable[[str], None]) -> None:
        """Starts a thread that reads the source every five seconds, and calls `on_notice` once with the first notice."""

        def look() -> None:
            pause = threading.Event()
            while not (notice := self.read()):
                pause.wait(INTERVAL_S)
            on_notice(notice)

        threading.Thread(target=look, daemon=True, name="preemption-notice").start()

    def _read(self) -> str:
        if self._source == "gcp":
            url = f"{self._server or _GOOGLE}/computeMetadata/v1/instance/preempted"
            return "the instance is preempted" if self._text(url, {"Metadata-Flavor": "Google"}) == "TRUE" else ""
        if self._source == "aws":
            return self._aws(self._server or _LINK_LOCAL)
        if self._source == "azure":
            return self._azure(self._server or _LINK_LOCAL)
        if self._source.startswith(("http://", "https://")):
            text = self._text(self._source)
            return "" if text.upper() in _NO_NOTICE else text[:100]
        return f"{self._source} exists" if Path(self._source).exists() else ""

    def _aws(self, server: str) -> str:
        lifetime = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
        token = self._text(f"{server}/latest/api/token", lifetime, method="PUT")
        action = self._text(f"{server}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token})
        if not action:
            return ""
        announced = json.loads(action)
        return f"{announced['action']} at {announced['time']}"

    def _azure(self, server: str) -> str:
        if not self._azure_name:
            address = f"{server}/metadata/instance/compute/name?api-version=2021-02-01&format=text"
            self._azure_name = self._text(address, {"Metadata": "true"})
        document = json.loads(
            self._text(f"{server}/metadata/scheduledevents?api-version=2020-07-01", {"Metadata": "true"})
        )
        endings = [event for event in document["Events"] if self._ends_this_machine(event)]
        return f"{endings[0]['EventType']} not before {endings[0].get('NotBefore') or 'now'}" if endings else ""

    def _ends_this_machine(self, event: dict[str, Any]) -> bool:
        # The document lists the events of all machines of a scale set.
        return event["EventType"] in _AZURE_ENDINGS and self._azure_name in event["Resources"]

    def _text(self, url: str, headers: dict[str, str] | None = None, method: str = "GET") -> str:
        """The body of an answer; empty if there is no such page, as AWS says without a notice. Raises OSError."""
        try:
            with self._opener.open(Request(url, headers=headers or {}, method=method), timeout=_TIMEOUT_S) as answer:
                return answer.read(1 << 16).decode().strip()
        except HTTPError as error:
            if error.code == 404:
                return ""
            raise
