"""Forest plots: estimates with intervals, one below the other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from crcjax.pages.render import Figure
from crcjax.pages.svg import COLOURS, FULL_WIDTH, HALF_WIDTH, drawing, to_figure
from crcjax.validation.estimate import Estimate
from crcjax.validation.study.section import units, value_and_interval

# Ticks of a logarithmic axis.
_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100)
# A row of a forest: its label and estimate; the estimates of a group follow a row without one.
Row = tuple[str, Estimate | None]


def forest_figure(
    id: str,
    title: str,
    rows: Sequence[Row],
    axis: str,
    *,
    caption: str = "",
    reference: float | None = None,
    summaries: Sequence[str] = (),
    log: bool = False,
    wide: bool = True,
    stamp: str = "",
) -> Figure:
    """A forest plot.

    Args:
      id: names the file.
      title: of the figure.
      rows: from top to bottom; a row whose estimate is None is a heading.
      axis: what the axis shows.
      caption: below the figure.
      reference: where a vertical line stands.
      summaries: labels that appear as diamonds: they combine the others.
      log: whether the axis is logarithmic, for ratios.
      wide: whether the figure takes a whole row of the page.
      stamp: written into the corner.
    """
    shown = [e for _, e in rows if e is not None and np.isfinite([e.ci_low, e.ci_high]).all()]
    with drawing(FULL_WIDTH if wide else HALF_WIDTH, 0.9 + 0.3 * len(rows)) as figure:
        axes = figure.subplots()
        for place, (label, estimate) in enumerate(rows):
            if estimate is None or not np.isfinite(estimate.value):
                continue
            low, high = (v if np.isfinite(v) else estimate.value for v in (estimate.ci_low, estimate.ci_high))
            colour = COLOURS[0] if label not in summaries else COLOURS[1]
            axes.plot([low, high], [place, place], color=colour, lw=1.6)
            axes.plot(estimate.value, place, marker="D" if label in summaries else "s", color=colour, ms=6)
        if reference is not None:
            axes.axvline(reference, color="#999999", lw=1, ls="--")
        axes.set_yticks(range(len(rows)), [_left(label, estimate) for label, estimate in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(axis)
        if log and shown:
            low, high = min(e.ci_low for e in shown), max(e.ci_high for e in shown)
            axes.set_xscale("log")
            ticks = [tick for tick in _RATIOS if low / 1.3 <= tick <= high * 1.3]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
        right = axes.twinx()
        right.set_ylim(axes.get_ylim())
        right.set_yticks(range(len(rows)), ["" if e is None else value_and_interval(e) for _, e in rows])
        right.tick_params(axis="y", length=0)
        right.spines["right"].set_visible(False)
        for tick, (_, estimate) in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontweight("bold" if estimate is None else "normal")
        words = "; ".join(f"{label}: {value_and_interval(e)}" for label, e in rows if e is not None)
        return to_figure(figure, id, title, f"{title}. {words}", caption, stamp=stamp)


def _left(label: str, estimate: Estimate | None) -> str:
    return label if estimate is None else f"{label}  (n = {units(estimate)})"
