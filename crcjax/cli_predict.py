"""The commands of trained models: predict, crossvalidate, calibrate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from crcjax.audit.commands import audited, digest_of, record_details
from crcjax.cli_options import (
    STDERR,
    CohortFile,
    EncoderWeights,
    Mpp,
    PseudonymKey,
    Slides,
    TrustedKeys,
    progress_on_terminal,
)
from crcjax.errors import InputError

if TYPE_CHECKING:
    from crcjax.predict.attribution_method import Method
    from crcjax.predict.onnx_ensemble import OnnxModel
    from crcjax.predict.slide_cost import SlideSize
    from crcjax.runs.trained_model import TrainedModel
    from crcjax.validation.calibration import Calibration
    from crcjax.validation.predictions_table import PredictionRow


_NO_EXPECTATION = "the time is unknown until this model has predicted slides on this machine"


@audited("predict")
def predict(
    slides: Slides = None,
    run: Annotated[
        list[Path] | None,
        typer.Option(help="the --workdir of a training; repeat it for a deep ensemble of runs with different seeds"),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="folder of crcjax checkpoints export, in place of --run (docs/bundles.md)")
    ] = None,
    onnx: Annotated[
        Path | None,
        typer.Option(help="folder of crcjax export-model, in place of --run; needs no JAX (docs/export.md)"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of predictions.csv, heatmaps and attention files")] = ...,  # type: ignore[assignment]
    trust: TrustedKeys = None,
    encoder_weights: EncoderWeights = None,
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
    region_share: Annotated[
        float,
        typer.Option(help="share of each slide's regions to read, chosen on a small picture of it; 1: all of them"),
    ] = 1.0,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, help="threads that decode tiles, with --executor ray of each worker; by default one per core"
        ),
    ] = None,
    executor: Annotated[
        Literal["threads", "ray"], typer.Option(help="threads here, or the workers of a running Ray cluster")
    ] = "threads",
    priority: Annotated[
        Literal["routine", "urgent"],
        typer.Option(help="urgent: your other predictions on this machine begin no slide until this one ends"),
    ] = "routine",
    memory_gib: Annotated[
        float | None,
        typer.Option(min=0, help="limit for the slides that are predicted at once; by default half of what is free"),
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: only part I, from 1 to N, of the slides; the last writes the whole table")
    ] = None,
    pseudonym_key: PseudonymKey = None,
    store: Annotated[
        Path | None,
        typer.Option(help="folder of crcjax tile or import: predict its tiles or features, without the slide files"),
    ] = None,
) -> None:
    """Predicts the subtype of slides with a trained run, an ensemble of runs, a bundle, or an exported model.

    The same command resumes an interrupted run.
    """
    from crcjax.data.slide_selection import named_slides
    from crcjax.predict.predict_slides import PredictJob, predict_slides
    from crcjax.predict.predictor import Predictor
    from crcjax.validation.calibration import load_calibration

    if store:
        file_options: dict[str, object] = {
            "slides": slides,
            "--mpp": mpp,
            "--region-share": region_share != 1,
            "--workers": workers,
            "--executor": executor != "threads",
            "--priority": priority != "routine",
            "--memory-gib": memory_gib,
            "--shard": shard,
            "--pseudonym-key": pseudonym_key,
        }
        _refuse_with("--store", file_options)
    models: Sequence[Path | TrainedModel | OnnxModel]
    if onnx:
        _refuse_with(
            "--onnx",
            {
                "--run": run,
                "--bundle": bundle,
                "--trust": trust,
                "--encoder-weights": encoder_weights,
                "--store": store,
                "--executor": executor != "threads",
            },
        )
        models, fitted = _exported_model(onnx, calibration)
    else:
        trained, fitted = _models(run, bundle, trust, encoder_weights, calibration)
        if store:
            _predict_stored(trained, store, out, cohort, fitted, dropout_samples, attribution)
        models = trained
    predictor = Predictor(*models, dropout_samples=dropout_samples, attribution=attribution, region_share=region_share)
    checked = None if fitted is None else load_calibration(fitted, predictor.model_id, predictor.classes)
    jobs = [
        PredictJob(
            *(slide.slide_id, slide.case_id, slide.path, slide.mpp, slide.site, mpp),
            names_path=not pseudonym_key,
            scanner=slide.scanner,
            target=slide.label,
        )
        for slide in named_slides(slides, cohort, pseudonym_key, predictor.target)
    ]
    with progress_on_terminal() as progress:
        task = progress.add_task("predicting", total=None)
        rows = predict_slides(
            predictor,
            jobs,
            out,
            threads=workers,
            memory_bytes=None if memory_gib is None else max(1, int(memory_gib * 2**30)),
            shard=shard,
            executor=executor,
            is_urgent=priority == "urgent",
            calibration=checked,
            on_start=lambda slides: progress.update(task, total=slides),
            on_plan=_print_expected,
            on_row=lambda row: progress.advance(task),
        )
    if shard and not (out / "predictions.csv").exists():
        STDERR.print(f"other shards have not ended; the last writes {out / 'predictions.csv'}", markup=False)
    names = {job.slide_id: job.slide_id if pseudonym_key else str(job.path) for job in jobs}
    _print_predictions(rows, names, out)


@audited("export-model")
def export_model(
    out: Annotated[Path, typer.Option(help="folder of the graphs and model.json, new")],
    run: Annotated[
        list[Path] | None, typer.Option("--run", help="the --workdir of a training; repeated, an ensemble")
    ] = None,
    bundle: Annotated[Path | None, typer.Option(help="bundle of crcjax checkpoints export, in place of --run")] = None,
    trust: TrustedKeys = None,
    encoder_weights: EncoderWeights = None,
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="onnx or stablehlo; repeated; both by default")
    ] = None,
    weights: Annotated[
        Literal["float32", "float16", "int8"],
        typer.Option(help="how ONNX graphs store their weights; all but float32 make ONNX alone"),
    ] = "float32",
) -> None:
    """Writes a model's encoder and aggregator as ONNX and StableHLO graphs for other runtimes (see docs/export.md).

    Every graph is run and compared with the model before it is written.
    """
    from crcjax.predict.export_model import FORMATS
    from crcjax.predict.export_model import export_model as export

    models, _ = _models(run, bundle, trust, encoder_weights, None)
    for graph in export(models, out, formats or (FORMATS if weights == "float32" else ("onnx",)), weights):
        size, difference = f"{graph.size_bytes / 2**20:.2f} MiB", f"{graph.largest_difference:.1e}"
        STDERR.print(f"{graph.file}: {size}, at most {difference} from the model", markup=False)


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
        crossvalidate_trees(given, out, on_line=lambda line: STDERR.print(line, markup=False))
    else:
        train_folds(given, out, seeds=seeds, sweep=swept, on_line=lambda line: STDERR.print(line, markup=False))


def calibrate(
    predictions: Annotated[Path, typer.Option(help="predictions.csv of crcjax predict on the run's validation slides")],
    cohort: Annotated[
        Path, typer.Option(help="CSV with slide_id, case_id, the reference label, and site for --by-site")
    ],
    out: Annotated[Path, typer.Option(help="the calibration.json to write, for crcjax predict --calibration")],
    method: Annotated[
        Literal["lac", "aps"], typer.Option(help="lac: the smallest sets; aps: sets that grow with the uncertainty")
    ] = "lac",
    error: Annotated[float, typer.Option(help="share of sets that may miss the true subtype, between 0 and 1")] = 0.1,
    by_site: Annotated[
        bool, typer.Option("--by-site", help="fit a separate threshold for every site with enough cases")
    ] = False,
    reject: Annotated[
        float, typer.Option(help="share of slides like these that each limit may refuse as not evaluable; 0: no limits")
    ] = 0.02,
) -> None:
    """Fits a temperature, conformal sets and limits on the calibration or validation cases of a run (see docs/uncertainty.md)."""
    from crcjax.validation.calibration import HOTTEST
    from crcjax.validation.calibration import calibrate as fit

    calibration = fit(predictions, cohort, out, method=method, error=error, by_site=by_site, reject=reject)
    counts = ", ".join(f"{count} cases of {site or 'all sites'}" for site, count in calibration.cases.items())
    STDERR.print(f"temperature {calibration.temperature:.3f}, sets by {counts}: {out}", markup=False)
    if not 1.01 / HOTTEST < calibration.temperature < 0.99 * HOTTEST:
        STDERR.print(
            "warning: the temperature is at its limit; there are too few validation cases, or all of them are classified "
            "correctly, or none"
        )
    if calibration.limits:
        names = ", ".join(calibration.limits.largest) or "none, there are too few cases"
        STDERR.print(f"limits for evaluable slides: {names}", markup=False)
    if calibration.thresholds[""] == float("inf"):
        STDERR.print(f"warning: too few cases for an error of {error}; every set contains all subtypes", markup=False)


def _refuse_with(option: str, others: Mapping[str, object]) -> None:
    """Raises InputError for options that are given and cannot be combined with `option`."""
    if conflicting := [name for name, value in others.items() if value]:
        raise InputError(f"{option} cannot be combined with {' and '.join(conflicting)}; leave out one or the other")


def _exported_model(folder: Path, calibration: Path | None) -> tuple[list[OnnxModel], Path | Calibration | None]:
    """The exported model to predict with, and its calibration."""
    from crcjax.predict.onnx_ensemble import open_onnx

    model = open_onnx(folder)
    own_calibration = model.calibration()
    if own_calibration and calibration:
        raise InputError(f"{folder}: has a calibration of its own; leave --calibration out")
    return [model], own_calibration or calibration


def _models(
    runs: list[Path] | None,
    bundle: Path | None,
    trust: list[Path] | None,
    encoder_weights: Path | None,
    calibration: Path | None,
) -> tuple[Sequence[Path | TrainedModel], Path | Calibration | None]:
    """The models to predict with, and their calibration. Raises InputError for options that exclude each other."""
    if bool(runs) == bool(bundle):
        raise InputError("give either --run, once or several times, or --bundle, or for crcjax predict --onnx")
    if find_spec("jax") is None:
        raise InputError("--run and --bundle need JAX, which crcjax-edge leaves out; install crcjax, or give --onnx")
    from crcjax.runs.bundle import open_bundle
    from crcjax.runs.run_directory import member_runs

    if bundle is None:
        if trust or encoder_weights:
            raise InputError("--trust and --encoder-weights are for a --bundle; leave them out")
        return [member for run in runs or () for member in member_runs(run)], calibration
    opened = open_bundle(bundle, trust or (), encoder_weights)
    unchecked = "; its signature was not checked, which --trust does" if opened.is_signed and not trust else ""
    STDERR.print(f"bundle {opened.id[:12]}: {', '.join(opened.target.classes)}{unchecked}", markup=False)
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
    from crcjax.predict.member import opened_models
    from crcjax.predict.predict_store import predict_stored
    from crcjax.slides.store.tile_store import tiled_slides

    models = opened_models(models)
    if cohort:
        slides = load_cohort(cohort, None, models[0].config.data.label)
    else:
        slides = Cohort(tuple(SlideRow(s, s) for s in tiled_slides(store)), ())
    with progress_on_terminal() as progress:
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


def _print_expected(size: SlideSize, seconds: float | None) -> None:
    """Prints how long the slides are expected to take."""
    if not size.slides:
        return
    expected = f"about {timedelta(seconds=round(seconds))} expected" if seconds is not None else _NO_EXPECTATION
    slides = "1 slide" if size.slides == 1 else f"{size.slides} slides"
    STDERR.print(f"{slides} with about {size.tiles:,} tiles: {expected}", markup=False)


def _print_predictions(rows: Sequence[PredictionRow], names: dict[str, str], out: Path) -> NoReturn:
    """Prints the QC results, a line for each slide without a prediction, and a summary.

    Exits with status 1 if a slide has no prediction; one that exceeds a limit has one.
    """
    failed = [row for row in rows if not row.has_prediction]
    record_details(
        slides=len(rows),
        failed=len(failed),
        bundles=sorted({row.bundle_id for row in rows}),
        predictions_sha256=digest_of(out / "predictions.csv"),
    )
    for row in rows:
        if not row.is_ok:
            STDERR.print(f"{row.status}: {names[row.slide_id]}: {row.reason}", markup=False)
        elif row.qc_verdict not in ("", "accept"):
            STDERR.print(f"{row.status}, {row.qc_verdict}: {names[row.slide_id]}: {row.qc_reasons}", markup=False)
    if counts := Counter(row.qc_verdict for row in rows if row.qc_verdict):
        STDERR.print(f"QC results: {', '.join(f'{name} {counts[name]}' for name in sorted(counts))}", markup=False)
    STDERR.print(f"{len(rows) - len(failed)} of {len(rows)} slides predicted: {out / 'predictions.csv'}", markup=False)
    raise typer.Exit(1 if failed else 0)
