"""Options, the console for messages, the progress bar and the end of a command: shared by all commands."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from crcjax import __version__
from crcjax.environment import check_platform
from crcjax.errors import CrcjaxError, InputError, OutputError
from crcjax.progress import progress_bar

STDERR = Console(stderr=True, highlight=False, soft_wrap=True)

Slides = Annotated[
    list[Path] | None, typer.Argument(metavar="SLIDE_OR_FOLDER...", help="slide files; folders are searched")
]
CohortFile = Annotated[
    Path | None,
    typer.Option(help="CSV with slide_id, case_id, path and, if need be, mpp; its slides, if none are named"),
]
Mpp = Annotated[
    float | None,
    typer.Option(
        help="µm per level-0 pixel of slides that state none; the cohort's column mpp overrides what one states"
    ),
]
PseudonymKey = Annotated[
    Path | None,
    typer.Option(help="file of a secret key: slides and cases appear under pseudonyms, and no path is kept or shown"),
]
TrustedKeys = Annotated[
    list[Path] | None, typer.Option(help="public key: refuse a bundle that it has not signed; repeatable")
]
EncoderWeights = Annotated[
    Path | None, typer.Option(help="weights of the published encoder that the bundle names by its hash")
]


def progress_on_terminal(*texts: str) -> Progress:
    """A progress bar on the console of messages; `texts` are further columns."""
    return progress_bar(STDERR, *texts)


def run_app(app: typer.Typer) -> None:
    """Runs a command line; errors that a user can act on are one line."""
    try:
        check_platform()
        app()
    except InputError as error:
        _stop(error, 2)
    except OutputError as error:
        _stop(error, 3)
    except CrcjaxError as error:
        _stop(error, 1)


def show_version(wanted: bool | None) -> None:
    """The callback of --version."""
    if wanted:
        print(f"crcjax {__version__}")
        raise typer.Exit()


def _stop(error: CrcjaxError, status: int) -> None:
    print(f"crcjax: {error}", file=sys.stderr)
    sys.exit(status)
