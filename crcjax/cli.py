"""The `crcjax` command: each command one call into the library."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from crcjax import __version__, cli_checkpoints
from crcjax.cli_supervise import supervise
from crcjax.environment import check_platform
from crcjax.errors import CrcjaxError, InputError, OutputError, SlideError
from crcjax.progress import progress_bar

if TYPE_CHECKING:
    from crcjax.predict.attribution import Method
    from crcjax.runs.trained_model import TrainedModel
    from crcjax.slides.preprocess.manifest import Outcome
    from crcjax.validation.calibration import Calibration
    from crcjax.validation.predictions_table import PredictionRow

HELP = """Predicts the molecular subtype of colorectal cancer from whole-slide images. Research software; no clinical claim.

A first result: crcjax demo --out runs/demo. Your own slides: tile, train, predict, validate. In Python: docs/python.md.

Exit status: 0 everything was done; 1 the run finished, but slides were refused or failed, each named with its reason
(doctor: something is wrong); 2 wrong arguments, cohort, store or run directory, and nothing was done; 3 stopped because
the output cannot be written; finished results are kept. crcjax train --help lists those of training.
"""
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.add_typer(cli_checkpoints.app, name="checkpoints")
_stderr = Console(stderr=True, highlight=False, soft_wrap=True)

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


def _show_version(wanted: bool | None) -> None:
    if wanted:
        print(f"crcjax {__version__}")
        raise typer.Exit()


@app.callback()
def _options(
    version: Annotated[
        bool | None, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and exit")
    ] = None,
) -> None:
    pass


def main() -> None:
    """Runs the command; errors that a user can act on are one line."""
    try:
        check_platform()
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
    tissue_method: Annotated[
        Literal["robust", "otsu", "entropy"], typer.Option(help="method of tissue segmentation (docs/slides.md)")
    ] = "robust",
    min_tissue_mm2: Annotated[
        float,
        typer.Option(
            help="area of the smallest piece of tissue; on pictures of less than four times that, a quarter of the picture"
        ),
    ] = 0.02,
    include: Annotated[
        Path | None,
        typer.Option(help="folder of SLIDE_ID.geojson (QuPath) or SLIDE_ID.png: tile only these areas of each slide"),
    ] = None,
    exclude: Annotated[
        Path | None, typer.Option(help="folder of such files: tile everything except these areas")
    ] = None,
    icc: Annotated[bool, typer.Option("--icc", help="convert colours to sRGB by each slide's ICC profile")] = False,
    stain: Annotated[
        Literal["macenko", "vahadane", "reinhard"] | None,
        typer.Option(
            help="stain normalisation of the stored tiles; config.stain normalises in training instead and can be changed"
        ),
    ] = None,
    stain_reference: Annotated[
        Path | None, typer.Option(help="the slide whose stain is the reference; by default the published one")
    ] = None,
    pixels: Annotated[
        Literal["jpeg", "lossless"],
        typer.Option(
            help="native JPEG tiles where the grids agree, else JPEG of quality 90; or lossless, 7 times larger"
        ),
    ] = "jpeg",
    no_pixels: Annotated[
        bool,
        typer.Option(
            "--no-pixels", help="store no pixels: training reads them from the slide file, which must stay where it is"
        ),
    ] = False,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=NUMBER, a limit of quality control: by default min_tissue=0.25, the smallest fraction of a tile that "
            "must be tissue, max_pen=0.2, the largest fraction under ink, and others (docs/slides.md); repeatable"
        ),
    ] = None,
    keep_all: Annotated[
        bool,
        typer.Option(
            "--keep-all",
            help="exclude no tile with tissue; quality control only states the tiles that it would exclude",
        ),
    ] = False,
    workers: Annotated[int | None, typer.Option(min=1, help="cores to use; all by default")] = None,
    executor: Annotated[
        Literal["processes", "ray"], typer.Option(help="processes here, or the CPUs of a running Ray cluster")
    ] = "processes",
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="tile slides again even if that deletes their stored features; without it such a slide is refused",
        ),
    ] = False,
    shard: Annotated[str | None, typer.Option(help="I/N: only part I, from 1 to N, of the slides (see above)")] = None,
    slide_timeout_s: Annotated[float | None, typer.Option(help="fail a slide that takes longer")] = None,
    slide_memory_gib: Annotated[
        float | None, typer.Option(help="fail a slide whose worker process uses more memory")
    ] = None,
    pseudonym_key: PseudonymKey = None,
) -> None:
    """Cuts slides into tiles and stores them for training. Run again, it tiles only the slides that are missing.

    Several runs may share a store, such as those of a SLURM array:

    sbatch --array=1-16 --wrap 'crcjax tile SLIDES --out STORE --shard $SLURM_ARRAY_TASK_ID/16'

    STORE/manifest.jsonl lists the outcome of every slide.
    """
    from crcjax.data.slide_selection import named_slides
    from crcjax.slides.jobs.worker_pool import JobLimits
    from crcjax.slides.preprocess.tile_slides import TileJob, shard_of, tile_slides
    from crcjax.slides.tiling.plan import TilingParams
    from crcjax.slides.tiling.quality_control import QualityLimits, parse_limits
    from crcjax.slides.tiling.regions_of_interest import areas_of

    if no_pixels and pseudonym_key:
        raise InputError("--no-pixels keeps the slides' paths, which --pseudonym-key hides; keep the pixels")
    limits = parse_limits(limit or (), QualityLimits)
    params = TilingParams(
        tuple(mag.split(",")),
        tile_px,
        quality=limits,
        tissue=tissue_method,
        icc=icc,
        min_tissue_mm2=min_tissue_mm2,
        keep_all=keep_all,
    )
    if stain_reference and not stain:
        raise InputError("--stain-reference needs --stain macenko, vahadane or reinhard")
    if stain:
        from crcjax.slides.stain.normalisation import reference_stain  # loads JAX

        params = dataclasses.replace(params, stain=reference_stain(stain, stain_reference, params, mpp))
    jobs = [
        TileJob(
            slide.slide_id,
            slide.path,
            slide.mpp,
            names_path=not pseudonym_key,
            areas=areas_of(slide.slide_id, include, exclude, "" if pseudonym_key else slide.path.name),
            fallback_mpp=mpp,
        )
        for slide in named_slides(slides, cohort, pseudonym_key)
    ]
    if exclude and jobs and not any(job.areas.exclude or job.areas.fault for job in jobs):
        raise InputError(f"--exclude {exclude}: no file there belongs to a slide; name them {jobs[0].slide_id}.geojson")
    if shard is not None:
        jobs = shard_of(jobs, shard)
    # Progress is weighted by size. The largest slides come first, and a mere count would overestimate the time remaining.
    sizes = {job.slide_id: job.size_bytes or 1 for job in jobs}
    columns = ("{task.fields[slides]} of {task.fields[of]} slides", "{task.fields[speed]:.0f} tiles/s")
    with _progress(*columns) as progress:
        task = progress.add_task("tiling", total=sum(sizes.values()), slides=0, of=len(jobs), speed=0.0)
        tiles = 0

        def show(outcome: Outcome) -> None:
            nonlocal tiles
            tiles += outcome.tiles if outcome.status == "tiled" else 0
            shown = progress.tasks[0]
            speed = tiles / (shown.elapsed or 1.0)
            progress.update(task, advance=sizes[outcome.slide_id], slides=shown.fields["slides"] + 1, speed=speed)

        outcomes = tile_slides(
            jobs,
            out,
            params,
            workers=workers,
            pixels="none" if no_pixels else pixels,
            executor=executor,
            limits=JobLimits(slide_timeout_s, slide_memory_gib),
            replace_features=replace,
            on_outcome=show,
        )
    _say_outcomes(outcomes, "tiled", out)


@app.command()
def overview(
    store: Annotated[Path, typer.Argument(help="the --out of crcjax tile")],
    cohort: Annotated[
        Path | None, typer.Option(help="CSV with slide_id, case_id, site and scanner: only its slides, by site")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=DEGREES: by default max_stain_degrees=15, the largest angle between a slide's stains and the "
            "cohort's, and max_tile_degrees=10, between a tile's colour and every mixture of these; repeatable"
        ),
    ] = None,
) -> None:
    """Writes STORE/overview/index.html: the contact sheet, quality scores and QC status of every slide."""
    from crcjax.data.cohort import load_cohort
    from crcjax.slides.preprocess.qc_report import write_overview
    from crcjax.slides.tiling.quality_control import StainLimits, parse_limits

    limits = parse_limits(limit or (), StainLimits)
    rows = load_cohort(cohort, None).rows if cohort else ()
    places = {row.slide_id: ", ".join(filter(None, (row.site, row.scanner))) for row in rows}
    faults: dict[str, str] = {}
    page = write_overview(store, places if cohort else None, limits, on_fault=faults.__setitem__)
    for slide_id, reason in faults.items():
        _stderr.print(f"failed: {slide_id}: {reason}", markup=False)
    _stderr.print(f"{page}", markup=False)
    raise typer.Exit(1 if faults else 0)


@app.command("import")
def import_(
    files: Annotated[list[Path], typer.Argument(metavar="FILE_OR_FOLDER...", help=".h5 of CLAM, TRIDENT or STAMP")],
    out: Annotated[Path, typer.Option(help="folder of the tile stores")],
    slides: Annotated[
        list[Path] | None,
        typer.Option(help="slide file, or folder to search; pixels are read from these slides; repeatable"),
    ] = None,
    cohort: Annotated[Path | None, typer.Option(help="CSV with slide_id, case_id and path of the slides")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="name of the features, by default the one that the file states")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm per level-0 pixel of all files, and of slides that state none")
    ] = None,
    side_px: Annotated[
        float | None, typer.Option(help="side of a tile in level-0 pixels, for files that do not state it")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="cores to use; all by default")] = None,
) -> None:
    """Imports other tools' tiles and features into a store that training reads (see docs/interchange.md).

    A file that contradicts its slide is refused. Run again, the command imports only the files that are missing.
    """
    from crcjax.data.slide_selection import named_slides
    from crcjax.slides.interchange.importer import import_files

    named = {slide.slide_id: slide for slide in named_slides(slides, cohort)} if slides or cohort else None
    with _progress() as progress:
        task = progress.add_task("importing", total=None)
        outcomes = import_files(
            files,
            out,
            slides=None if named is None else {slide_id: slide.path for slide_id, slide in named.items()},
            slide_mpp={slide_id: slide.mpp for slide_id, slide in (named or {}).items() if slide.mpp},
            encoder=encoder,
            mpp=mpp,
            side_px=side_px,
            threads=workers,
            on_outcome=lambda outcome: progress.advance(task),
        )
    _say_outcomes(outcomes, "imported", out)


@app.command()
def export(
    store: Annotated[Path, typer.Argument(help="the --out of crcjax tile or crcjax import")],
    out: Annotated[Path, typer.Option(help="folder of the files, one a slide")],
    layout: Annotated[
        Literal["geojson", "trident"], typer.Option("--format", help="for QuPath, or HDF5 coordinates for TRIDENT")
    ] = "geojson",
) -> None:
    """Writes the kept tiles of a store for other tools (see docs/interchange.md)."""
    from crcjax.slides.interchange.exporter import export_store

    _say_outcomes(export_store(store, out, layout), "exported", out)


@app.command()
def embed(
    store: Annotated[Path, typer.Argument(help="the --out of crcjax tile")],
    encoder: Annotated[str, typer.Option(help="a name of docs/encoders.md, such as uni2-h")],
    weights: Annotated[Path, typer.Option(help="the encoder's weights, a local .safetensors, .bin or .pth")],
    mag: Annotated[
        str | None, typer.Option(help="magnifications to encode; by default the nearest to the encoder's resolution")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="tiles per batch; by default as many as memory allows")
    ] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option(help="type of the computation; by default float32 on CPUs and bfloat16 on other devices"),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="threads that decode tiles; by default one per core")
    ] = None,
) -> None:
    """Encodes all tiles of a store with a published encoder, on all devices, and stores the features.

    The same command resumes an interrupted run.
    """
    from crcjax.predict.embed import View, embed_store

    with _progress() as progress:
        task = progress.add_task("embedding", total=None)

        def start(view: View, slides: int, tiles: int) -> None:
            progress.update(task, total=slides)
            if view.warning:
                _stderr.print(f"warning: {view.warning}", markup=False)
            _stderr.print(f"{', '.join(view.magnifications)}, {tiles} tiles per batch", markup=False)

        outcomes = embed_store(
            store,
            encoder,
            weights,
            batch=batch,
            magnifications=mag.split(",") if mag else (),
            dtype=dtype,
            threads=workers,
            on_start=start,
            on_slide=lambda outcome: progress.advance(task),
        )
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    for outcome in failed:
        _stderr.print(f"failed: {outcome.slide_id}: {outcome.reason}", markup=False)
    tiles, seconds = sum(outcome.tiles for outcome in outcomes), sum(outcome.seconds for outcome in outcomes)
    speed = f", {tiles / seconds:.1f} tiles/s" if seconds else ""
    done = f"{len(outcomes) - len(failed)} of {len(outcomes)} slides"
    _stderr.print(f"{done} have features of {encoder}{speed}", markup=False)
    raise typer.Exit(1 if failed else 0)


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


@app.command()
def predict(
    slides: Slides = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(help="the --workdir of a training; repeat it for a deep ensemble of runs with different seeds"),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="folder of crcjax checkpoints export, in place of --run (docs/bundles.md)")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of predictions.csv, heatmaps and attention files")] = ...,  # type: ignore[assignment]
    trust: Annotated[
        list[Path] | None, typer.Option(help="public key: refuse a bundle that it has not signed; repeatable")
    ] = None,
    encoder_weights: Annotated[
        Path | None, typer.Option(help="weights of the published encoder that the bundle names by its hash")
    ] = None,
    cohort: CohortFile = None,
    mpp: Mpp = None,
    dropout_samples: Annotated[
        int, typer.Option(min=0, help="predictions of each run with dropout (Monte Carlo); 0: one without dropout")
    ] = 0,
    calibration: Annotated[
        Path | None,
        typer.Option(help="calibration.json of crcjax calibrate, for calibrated probabilities and conformal sets"),
    ] = None,
    attribution: Annotated[
        Literal["attention", "gradient", "occlusion", "region_occlusion"],
        typer.Option(help="method of the heatmap; occlusion pools the bag once per tile, region_occlusion per region"),
    ] = "attention",
    workers: Annotated[
        int | None, typer.Option(min=1, help="threads that decode tiles; by default one per core")
    ] = None,
    pseudonym_key: PseudonymKey = None,
    store: Annotated[
        Path | None,
        typer.Option(help="folder of crcjax tile or import: predict its tiles or features, without the slide files"),
    ] = None,
) -> None:
    """Predicts the subtype of slides with a trained run, an ensemble of runs, or a bundle.

    The same command resumes an interrupted run.
    """
    from crcjax.data.slide_selection import named_slides
    from crcjax.predict.predict_slides import PredictJob, predict_slides
    from crcjax.predict.predictor import Predictor
    from crcjax.validation.calibration import load_calibration

    if store:
        file_options = {"slides": slides, "--mpp": mpp, "--workers": workers, "--pseudonym-key": pseudonym_key}
        if conflicting := [name for name, value in file_options.items() if value]:
            raise InputError(f"--store cannot be combined with {' and '.join(conflicting)}; leave out one or the other")
    models, fitted = _models(run, bundle, trust, encoder_weights, calibration)
    if store:
        _predict_stored(models, store, out, cohort, fitted, dropout_samples, attribution)
    predictor = Predictor(*models, dropout_samples=dropout_samples, attribution=attribution)
    checked = None if fitted is None else load_calibration(fitted, predictor.model_id, predictor.classes)
    jobs = [
        PredictJob(slide.slide_id, slide.case_id, slide.path, slide.mpp, slide.site, mpp, names_path=not pseudonym_key)
        for slide in named_slides(slides, cohort, pseudonym_key)
    ]
    with _progress() as progress:
        task = progress.add_task("predicting", total=len(jobs))
        rows = predict_slides(
            predictor, jobs, out, threads=workers, calibration=checked, on_row=lambda row: progress.advance(task)
        )
    names = {job.slide_id: job.slide_id if pseudonym_key else str(job.path) for job in jobs}
    _print_predictions(rows, names, out)


@app.command(context_settings={"ignore_unknown_options": True})
def crossvalidate(
    config: Annotated[Path, typer.Option(help="config file, as of python -m crcjax.main")],
    out: Annotated[Path, typer.Option(help="folder of the runs, runs.csv and predictions.csv")],
    seeds: Annotated[int, typer.Option(min=1, help="runs a fold, from config.seed on: an ensemble")] = 1,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE,VALUE to choose from by validation; repeated, all combinations"),
    ] = None,
    baseline: Annotated[
        Literal["trees"] | None,
        typer.Option(
            help="in place of the runs, trees on each bag's smallest and largest stored features: OUT/predictions-trees.csv"
        ),
    ] = None,
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="--config.FIELD=VALUE...", help="as in training")
    ] = None,
) -> None:
    """Trains every fold of config.data.folds and predicts each case by runs that never saw it (see docs/training.md).

    With --config.data.fold_by=site and no number of folds, each site is left out once. With --config.train.ensemble_size=N, N
    seeds of a fold are trained as an ensemble. The same command resumes after a stop.
    """
    from crcjax.main import read_config
    from crcjax.train.crossvalidate import crossvalidate as train_folds
    from crcjax.train.tree_baseline import crossvalidate_trees

    given = read_config([f"--config={config}", f"--workdir={out}", *(fields or ())])[0]
    swept: dict[str, list[str]] = {}
    for text in sweep or ():
        name, equals, values = text.partition("=")
        if not equals or name in swept:
            raise InputError(f"--sweep {text}: write FIELD=VALUE,VALUE, each field once")
        swept[name] = values.split(",")
    if baseline and (sweep or seeds > 1):
        raise InputError("--baseline trees has one forest per fold; leave out --seeds and --sweep")
    if baseline:
        crossvalidate_trees(given, out, on_line=lambda line: _stderr.print(line, markup=False))
    else:
        train_folds(given, out, seeds=seeds, sweep=swept, on_line=lambda line: _stderr.print(line, markup=False))


@app.command()
def calibrate(
    predictions: Annotated[Path, typer.Option(help="predictions.csv of crcjax predict on the run's validation slides")],
    cohort: Annotated[Path, typer.Option(help="CSV with slide_id, case_id, subtype, and site for --by-site")],
    out: Annotated[Path, typer.Option(help="the calibration.json to write, for crcjax predict --calibration")],
    method: Annotated[
        Literal["lac", "aps"], typer.Option(help="lac: the smallest sets; aps: sets that grow with the uncertainty")
    ] = "lac",
    error: Annotated[float, typer.Option(help="share of sets that may miss the true subtype, between 0 and 1")] = 0.1,
    by_site: Annotated[
        bool, typer.Option("--by-site", help="fit a separate threshold for every site with enough cases")
    ] = False,
) -> None:
    """Fits a temperature and conformal sets on the validation cases of a run (see docs/uncertainty.md)."""
    from crcjax.validation.calibration import HOTTEST
    from crcjax.validation.calibration import calibrate as fit

    calibration = fit(predictions, cohort, out, method=method, error=error, by_site=by_site)
    counts = ", ".join(f"{count} cases of {site or 'all sites'}" for site, count in calibration.cases.items())
    _stderr.print(f"temperature {calibration.temperature:.3f}, sets by {counts}: {out}", markup=False)
    if not 1.01 / HOTTEST < calibration.temperature < 0.99 * HOTTEST:
        _stderr.print(
            "warning: the temperature is at its limit; there are too few validation cases, or all of them are classified "
            "correctly, or none"
        )
    if calibration.thresholds[""] == float("inf"):
        _stderr.print(f"warning: too few cases for an error of {error}; every set contains all subtypes", markup=False)


@app.command()
def validate(
    predictions: Annotated[Path, typer.Option(help="predictions.csv of crcjax predict")],
    cohort: Annotated[Path, typer.Option(help="CSV with slide_id, case_id and the reference subtype")],
    out: Annotated[Path, typer.Option(help="folder of metrics.json, cases.csv and report.html")],
    truth: Annotated[
        Path | None, typer.Option(help="folder of synthetic slides with their ground truth, to evaluate attention")
    ] = None,
) -> None:
    """Compares predictions of held-out cases with reference subtypes and writes a report."""
    from crcjax.validation.report import validate as write_report

    write_report(predictions, cohort, out, truth)
    _stderr.print(f"{out / 'report.html'}", markup=False)


@app.command()
def deidentify(
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDE_OR_FOLDER...", help="Aperio, tiled TIFF or DICOM")],
    out: Annotated[Path, typer.Option(help="the copy of one slide; with --pseudonym-key, the folder of all copies")],
    pseudonym_key: Annotated[
        Path | None, typer.Option(help="file of a secret key: each copy is named by its slide's pseudonym")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="slides at a time; as many as cores by default")] = None,
) -> None:
    """Copies slides without label, macro image and identifying tags; the pixels stay bit-identical.

    Each copy has a report beside it. Formats that cannot be copied safely are refused. The pixels are not searched for
    writing or pen marks. Run again, the command copies only the slides that are missing.
    """
    from crcjax.data.slide_selection import named_copies
    from crcjax.slides.deidentify.deidentify import Report, deidentify_slides, report_path
    from crcjax.slides.jobs.usable_cores import usable_cores
    from crcjax.slides.wsi.discovery import find_slides

    paths = find_slides(slides)
    copies = list(zip(paths, named_copies(paths, out, pseudonym_key), strict=True))
    # A file under a slide's pseudonym is a copy of that slide.
    jobs = [(path, copy) for path, copy in copies if not (pseudonym_key and copy.exists())]
    refused = 0
    for path, copy, result in deidentify_slides(jobs, workers or usable_cores()):
        if not isinstance(result, Report):
            refused += 1
            _stderr.print(f"refused: {result if isinstance(result, SlideError) else f'{path}: {result}'}", markup=False)
            continue
        _stderr.print(f"{path}: copied to {copy}, report {report_path(copy).name}", markup=False)
        for removed in result.removed:
            _stderr.print(f"  removed: {removed}", markup=False)
        _stderr.print(f"  remains: {result.remains}", markup=False)
    existing = f", {len(paths) - len(jobs)} copied before" if len(jobs) < len(paths) else ""
    _stderr.print(f"{len(jobs) - refused} of {len(paths)} slides copied{existing}", markup=False)
    raise typer.Exit(1 if refused else 0)


@app.command()
def pseudonyms(
    cohort: Annotated[Path, typer.Argument(help="CSV with slide_id and case_id")],
    pseudonym_key: Annotated[
        Path, typer.Option(help="file of a secret key of 32 bytes or more (openssl rand -hex 32)")
    ],
    out: Annotated[Path, typer.Option(help="the new CSV: pseudonyms, subtype, site, scanner and split, no paths")],
    keep: Annotated[
        list[str] | None, typer.Option(help="a further column to keep, such as mpp; path is refused; repeatable")
    ] = None,
) -> None:
    """Writes a cohort under the pseudonyms that `tile --pseudonym-key` and `predict --pseudonym-key` give."""
    from crcjax.data.pseudonyms import load_key, write_pseudonymous

    rows = write_pseudonymous(cohort, load_key(pseudonym_key), out, keep or ())
    _stderr.print(f"{rows} slides in {out}", markup=False)


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

    run_demo(out, seed, size, console=_stderr)


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


def _models(
    runs: list[Path] | None,
    bundle: Path | None,
    trust: list[Path] | None,
    encoder_weights: Path | None,
    calibration: Path | None,
) -> tuple[Sequence[Path | TrainedModel], Path | Calibration | None]:
    """The models to predict with, and their calibration. Raises InputError for options that exclude each other."""
    from crcjax.runs.bundle import open_bundle
    from crcjax.runs.run_directory import member_runs

    if bool(runs) == bool(bundle):
        raise InputError("give either --run, once or several times, or --bundle")
    if bundle is None:
        if trust or encoder_weights:
            raise InputError("--trust and --encoder-weights are for a --bundle; leave them out")
        return [member for run in runs or () for member in member_runs(run)], calibration
    opened = open_bundle(bundle, trust or (), encoder_weights)
    unchecked = "; its signature was not checked, which --trust does" if opened.is_signed and not trust else ""
    _stderr.print(f"bundle {opened.id[:12]}: {', '.join(opened.target.classes)}{unchecked}", markup=False)
    if opened.calibration and calibration:
        raise InputError(f"{bundle}: has a calibration of its own; leave --calibration out")
    return opened.models, opened.calibration or calibration


def _predict_stored(
    models: Sequence[Path | TrainedModel],
    store: Path,
    out: Path,
    cohort: Path | None,
    calibration: Path | Calibration | None,
    dropout_samples: int,
    attribution: Method,
) -> NoReturn:
    from crcjax.data.cohort import Cohort, SlideRow, load_cohort
    from crcjax.predict.predict_store import predict_stored
    from crcjax.slides.store.tile_store import tiled_slides

    slides = load_cohort(cohort, None) if cohort else Cohort(tuple(SlideRow(s, s) for s in tiled_slides(store)), ())
    with _progress() as progress:
        task = progress.add_task("predicting", total=len(slides.rows))
        rows = predict_stored(
            models,
            store,
            slides,
            calibration,
            out=out,
            dropout_samples=dropout_samples,
            attribution=attribution,
            on_row=lambda row: progress.advance(task),
        )
    _print_predictions(rows, {row.slide_id: row.slide_id for row in rows}, out)


def _print_predictions(rows: Sequence[PredictionRow], names: dict[str, str], out: Path) -> NoReturn:
    """Prints the QC results, a line for each slide without a prediction, and a summary.

    Exits with status 1 if a slide has no prediction.
    """
    failed = [row for row in rows if not row.is_ok]
    for row in rows:
        if not row.is_ok:
            _stderr.print(f"{row.status}: {names[row.slide_id]}: {row.reason}", markup=False)
        elif row.qc_status not in ("", "accept"):
            _stderr.print(f"{row.status}, {row.qc_status}: {names[row.slide_id]}: {row.qc_reasons}", markup=False)
    if counts := Counter(row.qc_status for row in rows if row.qc_status):
        _stderr.print(f"QC results: {', '.join(f'{name} {counts[name]}' for name in sorted(counts))}", markup=False)
    _stderr.print(f"{len(rows) - len(failed)} of {len(rows)} slides predicted: {out / 'predictions.csv'}", markup=False)
    raise typer.Exit(1 if failed else 0)


def _say_outcomes(outcomes: Sequence[Outcome], done: str, out: Path) -> NoReturn:
    """A line for every outcome with a reason, and one for all, and their QC status; ends with the exit status."""
    for outcome in outcomes:
        if outcome.reason:
            said = ", ".join(filter(None, (outcome.status, outcome.verdict)))
            _stderr.print(f"{said}: {outcome.path}: {outcome.reason}", markup=False)
    succeeded, tiles = sum(outcome.succeeded for outcome in outcomes), sum(outcome.tiles for outcome in outcomes)
    _stderr.print(f"{succeeded} of {len(outcomes)} slides {done}, {tiles} tiles in {out}", markup=False)
    if verdicts := Counter(outcome.verdict for outcome in outcomes if outcome.verdict):
        counts = ", ".join(f"{name} {verdicts[name]}" for name in ("accept", "review", "reject"))
        _stderr.print(f"QC status: {counts}; crcjax overview {out} shows why", markup=False)
    raise typer.Exit(1 if succeeded < len(outcomes) else 0)


def _progress(*texts: str) -> Progress:
    return progress_bar(_stderr, *texts)


if __name__ == "__main__":
    main()
