"""The audit log: appends by several threads, each on the disk before it returns, and the verification of a million entries.

python tools/bench_audit.py [--entries N]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import threading
import time
from pathlib import Path

from record import Row, record

from crcjax.audit.audit_log import AuditLog
from crcjax.audit.verification import Verification, verify_audit
from crcjax.monitor.event_log import EventLog
from crcjax.runs.signature import make_key_pair, public_key_digits

ENTRIES, APPENDED = 1_000_000, 20_000
TARGET_PER_S, TARGET_S = 5000, 30
FACTS = {
    "method": "GET",
    "endpoint": "/v1/predictions/{prediction_id}/result",
    "objects": {"prediction_id": "0b8f2c1e-0000-4000-8000-000000000000"},
    "status": 200,
    "account": "dr.frost",
    "role": "pathologist",
    "site": "leeds",
}


def main() -> None:
    """Measures and records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=ENTRIES, help="entries to verify")
    entries = parser.parse_args().entries
    # On the disk that the repository lies on; /tmp may be in memory.
    folder = Path(tempfile.mkdtemp(prefix="bench-audit-", dir=Path(__file__).parent))
    try:
        key = make_key_pair(folder / "audit.pem")
        rows = [*appends(folder, key), *verification(folder, key, entries)]
    finally:
        shutil.rmtree(folder)
    about = (
        "The audit log: appends with fsync, and verification.\\n\\nEach append returns once the entry is on the disk; entries"
        " that wait for the disk at the same time share one fsync. A signed checkpoint follows every 1,000 entries, with a"
        " copy in an anchor file. Targets: 5,000 appends a second, 1,000,000 entries verified in 30 s. The damages are a"
        " changed byte, a removed line, two exchanged lines, a cut tail, and a replayed checkpoint, each nine tenths into the"
        " log; each was found at its line."
    )
    record("audit", "python tools/bench_audit.py", rows, about.replace("\\n", "\n"))


def appends(folder: Path, key: Path) -> list[Row]:
    """Appends a second, by one thread and by many."""
    rows = []
    for threads in (1, 16, 64):
        audit = AuditLog(folder / f"append-{threads}.jsonl", key, [folder / f"anchors-{threads}"])
        share = (APPENDED if threads > 1 else APPENDED // 4) // threads
        workers = [
            threading.Thread(
                target=lambda audit=audit, share=share: [audit.append("request", **FACTS) for _ in range(share)]
            )
            for _ in range(threads)
        ]
        began = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        speed = share * threads / (time.perf_counter() - began)
        rows.append(Row(f"appends by {threads} threads", speed, "/s", speed / TARGET_PER_S, "target"))
    return rows


def verification(folder: Path, key: Path, entries: int) -> list[Row]:
    """Seconds to verify a long log, whole and with each kind of damage."""
    path, anchors = folder / "log.jsonl", folder / "anchors"
    write_long_log(path, key, anchors, entries)
    trusted = [public_key_digits(key.with_suffix(".pub"))]
    seconds, done = timed(path, trusted, anchors)
    assert done.fault is None
    assert done.entries - done.checkpoints == entries
    rows = [Row(f"verification of {entries:,} entries", seconds, "s", seconds / TARGET_S, "target")]
    lines = path.read_bytes().splitlines(keepends=True)
    place = len(lines) * 9 // 10
    changed = bytearray(lines[place])
    changed[30] ^= 1
    checkpoint = next(line for line in lines if b'"kind": "checkpoint"' in line)
    damages = {
        "a changed byte": [*lines[:place], bytes(changed), *lines[place + 1 :]],
        "a removed line": [*lines[:place], *lines[place + 1 :]],
        "two exchanged lines": [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]],
        "a cut tail": lines[:place],
        "a replayed checkpoint": [*lines[:place], checkpoint, *lines[place:]],
    }
    for name, damaged in damages.items():
        path.write_bytes(b"".join(damaged))
        seconds, done = timed(path, trusted, anchors)
        assert done.fault is not None
        assert done.fault.line == place + 1, (name, done.fault)
        rows.append(Row(f"{name} found at its line", seconds, "s", seconds / TARGET_S, "target"))
    return rows


def write_long_log(path: Path, key: Path, anchors: Path, entries: int) -> None:
    """Writes entries without an fsync for each, which would take minutes; the bytes are the same."""
    audit, log = AuditLog(path, key, [anchors]), EventLog(path)
    block = 1000
    for first in range(0, entries, block):
        # A block is what threads that wait for the disk write together.
        log.append_all(
            [("request", {**FACTS, "number": first + number}) for number in range(min(block, entries - first))]
        )
        audit.checkpoint()


def timed(path: Path, trusted: list[str], anchors: Path) -> tuple[float, Verification]:
    """Seconds of a verification, and its result."""
    began = time.perf_counter()
    done = verify_audit(path, trusted, [anchors])
    return time.perf_counter() - began, done


if __name__ == "__main__":
    main()
