"""The commands of `crcjax launch`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR
from crcjax.launching.job import read_job
from crcjax.launching.render import TARGETS, grace_warning, submit_commands
from crcjax.launching.render import render as render_job
from crcjax.launching.render import submit as submit_job

app = typer.Typer(help="Files that start one training job on any platform (docs/launch.md).", no_args_is_help=True)

JobFile = Annotated[Path, typer.Argument(metavar="[JOB.toml]", help="the description of the job")]
_EXAMPLE = Path("launch/job.toml")


@app.callback()
def _group() -> None:
    pass


@app.command()
def render(
    target: Annotated[str, typer.Option(help=f"the platform: {', '.join(TARGETS)}")],
    out: Annotated[Path, typer.Option(help="folder of the files; those of an earlier call are replaced")],
    job: JobFile = _EXAMPLE,
    submit: Annotated[bool, typer.Option(help="also submit the job, by the platform's own client")] = False,
) -> None:
    """Renders the description of a training job to the files of a platform, and says how to submit them."""
    description = read_job(job)
    for path in render_job(description, target, out):
        print(path)
    if warning := grace_warning(description, target):
        STDERR.print(f"crcjax: {warning}", markup=False, highlight=False, soft_wrap=True)
    commands = submit_commands(description, target, out)
    if submit:
        submit_job(commands, TARGETS[target].client)
    else:
        print(f"submit: {' && '.join(shlex.join(command) for command in commands)}")
