"""The command `crcjax drift`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR
from crcjax.errors import writing


def drift(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS.csv", help="later predictions, in the order of time")
    ],
    reference: Annotated[Path, typer.Option(help="predictions of held-out cases by the same bundle, with targets")],
    out: Annotated[Path | None, typer.Option(help="JSON file of the report")] = None,
    window: Annotated[int, typer.Option(min=5, help="cases in a window")] = 25,
    error: Annotated[
        float, typer.Option(min=1e-6, max=0.5, help="probability of any false alarm, over all windows")
    ] = 0.01,
    seed: Annotated[int, typer.Option(help="decides the permutations")] = 0,
) -> None:
    """Tests whether later cases differ from the reference, and estimates their accuracy without labels.

    Exits with 1 if something changed.
    """
    from crcjax.lifecycle.drift.drift_report import examine
    from crcjax.validation.load_predictions import load_predictions

    first = load_predictions(reference)
    later = load_predictions(predictions, first.classes)
    report = examine(first.rows, later.rows, window=window, error=error, seed=seed)
    if out:
        with writing(out):
            out.write_text(json.dumps(asdict(report), indent=1) + "\n")
    for stream in report.streams:
        verdict = f"changed, noticed in window {stream.alarm}" if stream.alarm else "no change"
        print(f"{stream.name}: {verdict} (evidence {stream.evidence[-1]:.3g} of {stream.threshold:.3g})")
    performance = report.performance
    interval = f"{performance.ci_low:.3f} to {performance.ci_high:.3f}"
    print(
        f"accuracy by confidence alone: {performance.accuracy:.3f} ({interval}), {performance.status}: {performance.reason}"
    )
    STDERR.print(
        f"{report.windows} windows of {window} cases; any false alarm: probability {error:g} at most", markup=False
    )
    raise typer.Exit(1 if report.alarms else 0)
