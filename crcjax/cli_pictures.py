"""The command of pictures for pathologists."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR, CohortFile, Mpp, PseudonymKey, Slides, progress_on_terminal


def pictures(
    predictions: Annotated[Path, typer.Argument(metavar="PREDICTIONS", help="the --out of crcjax predict")],
    slides: Slides = None,
    cohort: CohortFile = None,
    mpp: Mpp = None,
    tiles: Annotated[int, typer.Option(min=1, max=50, help="tiles of each class on contact sheets and reports")] = 8,
    dicom: Annotated[
        bool, typer.Option("--dicom", help="also write DICOM parametric maps, for DICOM slides (extra dicom)")
    ] = False,
    pseudonym_key: PseudonymKey = None,
) -> None:
    """Writes overlays for QuPath, contact sheets and case reports of predicted slides (see docs/pictures.md)."""
    from crcjax.data.slide_selection import named_slides
    from crcjax.pictures.write_pictures import write_pictures
    from crcjax.predict.engine import SlideSource

    sources = {
        slide.slide_id: SlideSource(slide.path, slide.mpp, mpp) for slide in named_slides(slides, cohort, pseudonym_key)
    }
    with progress_on_terminal() as progress:
        task = progress.add_task("drawing", total=len(sources))
        outcomes = write_pictures(
            predictions, sources, tiles=tiles, dicom=dicom, on_slide=lambda outcome: progress.advance(task)
        )
    faults = [outcome for outcome in outcomes if outcome.fault]
    for outcome in faults:
        STDERR.print(f"{outcome.slide_id}: {outcome.fault}", markup=False)
    STDERR.print(
        f"pictures of {len(outcomes) - len(faults)} of {len(outcomes)} predicted slides, and case reports: "
        f"{predictions / 'reports'}",
        markup=False,
    )
    raise typer.Exit(1 if faults else 0)
