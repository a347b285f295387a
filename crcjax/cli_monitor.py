"""The command `crcjax monitor`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crcjax.errors import InputError
from crcjax.monitor.quantities import Spread, Value

# The newest findings that are shown.
_FINDINGS = 10

if TYPE_CHECKING:
    from rich.console import RenderableType


def monitor(
    run_or_hosts: Annotated[
        str, typer.Argument(metavar="RUN|HOSTS", help="the --workdir of a training, or HOST:PORT,HOST:PORT of /metrics")
    ],
    once: Annotated[bool, typer.Option("--once", help="print once and end")] = False,
    interval_s: Annotated[float, typer.Option(min=0.1, help="seconds between updates")] = 1.0,
) -> None:
    """Shows the machines of a training: GPUs, processors, memory, disks, network, step times (docs/monitoring.md).

    Of every quantity: the least, median and largest value over all processes, and which has them. It then names what one process
    has more of than the others. Ctrl-C ends it.
    """
    from rich.console import Console
    from rich.live import Live

    # A pipe has no width.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    if once:
        console.print(_view(run_or_hosts))
        return
    with Live(_view(run_or_hosts), console=console, auto_refresh=False) as live:
        while True:
            try:
                time.sleep(interval_s)
                live.update(_view(run_or_hosts), refresh=True)
            except KeyboardInterrupt:
                return


def _view(run_or_hosts: str) -> RenderableType:
    from rich.console import Group
    from rich.text import Text

    from crcjax.monitor.fault_watch import read_findings
    from crcjax.monitor.quantities import imbalances, spreads

    values, title = _values(run_or_hosts)
    all_spreads = spreads(values)
    sentences = [Text(sentence, style="yellow") for sentence in imbalances(all_spreads)]
    sentences += [
        Text(f"{finding.kind}: {finding}", style="red") for finding in read_findings(run_or_hosts)[-_FINDINGS:]
    ]
    return Group(Text(title, style="bold"), _spread_table(all_spreads), _process_table(values), *sentences)


def _values(run_or_hosts: str) -> tuple[list[Value], str]:
    from crcjax.monitor.metrics_endpoint import read_metrics
    from crcjax.monitor.quantities import sample_values
    from crcjax.monitor.samples import read_samples

    run = Path(run_or_hosts)
    if not run.exists() and all(":" in address for address in run_or_hosts.split(",")):
        values = read_metrics(run_or_hosts.split(","))
        title = run_or_hosts
    else:
        # Of the members of an ensemble, which are trained together, the first one has the samples.
        run = next(iter(folder.parent for folder in sorted(run.glob("seed-*/monitor"))), run)
        samples = read_samples(run)
        if not samples:
            raise InputError(
                f"{run}: has no samples; give the --workdir of a training that has begun, with "
                "config.monitor.interval_s above 0, or HOST:PORT of its metrics"
            )
        values = [value for sample in samples for value in sample_values(sample)]
        title = str(run)
    newest_s = max((value.value for value in values if value.quantity == "crcjax_sample_time_seconds"), default=0.0)
    processes = len({(value.host, value.process) for value in values})
    hosts = len({value.host for value in values})
    return (
        values,
        f"{title}: {processes} processes on {hosts} machines, newest sample {time.time() - newest_s:.0f} s old",
    )


def _spread_table(all_spreads: list[Spread]) -> RenderableType:
    from rich.table import Table

    from crcjax.monitor.quantities import formatted, readable

    table = Table("quantity", "least", "median", "largest", "who has the largest", box=None)
    # Times since 1970 and sums say nothing here.
    hidden = {"crcjax_sample_time_seconds", "crcjax_memory_total_bytes"}
    for spread in all_spreads:
        if spread.quantity not in hidden:
            numbers = (formatted(spread.quantity, number) for number in (spread.least, spread.median, spread.largest))
            table.add_row(readable(spread.quantity), *numbers, spread.who_largest)
    return table


def _process_table(values: list[Value]) -> RenderableType:
    """The processes, or of many the first ones: where they stand, and peak memory beside its estimate."""
    from rich.table import Table

    from crcjax.monitor.quantities import formatted

    columns = {
        "step": "crcjax_step",
        "s/step": "crcjax_step_seconds",
        "data wait": "crcjax_data_wait_seconds",
        "peak memory": "crcjax_process_peak_memory_bytes",
        "device peak": "crcjax_device_peak_memory_bytes",
        "device estimate": "crcjax_device_estimated_memory_bytes",
        "age": "crcjax_sample_time_seconds",
    }
    table = Table("process", "host", *columns, box=None)
    of_process = Counter((value.process, value.host) for value in values)
    for process, host in sorted(of_process):
        numbers = {
            value.quantity: value.value
            for value in values
            if (value.process, value.host, value.gpu) == (process, host, None)
        }
        cells = []
        for name, quantity in columns.items():
            number = numbers.get(quantity)
            if name == "age" and number is not None:
                cells.append(f"{time.time() - number:.0f} s")
            else:
                cells.append("" if number is None else formatted(quantity, number))
        table.add_row(str(process), host, *cells)
    return table
