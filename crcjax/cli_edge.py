"""The `crcjax` command of crcjax-edge: prediction of exported models on machines without JAX (docs/export.md)."""

from __future__ import annotations

from typing import Annotated

import typer

from crcjax import cli_predict
from crcjax.cli_options import run_app, show_version

HELP = """Predicts the molecular subtype of colorectal cancer with a model of crcjax export-model. Research software; no clinical claim.

This is crcjax-edge, which has no JAX: crcjax predict --onnx FOLDER SLIDES --out DIR.

Exit status: 0 everything was done; 1 the run finished, but slides were refused or failed, each named with its reason; 2 wrong
arguments, cohort or model, and nothing was done; 3 stopped because the output cannot be written; finished results are kept.
"""
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=show_version, is_eager=True, help="print the version and exit")
    ] = None,
) -> None:
    pass


app.command()(cli_predict.predict)


def main() -> None:
    """Runs the command."""
    run_app(app)


if __name__ == "__main__":
    main()
