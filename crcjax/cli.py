"""The `crcjax` command: each command one call into the library."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

# jax 0.10 queues collectives on a thread pool as large as the cores and hangs where several CPU devices share few.
os.environ.setdefault("PJRT_NPROC", "16")

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from crcjax.errors import CrcjaxError, InputError, OutputError

if TYPE_CHECKING:
    from crcjax.data.cohort import SlideRow

HELP = """Molecular subtype of colorectal cancer from whole-slide images. Research software; no clinical claim.

Exit status: 0 everything was done; 1 the run finished, but slides were refused or failed, each named with its reason
(doctor: something is wrong); 2 wrong arguments, cohort, store or run directory, and nothing was done; 3 stopped because
the output cannot be written, with what was finished kept.

Training: python -m crcjax.main --config FILE --workdir RUN, with the same statuses.
"""
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
_say = Console(stderr=True, highlight=False, soft_wrap=True)

Slides = Annotated[
    list[Path] | None, typer.Argument(metavar="SLIDE_OR_FOLDER...", help="slide files; folders are searched")
]
CohortFile = Annotated[
    Path | None, typer.Option(help="CSV with slide_id, case_id and path; its slides, if none are named")
]
Mpp = Annotated[
    float | None, typer.Option(help="µm per level-0 pixel, for slides that do not state it or state it wrongly")
]


def main() -> None:
    """Runs the command; errors that a user can act on are one line."""
    try:
        app()
    except InputError as error:
        _stop(error, 2)
    except OutputError as error:
        _stop(error, 3)
    except CrcjaxError as error:
        _stop(error, 1)


def _stop(error: CrcjaxError, status: int) -> None:
    print(f"crcjax: {error}", file=sys.stderr)
    sys.exit(status)


@app.command()
def tile(
    slides: Slides = None,
    out: Annotated[Path, typer.Option(help="folder of the tile stores")] = ...,  # type: ignore[assignment]
    cohort: CohortFile = None,
    mag: Annotated[str, typer.Option(help="magnifications: 20x, or 10x,20x,40x")] = "20x",
    tile_px: Annotated[int, typer.Option(help="side of a tile in pixels")] = 256,
    mpp: Mpp = None,
    pixels: Annotated[
        Literal["jpeg", "lossless"], typer.Option(help="keep tiles as JPEG streams, or as they were read")
    ] = "jpeg",
    no_pixels: Annotated[
        bool, typer.Option("--no-pixels", help="keep no tiles: read them from the slide, which must not move")
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="cores to use; all by default")] = None,
) -> None:
    """Cuts slides into tiles, in a store that training reads. Started again, it does what is missing."""
    from crcjax.slides.executor import TileJob, tile_slides
    from crcjax.slides.tiling import TilingParams

    params = TilingParams(tuple(mag.split(",")), tile_px)
    jobs = [TileJob(slide_id, path, mpp) for slide_id, _, path in _slides(slides, cohort)]
    with _progress() as progress:
        task = progress.add_task("tiling", total=len(jobs))
        outcomes = tile_slides(
            jobs,
            out,
            params,
            workers=workers,
            pixels="none" if no_pixels else pixels,
            on_outcome=lambda outcome: progress.advance(task),
        )
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    for outcome in failed:
        _say.print(f"{outcome.status}: {outcome.path}: {outcome.reason}", markup=False)
    tiles = sum(outcome.tiles for outcome in outcomes)
    _say.print(f"{len(outcomes) - len(failed)} of {len(outcomes)} slides tiled, {tiles} tiles in {out}", markup=False)
    raise typer.Exit(1 if failed else 0)


@app.command()
def predict(
    slides: Slides = None,
    run: Annotated[Path, typer.Option(help="the --workdir of a training")] = ...,  # type: ignore[assignment]
    out: Annotated[Path, typer.Option(help="folder for predictions.csv, heatmaps and attention")] = ...,  # type: ignore[assignment]
    cohort: CohortFile = None,
    mpp: Mpp = None,
    workers: Annotated[int | None, typer.Option(min=1, help="threads that decode; all cores by default")] = None,
) -> None:
    """Predicts the subtype of slides with a trained run."""
    from crcjax.infer.pipeline import PredictJob, predict_slides
    from crcjax.infer.predictor import Predictor

    jobs = [PredictJob(slide_id, case_id, path, mpp) for slide_id, case_id, path in _slides(slides, cohort)]
    predictor = Predictor(run)
    with _progress() as progress:
        task = progress.add_task("predicting", total=len(jobs))
        rows = predict_slides(predictor, jobs, out, threads=workers, on_row=lambda row: progress.advance(task))
    failed = [(job, row) for job, row in zip(jobs, rows, strict=True) if row["status"] != "ok"]
    for job, row in failed:
        _say.print(f"{row['status']}: {job.path}: {row['reason']}", markup=False)
    _say.print(f"{len(rows) - len(failed)} of {len(rows)} slides predicted: {out / 'predictions.csv'}", markup=False)
    raise typer.Exit(1 if failed else 0)


@app.command()
def validate(
    predictions: Annotated[Path, typer.Option(help="predictions.csv of crcjax predict")],
    cohort: Annotated[Path, typer.Option(help="CSV with slide_id, case_id and the reference subtype")],
    out: Annotated[Path, typer.Option(help="folder for metrics.json and report.html")],
    truth: Annotated[Path | None, typer.Option(help="folder of painted slides with their truths")] = None,
) -> None:
    """Compares predictions with reference labels and writes the report."""
    from crcjax.validation.report import validate as write_report

    write_report(predictions, cohort, out, truth)
    _say.print(f"{out / 'report.html'}", markup=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder of the demo")],
    seed: Annotated[int, typer.Option(help="of the painted cohort and of training")] = 0,
) -> None:
    """Paints a small synthetic cohort and takes it from slide files to the report."""
    from crcjax.demo import run_demo

    run_demo(out, seed, _say.print)


@app.command()
def doctor() -> None:
    """Says what is installed, which devices and slide formats there are, what is free, and what is wrong."""
    from crcjax.doctor import examine

    findings = examine(Path.cwd())
    table = Table(show_header=False, box=None)
    for finding in findings:
        table.add_row(finding.about, finding.found)
    console = Console()
    console.print(table)
    faults = [finding for finding in findings if finding.remedy]
    for fault in faults:
        console.print(f"wrong: {fault.about}: {fault.found}; {fault.remedy}", markup=False)
    if not faults:
        console.print("nothing is wrong")
    raise typer.Exit(1 if faults else 0)


def _slides(paths: list[Path] | None, cohort: Path | None) -> list[tuple[str, str, Path]]:
    """(slide id, case id, path) of what was named: the cohort's rows, restricted to named paths if there are any."""
    from crcjax.data.cohort import load_cohort
    from crcjax.slides.reader import find_slides, slide_id_of

    if cohort is None:
        if not paths:
            raise InputError("name slides or folders, or give --cohort")
        return [(slide_id_of(path), slide_id_of(path), path) for path in find_slides(paths)]
    rows = load_cohort(cohort, None).rows
    if not paths:
        return [(row.slide_id, row.case_id, _path_of(row, cohort)) for row in rows]
    by_path = {row.path.resolve(): row for row in rows if row.path}
    by_id = {row.slide_id: row for row in rows}
    chosen = []
    for path in find_slides(paths):
        row = by_path.get(path.resolve()) or by_id.get(slide_id_of(path))
        if row is None:
            raise InputError(f"{path}: is not in {cohort}; add a row, or leave the slide out")
        chosen.append((row.slide_id, row.case_id, path))
    return chosen


def _path_of(row: SlideRow, cohort: Path) -> Path:
    if row.path is None:
        raise InputError(f"{cohort}: slide {row.slide_id} has no path; fill the column, or name the slides' folder")
    return row.path


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=_say)


if __name__ == "__main__":
    main()
