"""The `crcjax` command: each command one call into the library."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from crcjax import (
    cli_audit,
    cli_checkpoints,
    cli_keys,
    cli_launch,
    cli_models,
    cli_pictures,
    cli_power,
    cli_predict,
    cli_slides,
    cli_validate,
)
from crcjax.cli_drift import drift
from crcjax.cli_monitor import monitor
from crcjax.cli_options import STDERR, run_app, show_version
from crcjax.cli_serve import install_viewer, loadtest, serve
from crcjax.cli_supervise import health, supervise

HELP = """Predicts the molecular subtype of colorectal cancer from whole-slide images. Research software; no clinical claim.

A first result: crcjax demo --out runs/demo. Your own slides: tile, train, predict, validate. In Python: docs/python.md.

Exit status: 0 everything was done; 1 the run finished, but slides were refused or failed, each named with its reason
(doctor: something is wrong); 2 wrong arguments, cohort, store or run directory, and nothing was done; 3 stopped because
the output cannot be written; finished results are kept. crcjax train --help lists those of training.
"""
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=show_version, is_eager=True, help="print the version and exit")
    ] = None,
) -> None:
    pass


def main() -> None:
    """Runs the command."""
    run_app(app)


app.command()(cli_slides.tile)
app.command()(cli_slides.overview)
app.command("import")(cli_slides.import_)
app.command()(cli_slides.export)
app.command()(cli_slides.embed)


@app.command(
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    add_help_option=False,
    options_metavar="--config FILE --workdir RUN [--config.FIELD=VALUE ...]",
)
def train(context: typer.Context) -> None:
    """Trains a run, or resumes it; the same as python -m crcjax.main."""
    from crcjax.main import main as train_run

    raise typer.Exit(train_run(context.args))


app.command()(supervise)
app.command()(health)
app.command()(monitor)
app.command()(cli_predict.predict)
app.command(context_settings={"ignore_unknown_options": True})(cli_predict.crossvalidate)
app.command()(cli_pictures.pictures)
app.command("export-model")(cli_predict.export_model)
app.command()(cli_predict.calibrate)
app.command()(cli_validate.validate)
app.command()(cli_validate.drafts)
app.command()(cli_validate.simulate_trial)
app.add_typer(cli_validate.plan, name="plan")
app.add_typer(cli_power.app, name="power")
app.command()(serve)
app.command()(loadtest)
app.add_typer(cli_audit.app, name="audit")
app.add_typer(cli_keys.app, name="keys")
app.command()(install_viewer)
app.add_typer(cli_checkpoints.app, name="checkpoints")
app.add_typer(cli_models.app, name="models")
app.command()(drift)
app.add_typer(cli_launch.app, name="launch")
app.command()(cli_slides.deidentify)
app.command()(cli_slides.pseudonyms)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the demo, new or to be resumed")],
    seed: Annotated[int, typer.Option(help="decides the synthetic cohort and the model's initial parameters")] = 0,
    size: Annotated[
        Literal["full", "small"], typer.Option(help="small: fewer and smaller slides and steps, less accurate")
    ] = "full",
) -> None:
    """Paints a small synthetic cohort and takes it from slide files to the report.

    A demo that was killed resumes: the same command does only what is missing.
    """
    from crcjax.demo import run_demo

    run_demo(out, seed, size, console=STDERR)


@app.command()
def doctor() -> None:
    """Says what is installed, which devices and slide formats there are, what is free, and what is wrong."""
    from crcjax.doctor import examine

    findings = examine(Path.cwd())
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.about, finding.observed)
    console = Console()
    console.print(table)
    faults = [finding for finding in findings if finding.remedy]
    for fault in faults:
        console.print(f"wrong: {fault.about}: {fault.observed}; {fault.remedy}", markup=False)
    if not faults:
        console.print("nothing is wrong")
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    main()
