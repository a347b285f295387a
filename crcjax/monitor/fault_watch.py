"""What process 0 does with the samples of all processes: detects faults, records and notifies them."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from crcjax.monitor.anomalies import Detector, Finding
from crcjax.monitor.logs import log
from crcjax.monitor.notifier import Notifier
from crcjax.monitor.samples import FOLDER, Sample

FILE = "findings.jsonl"


class FaultWatch:
    """Writes each finding as a line of RUN/monitor/findings.jsonl and to the log file, and hands it to the notifier."""

    def __init__(self, run: Path, notifier: Notifier | None = None):
        self._path, self._notifier, self._detector = run / FOLDER / FILE, notifier, Detector()

    def __call__(self, samples: list[Sample]) -> None:
        """Takes the newest sample of each process."""
        findings = self._detector.update(samples, time.monotonic())
        for finding in findings:
            log.debug(f"{finding.kind}: {finding}")
            # The disk may be what is faulty; the log and the notification still say so.
            with suppress(OSError), open(self._path, "a") as file:
                file.write(json.dumps({"time_s": time.time(), **asdict(finding)}) + "\n")
        if self._notifier:
            self._notifier.add(findings)

    def close(self) -> None:
        """Sends the last notification."""
        if self._notifier:
            self._notifier.close()


def read_findings(run: str | Path) -> list[Finding]:
    """The findings of a run, oldest first."""
    findings = []
    with suppress(OSError):
        for line in (Path(run) / FOLDER / FILE).read_text().splitlines():
            with suppress(ValueError, TypeError, KeyError):
                values = json.loads(line)
                del values["time_s"]
                findings.append(Finding(**values))
    return findings
