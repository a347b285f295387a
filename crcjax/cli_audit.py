"""The commands of `crcjax audit`."""

from __future__ import annotations

import csv
import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import typer

from crcjax.cli_options import STDERR
from crcjax.errors import InputError, writing

app = typer.Typer(
    help="Verifies, shows and exports the audit log of a service or of commands (docs/security.md).",
    no_args_is_help=True,
)
Log = Annotated[Path, typer.Argument(metavar="LOG", help="STATE/log.jsonl of a service, or what CRCJAX_AUDIT names")]
Trust = Annotated[list[Path] | None, typer.Option(help="public key: only checkpoints that it signed count; repeatable")]
Anchors = Annotated[list[Path] | None, typer.Option("--anchor", help="anchor file of the log; repeatable")]


@app.command()
def verify(log: Log, trust: Trust = None, anchor: Anchors = None) -> None:
    """Verifies every line, checkpoint and anchor; names the first line that is not what was written.

    Exit status: 0 the log is whole; 1 it is not. Entries behind the last checkpoint could still be cut off unnoticed.
    """
    from crcjax.audit.verification import verify_audit
    from crcjax.runs.signature import public_key_digits

    done = verify_audit(log, [public_key_digits(key) for key in trust or ()], anchor or ())
    if done.fault:
        STDERR.print(f"{done.fault}", markup=False)
        raise typer.Exit(1)
    behind = f", {done.after_last_checkpoint} entries behind the last one" if done.checkpoints else ""
    print(f"{log}: {done.entries} entries and {done.checkpoints} checkpoints are whole{behind}")
    if not done.checkpoints:
        print("without a signed checkpoint, whoever can write the file could have written it anew")
    elif not trust:
        print("the checkpoints' key was not compared with a trusted one; give --trust")


@app.command()
def show(
    log: Log,
    last: Annotated[int, typer.Option(min=1, help="entries to show, the newest")] = 20,
    kind: Annotated[str | None, typer.Option(help="only entries of this kind, such as request or erased")] = None,
    account: Annotated[str | None, typer.Option(help="only entries of this account or user")] = None,
) -> None:
    """Shows the newest entries, each with its line. Verifies nothing; see `crcjax audit verify`."""
    for line, event in deque(_entries(log, kind, account), last):
        facts = " ".join(f"{name}={json.dumps(value)}" for name, value in event["facts"].items() if value != "")
        print(f"{line} {event['time']} {event['kind']} {facts}")


@app.command()
def export(
    log: Log,
    out: Annotated[Path, typer.Option(help="the new file")],
    layout: Annotated[
        Literal["csv", "jsonl"], typer.Option("--format", help="a table, or the lines as they are")
    ] = "csv",
    since: Annotated[str, typer.Option("--from", help="first time, such as 2026-01-31 or 2026-01-31T12:00")] = "",
    until: Annotated[str, typer.Option("--to", help="time after the last entry")] = "9999",
    kind: Annotated[str | None, typer.Option(help="only entries of this kind")] = None,
    trust: Trust = None,
    anchor: Anchors = None,
) -> None:
    """Writes the entries of a period to a file, after the whole log was verified. A broken log is exported with status 1."""
    from crcjax.audit.verification import verify_audit
    from crcjax.runs.signature import public_key_digits

    done = verify_audit(log, [public_key_digits(key) for key in trust or ()], anchor or ())
    entries = [item for item in _entries(log, kind, None) if since <= item[1]["time"] < until]
    with writing(out):
        try:
            with open(out, "x", newline="") as file:
                if layout == "csv":
                    table = csv.writer(file)
                    table.writerow(["line", "time", "kind", "facts", "hash"])
                    for line, event in entries:
                        facts = json.dumps(event["facts"], sort_keys=True)
                        table.writerow([line, event["time"], event["kind"], facts, event["hash"]])
                else:
                    file.writelines(json.dumps(event) + "\n" for _, event in entries)
        except FileExistsError:
            raise InputError(f"{out}: exists, and is not overwritten; choose another --out") from None
    STDERR.print(f"{len(entries)} entries in {out}", markup=False)
    if done.fault:
        STDERR.print(f"the log is not whole: {done.fault}", markup=False)
        raise typer.Exit(1)


def _entries(log: Path, kind: str | None, account: str | None) -> Iterator[tuple[int, dict]]:
    """Each undamaged entry of a log, with the number of its line."""
    if not log.is_file():
        raise InputError(f"{log}: there is no such log; check the path")
    with open(log, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                event = json.loads(line)
                facts = event["facts"]
            except (ValueError, TypeError, KeyError):
                continue
            if kind in (None, event["kind"]) and account in (None, facts.get("account"), facts.get("user")):
                yield number, event
