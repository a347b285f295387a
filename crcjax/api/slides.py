"""Slides in the Python API: opening a slide, and a synthetic cohort to experiment with."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from crcjax.progress import progress_bar
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.slides.wsi.slide import Slide
from crcjax.slides.wsi.slide import open_slide as _open_slide

DEMO_CASES = {"train": 12, "val": 3, "test": 6}
DEMO_SIZE_PX = (1536, 1280)


def open_slide(path: str | PathLike[str], mpp: float | None = None) -> Slide:
    """Opens a slide file, or a folder that holds one DICOM series.

    Args:
      path: the slide.
      mpp: micrometres per level-0 pixel, in place of the value in the file.

    Raises:
      SlideError: the file is missing, damaged, of an unknown format, or does not state its micrometres per pixel.
    """
    return _open_slide(Path(path), mpp)


def demo_cohort(
    folder: str | PathLike[str],
    *,
    cases: dict[str, int] | None = None,
    size_px: tuple[int, int] = DEMO_SIZE_PX,
    seed: int = 0,
) -> Path:
    """Paints a small synthetic cohort with known ground truth; slides that already exist are not painted again.

    Args:
      folder: the folder in which slides/ and cohort.csv are written.
      cases: the number of slides in each split; by default 12 train, 3 val and 6 test.
      size_px: width and height of the slides, at 0.5 µm per pixel.
      seed: decides tissue, stains and artefacts.

    Returns:
      The path of cohort.csv.
    """
    cases = DEMO_CASES if cases is None else cases
    with progress_bar(quiet=True) as bar:
        task = bar.add_task("paint", total=sum(cases.values()))
        table = paint_cohort(Path(folder), cases, seed=seed, size_px=size_px, on_slide=lambda: bar.advance(task))
        bar.update(task, completed=sum(cases.values()))
    return table
