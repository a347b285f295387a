"""The commands of `crcjax launch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.launching.job import read_job
from crcjax.launching.render import SUBMIT, TARGETS
from crcjax.launching.render import render as render_job

app = typer.Typer(help="Files that start one training job on any scheduler (docs/launch.md).", no_args_is_help=True)


@app.callback()
def _group() -> None:
    pass


@app.command()
def render(
    target: Annotated[str, typer.Option(help=f"the scheduler: {' or '.join(TARGETS)}")],
    out: Annotated[Path, typer.Option(help="folder of the files; those of an earlier call are replaced")],
    job: Annotated[Path, typer.Argument(metavar="[JOB.toml]", help="the description of the job")] = Path(
        "launch/job.toml"
    ),
) -> None:
    """Renders the description of a training job to the files of a scheduler, and says how to submit them."""
    for path in render_job(read_job(job), target, out):
        print(path)
    print(f"submit: {SUBMIT[target].format(folder=out)}")
