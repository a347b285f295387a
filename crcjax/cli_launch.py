"""The commands of `crcjax launch`."""

from __future__ import annotations

import math
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


@app.command()
def check(
    manifests: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="folders with a kustomization, or YAML files, applied together"),
    ],
    run: Annotated[
        Path | None, typer.Option(help="the --workdir of a training: its longest save is the least grace period")
    ] = None,
    least_grace_s: Annotated[int, typer.Option(min=0, help="the least grace period of a training in seconds")] = 60,
) -> None:
    """Checks manifests of Kubernetes before they are applied: schemas, references, probes, security, time to save.

    Prints one line for each fault. Exit status 1 if there is one. Schemas need the extra `launch`.
    """
    from crcjax.launching.check_manifests import manifest_faults
    from crcjax.launching.read_manifests import longest_save_s, read_manifests, schema_faults

    if run is not None:
        # A save begins only after the current step.
        least_grace_s = max(least_grace_s, math.ceil(2 * longest_save_s(run)))
    objects = [manifest for path in manifests for manifest in read_manifests(path)]
    try:
        faults = schema_faults(objects)
    except ImportError:
        faults = []
        STDERR.print("crcjax: schemas were not checked; they need pip install 'crcjax[launch]'", markup=False)
    faults += [fault for fault in manifest_faults(objects, least_grace_s) if fault not in faults]
    for fault in faults:
        print(fault)
    if not faults:
        print(f"no fault in {len(objects)} objects")
    raise typer.Exit(1 if faults else 0)
