"""The commands of validation: validate, drafts, simulate-trial, plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crcjax.cli_options import STDERR, EncoderWeights, TrustedKeys, progress_on_terminal
from crcjax.errors import InputError

if TYPE_CHECKING:
    from crcjax.predict.predict_slides import PredictJob
    from crcjax.predict.predictor import Predictor
    from crcjax.runs.bundle import Bundle
    from crcjax.validation.calibration import Calibration

plan = typer.Typer(help="Locks an analysis plan before unblinding, and shows every later change.", no_args_is_help=True)
# Where --bundle writes its predictions, in the folder of the report, by the plan's field of `data`.
_FOLDERS = {"predictions": "predictions", "without_normalisation": "predictions-without-normalisation"}
PlanFile = Annotated[Path, typer.Argument(help="TOML file of the analysis plan (docs/validation.md)")]


def validate(
    out: Annotated[Path, typer.Option(help="folder of the report and its tables")],
    plan: Annotated[
        Path | None, typer.Option(help="analysis plan, a TOML file: it names the tables, the gates and all analyses")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="table of predictions; with --plan, in place of the plan's")
    ] = None,
    cohort: Annotated[
        Path | None, typer.Option(help="table with the reference classes; with --plan, in place of the plan's")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="folder of synthetic slides with their ground truth, to evaluate attention; without --plan"),
    ] = None,
    label: Annotated[
        str,
        typer.Option(
            help="the cohort's column of the labels, without --plan; by default the target that the predictions name"
        ),
    ] = "",
    pdf: Annotated[bool, typer.Option("--pdf", help="write report.pdf too (extra pdf); with --plan")] = False,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="with --plan: predict the slides with this bundle first, with and without stain normalisation"
        ),
    ] = None,
    slides: Annotated[
        list[Path] | None,
        typer.Option(help="with --bundle: slide file or folder, repeatable; by default the cohort's column path"),
    ] = None,
    trust: TrustedKeys = None,
    encoder_weights: EncoderWeights = None,
) -> None:
    """Compares predictions of held-out cases with the reference classes and writes a report.

    With --plan: results.json, report.html, tables and figures of a pre-specified analysis. Without: a short report of
    --predictions and --cohort.
    """
    if bundle is None and (slides or trust or encoder_weights):
        raise InputError("--slides, --trust and --encoder-weights are for a --bundle; leave them out")
    if bundle is not None and (plan is None or predictions is not None):
        raise InputError("--bundle needs --plan, and makes the predictions itself; leave --predictions out")
    if plan is None:
        if predictions is None or cohort is None or pdf:
            raise InputError("give --plan, or both --predictions and --cohort; --pdf needs a plan")
        from crcjax.validation.report import validate as write_report

        write_report(predictions, cohort, out, truth, label_column=label)
        STDERR.print(f"{out / 'report.html'}", markup=False)
        return
    if truth is not None or label:
        raise InputError("--truth and --label are for a report without --plan; leave them out")
    from crcjax.validation.study.validator import EPOCValidator

    if bundle is None:
        validator = EPOCValidator(plan, predictions=predictions, cohort=cohort)
    else:
        from crcjax.runs.bundle import open_bundle

        tables = {name: out / folder / "predictions.csv" for name, folder in _FOLDERS.items()}
        # A mistake in the plan is found before the slides are predicted.
        checked = EPOCValidator(plan, cohort=cohort, **tables).plan.plan
        opened = open_bundle(bundle, trust or (), encoder_weights)
        made = _predict(opened, slides, checked.data.cohort, tables)
        validator = EPOCValidator(plan, cohort=cohort, **{name: tables[name] for name in made})
    results = validator.run()
    report = validator.write(out, pdf=pdf)
    STDERR.print(results.state.sentence, markup=False)
    for message in results.messages:
        STDERR.print(f"warning: {message}", markup=False)
    for gate in results.gates:
        STDERR.print(f"{gate.verdict}: {gate.gate.title}: {gate.sentence}", markup=False)
    STDERR.print(f"{report}", markup=False)


def _predict(bundle: Bundle, slides: list[Path] | None, cohort: Path, tables: dict[str, Path]) -> list[str]:
    """Predicts the slides with a bundle as it is, and without its stain normalisation if it has one.

    Returns the names of the tables that it wrote.
    """
    from dataclasses import replace

    from crcjax.data.slide_selection import named_slides
    from crcjax.predict.predict_slides import PredictJob
    from crcjax.predict.predictor import Predictor
    from crcjax.validation.calibration import load_calibration

    models = {"predictions": bundle.models}
    if any(model.normaliser or model.tiling.stain for model in bundle.models):
        models["without_normalisation"] = tuple(
            replace(model, normaliser=None, tiling=replace(model.tiling, stain=None)) for model in bundle.models
        )
    for name, members in models.items():
        predictor = Predictor(*members)
        calibration = bundle.calibration and load_calibration(bundle.calibration, predictor.model_id, predictor.classes)
        jobs = [
            PredictJob(
                *(slide.slide_id, slide.case_id, slide.path, slide.mpp, slide.site),
                scanner=slide.scanner,
                target=slide.label,
            )
            for slide in named_slides(slides, cohort, None, predictor.target)
        ]
        _predict_table(predictor, jobs, tables[name], calibration, name.replace("_", " "))
    return list(models)


def _predict_table(
    predictor: Predictor, jobs: list[PredictJob], table: Path, calibration: Calibration | None, title: str
) -> None:
    from crcjax.predict.predict_slides import predict_slides

    with progress_on_terminal() as progress:
        task = progress.add_task(title, total=len(jobs))
        rows = predict_slides(
            predictor, jobs, table.parent, calibration=calibration, on_row=lambda row: progress.advance(task)
        )
    unusable = [row for row in rows if not row.is_ok]
    STDERR.print(f"{table}: {len(rows)} slides, {len(unusable)} without a prediction", markup=False)


def drafts(
    results: Annotated[Path, typer.Argument(help="results.json of crcjax validate --plan")],
    plan: Annotated[Path, typer.Option(help="the plan of these results")],
    out: Annotated[Path, typer.Option(help="folder of the pages, index.html and open_items.toml")],
    bundle: Annotated[Path | None, typer.Option(help="the bundle that predicted, for its model card")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="what a person wrote for open items, beside what OUT/open_items.toml has")
    ] = None,
    test_report: Annotated[
        Path | None,
        typer.Option(help="report of this version's tests (pytest --junitxml), for the matrix of requirements"),
    ] = None,
    final: Annotated[bool, typer.Option("--final", help="refuse while items are open (status 2)")] = False,
) -> None:
    """Drafts for journals and regulators, from a study's results: checklists, model card, datasheet and skeletons of files.

    Every figure is looked up in results.json. What software cannot know is an open item with a name. Nothing states that a
    requirement is met.
    """
    import datetime

    from crcjax.validation.study.drafts.evidence import read_evidence
    from crcjax.validation.study.drafts.write_drafts import INDEX, write_drafts

    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    written = write_drafts(
        read_evidence(results, plan, bundle), out, today, answers=answers, tests=test_report, final=final
    )
    still_open, items = sum(len(draft.open_items) for draft in written), sum(len(draft.items) for draft in written)
    STDERR.print(f"{len(written)} documents, {still_open} of {items} items open", markup=False)
    STDERR.print(f"{out / INDEX}", markup=False)


def simulate_trial(
    out: Annotated[Path, typer.Option(help="folder of plan.toml, the tables it names, and truth.json")],
    seed: Annotated[int, typer.Option(min=0, help="decides the trial")] = 0,
    patients: Annotated[int, typer.Option(help="patients that reach the analysis, 100 or more")] = 147,
) -> None:
    """Simulates a trial with known truth and every analysis: 4 sites, 3 scanners, readers, survival.

    Then: crcjax validate --plan OUT/plan.toml --out REPORT
    """
    from crcjax.validation.study.simulation.simulate_trial import simulate_trial as simulate

    path = simulate(out, seed, patients)
    STDERR.print(f"{path}: a simulated trial, no evidence about patients", markup=False)


@plan.command()
def lock(
    plan: PlanFile,
    record: Annotated[
        list[Path] | None, typer.Option(help="further file whose hash is recorded, such as a bundle.json; repeatable")
    ] = None,
) -> None:
    """Locks the plan as it is: its text and hash, and those of its tables, in the hash-chained log PLAN.lock.jsonl.

    Keep the last line's hash elsewhere to prove later that the log was not rewritten.
    """
    from crcjax.validation.study.plan_lock import lock_file, lock_plan
    from crcjax.validation.study.read_plan import read_plan

    state = lock_plan(read_plan(plan), record or ())
    STDERR.print(state.sentence, markup=False)
    STDERR.print(f"{lock_file(plan)}: SHA-256 of the plan {state.versions[-1].sha256}", markup=False)


@plan.command()
def check(plan: PlanFile) -> None:
    """Says whether the plan is locked, and shows all changes since. Status 1 if it is not, has changed, or the log is damaged."""
    from crcjax.validation.study.plan_lock import plan_state
    from crcjax.validation.study.read_plan import read_plan

    state = plan_state(read_plan(plan))
    STDERR.print(state.sentence, markup=False)
    for name, lines in state.changes:
        STDERR.print("\n".join((f"change, {name}:", *lines)), markup=False)
    raise typer.Exit(1 if state.fault or state.changes or not state.is_current else 0)


@plan.command()
def example(out: Annotated[Path, typer.Option(help="the TOML file to write")]) -> None:
    """Writes the plan of the reference design (New EPOC) to start from: its figures are hypotheses, not claims."""
    from importlib import resources

    from crcjax.validation.whole_files import write_whole

    if out.exists():
        raise InputError(f"{out}: exists; give another --out, so that no plan is lost")
    write_whole({out: resources.files("crcjax.validation.study").joinpath("epoc.toml").read_text()})
    STDERR.print(f"{out}", markup=False)
