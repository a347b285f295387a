"""The commands `crcjax supervise` and `crcjax health`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from crcjax.monitor.heartbeat import Heartbeat


def supervise(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="the training command, or srun with it")
    ],
    run: Annotated[
        Path | None, typer.Option(help="the --workdir of the training; its events.jsonl lists failures and restarts")
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="restarts in all")] = 1000,
    max_failures: Annotated[int, typer.Option(min=1, help="failures in a series after which it gives up")] = 10,
    first_delay_s: Annotated[float, typer.Option(min=0, help="seconds before the first restart; they double")] = 1.0,
    max_delay_s: Annotated[float, typer.Option(min=0, help="the longest delay in seconds")] = 300.0,
    healthy_s: Annotated[
        float, typer.Option(min=0, help="an attempt of this length ends a series of failures")
    ] = 600.0,
) -> None:
    """Runs a training command, and restarts it after a failure of the machine (docs/recovery.md).

    Not restarted: a wrong config or cohort (status 2), an output that cannot be written (3), a diverged loss (5), a
    command that a signal stopped. The exit status is the command's last one.
    """
    from crcjax.parallel.supervisor import RestartPolicy, supervise

    policy = RestartPolicy(max_restarts, max_failures, first_delay_s, max_delay_s, healthy_s)
    raise typer.Exit(supervise(command, policy, run))


def health(run: Annotated[Path, typer.Argument(metavar="RUN", help="the --workdir of a training")]) -> None:
    """Shows which processes of a training are alive, where they stand, who is slow, and the goodput (docs/recovery.md).

    Exit status 1 if a process is lost or failed.
    """
    from rich.console import Console
    from rich.table import Table

    from crcjax.monitor.run_health import run_health

    health = run_health(run)
    table = Table("process", "host", "step", "s/step", "reading s", "probe ms", "GiB", "state", box=None)
    for process in health.processes:
        style = None if process.is_well else "red"
        table.add_row(str(process.process), *_cells(process.heartbeat, process.state), style=style)
    # A pipe has no width.
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    # As wide as its content: in a pipe, a table of 80 columns would cut the states off.
    console.print(table, width=max(console.width, console.measure(table).maximum))
    for straggler in health.stragglers:
        console.print(str(straggler), markup=False)
    if health.goodput:
        console.print(str(health.goodput), markup=False)
    raise typer.Exit(0 if health.is_well else 1)


def _cells(heartbeat: Heartbeat | None, state: str) -> list[str]:
    if heartbeat is None:
        return [""] * 6 + [state]
    seconds = [_number(heartbeat.step_s), _number(heartbeat.reading_s), _number(heartbeat.probe_s, 1e3)]
    return [heartbeat.host, str(heartbeat.step), *seconds, f"{heartbeat.memory_bytes / 2**30:.1f}", state]


def _number(value: float | None, factor: float = 1.0) -> str:
    return "" if value is None else f"{value * factor:.3g}"
