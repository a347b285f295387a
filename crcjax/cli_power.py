"""The command `crcjax power`: how many cases, events or sites a claim needs, before a study is begun."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crcjax.errors import InputError

if TYPE_CHECKING:
    from crcjax.validation.power import Recruitment, SampleSize

app = typer.Typer(
    help="Says how many cases, events or sites a claim needs (docs/validation.md). Shares and powers are from 0 to 1.",
    no_args_is_help=True,
)
Expected = Annotated[float, typer.Option(help="the value that the study is expected to find")]
HalfWidth = Annotated[float | None, typer.Option(help="claim: the 95 % interval is at most so wide to each side")]
Above = Annotated[float | None, typer.Option(help="claim: the lower limit of the 95 % interval is above this")]
Power = Annotated[float, typer.Option(help="the probability of showing the claim")]
Evaluable = Annotated[float, typer.Option(help="share of slides that pass quality control and have a reference")]
Json = Annotated[bool, typer.Option("--json", help="print JSON, with the curve as pairs of number and value")]
Svg = Annotated[Path | None, typer.Option(help="draw the power, or half-width, by the number into this SVG file")]
Curve = Callable[[int], float]


@app.command()
def proportion(
    expected: Expected,
    half_width: HalfWidth = None,
    above: Above = None,
    power: Power = 0.8,
    share: Annotated[float, typer.Option(help="share of patients who count; for a sensitivity, of the class")] = 1.0,
    slides_per_case: Annotated[int, typer.Option(help="slides of a patient that each count as a unit")] = 1,
    correlation: Annotated[float, typer.Option(help="of the results of one patient's slides")] = 1.0,
    evaluable: Evaluable = 1.0,
    as_json: Json = False,
    svg: Svg = None,
) -> None:
    """Accuracy, sensitivity, agreement: give --half-width or --above.

    crcjax power proportion --expected 0.75 --half-width 0.1 --share 0.19
    """
    from crcjax.validation import power as planning

    if _is_of_width(half_width, above):
        size = planning.size_for_width(expected, half_width or 0.0)
        curve = partial(planning.width_of_proportion, expected)
    else:
        size = planning.size_above_bound(expected, above or 0.0, power)
        curve = partial(planning.power_above_bound, expected, above or 0.0)
    _show(size, curve, as_json, svg, planning.recruitment(size, share, slides_per_case, correlation, evaluable))


@app.command()
def auroc(
    expected: Expected,
    share: Annotated[float, typer.Option(help="share of positive cases")],
    half_width: HalfWidth = None,
    above: Above = None,
    power: Power = 0.8,
    evaluable: Evaluable = 1.0,
    as_json: Json = False,
    svg: Svg = None,
) -> None:
    """The AUROC of a class against the rest: give --half-width or --above.

    crcjax power auroc --expected 0.85 --share 0.19 --half-width 0.05
    """
    from crcjax.validation import power as planning

    if _is_of_width(half_width, above):
        size = planning.size_for_auroc_width(expected, share, half_width or 0.0)
        curve = partial(planning.width_of_auroc, expected, share)
    else:
        size = planning.size_for_auroc_above(expected, share, above or 0.0, power)
        curve = partial(planning.power_of_auroc_above, expected, share, above or 0.0)
    _show(size, curve, as_json, svg, planning.recruitment(size, evaluable=evaluable))


@app.command()
def non_inferiority(
    margin: Annotated[float, typer.Option(help="the loss that is still acceptable")],
    discordant: Annotated[float, typer.Option(help="expected share of cases in which one system alone is right")],
    difference: Annotated[float, typer.Option(help="expected difference of the shares of right cases")] = 0.0,
    power: Power = 0.8,
    evaluable: Evaluable = 1.0,
    as_json: Json = False,
    svg: Svg = None,
) -> None:
    """A system that is not inferior to another, or on another scanner, on the same cases.

    crcjax power non-inferiority --margin 0.05 --discordant 0.15
    """
    from crcjax.validation import power as planning

    size = planning.size_for_non_inferiority(margin, discordant, difference, power)
    curve = partial(planning.power_of_non_inferiority, margin, discordant, difference)
    _show(size, curve, as_json, svg, planning.recruitment(size, evaluable=evaluable))


@app.command()
def hazard_ratio(
    ratio: Annotated[float, typer.Option(help="the hazard ratio that the study is expected to find")],
    share: Annotated[float, typer.Option(help="share of one group among the patients of both")],
    power: Power = 0.8,
    as_json: Json = False,
    svg: Svg = None,
) -> None:
    """A difference in survival between two subtypes, in events.

    crcjax power hazard-ratio --ratio 0.37 --share 0.275
    """
    from crcjax.validation import power as planning

    size = planning.events_for_hazard_ratio(ratio, share, power)
    _show(size, partial(planning.power_of_hazard_ratio, ratio, share), as_json, svg)


@app.command()
def sites(
    expected: Expected,
    above: Annotated[float, typer.Option(help="claim: the lower limit of the pooled 95 % interval is above this")],
    cases_per_site: Annotated[int, typer.Option(help="evaluable cases of each site")],
    between: Annotated[float, typer.Option(help="standard deviation between sites, on the logit scale")] = 0.5,
    as_json: Json = False,
    svg: Svg = None,
) -> None:
    """Sites for a proportion that holds over sites, such as an accuracy.

    crcjax power sites --expected 0.8 --above 0.7 --cases-per-site 40
    """
    from crcjax.validation import power as planning

    size = planning.sites_above_bound(expected, above, cases_per_site, between)
    _show(size, lambda n: planning.interval_of_sites(expected, n, cases_per_site, between).pooled[0], as_json, svg)


def _is_of_width(half_width: float | None, above: float | None) -> bool:
    if (half_width is None) == (above is None):
        raise InputError("give one of --half-width and --above: the claim is a precision or a lower limit")
    return half_width is not None


def _show(
    size: SampleSize, curve: Curve, as_json: bool, svg: Path | None, to_collect: Recruitment | None = None
) -> None:
    points = [(n, curve(n)) for n in _numbers(size.n)]
    if svg is not None:
        _draw(svg, size, points)
    if as_json:
        collected = {} if to_collect is None else asdict(to_collect)
        print(json.dumps({**asdict(size), **collected, "curve": points}, indent=2))
        return
    print(f"{size.n:,} {size.of}: {size.method} {size.reached:.4g}")
    if to_collect is not None and (to_collect.patients, to_collect.slides) != (size.n, size.n):
        print(
            f"to collect: {to_collect.patients:,} patients, {to_collect.slides:,} slides; "
            f"design effect {to_collect.design_effect:.3g}"
        )
    print("\n".join(f"{n:>10,} {value:.3f}" for n, value in points))


def _numbers(n: int) -> list[int]:
    """Numbers around the one that is needed, for the curve."""
    return sorted({max(2, round(n * percent / 100)) for percent in range(40, 170, 10)})


def _draw(path: Path, size: SampleSize, points: list[tuple[int, float]]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from crcjax.validation.whole_files import write_whole

    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o-", ms=4)
    axes.axvline(size.n, color="#999999", lw=1, ls="--")
    axes.set_xlabel(f"{size.of} (needed: {size.n:,})")
    axes.set_ylabel(size.method)
    text = io.StringIO()
    # The file states no date and no random ids, so that the same numbers give the same bytes.
    with rc_context({"svg.hashsalt": "crcjax"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    write_whole({path: text.getvalue()})
