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


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="the encoder to train: compact, or a fine-tuned vit-s16")] = "compact",
    bags: Annotated[int, typer.Option(min=1, help="bags of a step (config.data.batch_size)")] = 32,
    regions: Annotated[int, typer.Option(min=1, help="regions of a bag (config.data.regions_per_bag)")] = 64,
    slots: Annotated[int, typer.Option(min=1, help="tiles of a region: 1, 5 or 21")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="steps of the training (config.train.steps)")] = 10000,
    encoder: Annotated[str, typer.Option(help="the encoder of the prediction, such as uni")] = "uni",
    slides: Annotated[int, typer.Option(min=1, help="slides to predict")] = 1000,
    tiles: Annotated[int, typer.Option(min=1, help="tiles of a slide with tissue")] = 10000,
    price: Annotated[float, typer.Option(min=0, help="price of one GPU for one hour, in your currency")] = 0.0,
) -> None:
    """Estimates memory, micro-batches, time and cost of training on 1, 4 and 32 GPUs, and of prediction on 1, 4 and 16.

    From measured figures of one card, which each row names; reading slides is not included.
    """
    from rich.console import Console
    from rich.table import Table

    from crcjax.launching.plan import PREDICTION_GPUS, TRAINING_GPUS, plan_prediction, plan_training

    training = Table(
        "GPUs", "micro-batches", "GiB a GPU", "ms a step", "hours", "cost", "step time", box=None, title="Training"
    )
    for gpus in TRAINING_GPUS:
        row = plan_training(model, bags, regions, slots, steps, price, gpus)
        numbers = (row.memory_gib, row.step_ms, row.hours, row.cost)
        training.add_row(str(gpus), str(row.micro_batches), *(f"{number:,.4g}" for number in numbers), row.basis)
    prediction = Table("GPUs", "slides an hour", "hours", "cost", "encoding", box=None, title="Prediction")
    for gpus in PREDICTION_GPUS:
        part = plan_prediction(encoder, slides, tiles, price, gpus)
        cells = [f"{number:,.4g}" for number in (part.slides_per_hour, part.hours, part.cost)]
        prediction.add_row(str(gpus), *cells, part.basis)
    console = Console(highlight=False, width=140)
    console.print(training)
    console.print(prediction)
