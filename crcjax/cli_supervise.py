"""The command `crcjax supervise`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
