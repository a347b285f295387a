"""The commands of validation: validate, simulate-trial, plan."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR
from crcjax.errors import InputError

plan = typer.Typer(help="Locks an analysis plan before unblinding, and shows every later change.", no_args_is_help=True)
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
) -> None:
    """Compares predictions of held-out cases with the reference classes and writes a report.

    With --plan: results.json, report.html, tables and figures of a pre-specified analysis. Without: a short report of
    --predictions and --cohort.
    """
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

    validator = EPOCValidator(plan, predictions=predictions, cohort=cohort)
    results = validator.run()
    report = validator.write(out, pdf=pdf)
    STDERR.print(results.state.sentence, markup=False)
    for message in results.messages:
        STDERR.print(f"warning: {message}", markup=False)
    for gate in results.gates:
        STDERR.print(f"{gate.verdict}: {gate.gate.title}: {gate.sentence}", markup=False)
    STDERR.print(f"{report}", markup=False)


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
