"""A case on one page: prediction, uncertainty in words, heatmaps, the tiles that count most, quality and provenance.

The page is a single HTML file without scripts and without references to other files, and prints on A4.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from scipy.special import betaincinv

import crcjax
from crcjax.pictures.top_tiles import TopTile
from crcjax.validation.predictions_table import PredictionRow

# Shares of the largest possible entropy below which the page calls a prediction clear, and above which undecided.
CLEAR, UNDECIDED = 0.3, 0.7
# Vacuity above which the page says that there is little evidence.
LITTLE_EVIDENCE = 0.5
_JPEG_QUALITY = 85
_LEVEL = 0.95


@dataclass(frozen=True)
class Figure:
    """A picture of the page with its caption."""

    caption: str
    pixels: UInt8[np.ndarray, "y x 3"]

    @property
    def url(self) -> str:
        """The picture as a data URL."""
        jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(self.pixels), quality=_JPEG_QUALITY, colorsubsampling="444")
        return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()


@dataclass(frozen=True)
class SlidePage:
    """A slide's part of a case report.

    Attributes:
      row: its row of predictions.csv.
      figures: the slide and its heatmaps; empty without a prediction.
      tiles: the first tiles of every map, with their pictures.
      meaning: what the maps show, in words.
      um_per_tile: the side of these tiles in µm.
    """

    row: PredictionRow
    figures: Sequence[Figure] = ()
    tiles: Sequence[tuple[TopTile, Figure]] = ()
    meaning: str = ""
    um_per_tile: float = 0.0


def case_report(case_id: str, pages: Sequence[SlidePage], classes: Sequence[str]) -> str:
    """The HTML page of a case.

    Args:
      case_id: the case.
      pages: the parts of its slides.
      classes: the classes in the order of the probabilities.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("crcjax.pictures", ""), autoescape=True, undefined=jinja2.StrictUndefined
    )
    slides = [
        {
            "page": page,
            "row": page.row,
            "probabilities": _probabilities(page.row, classes),
            "sentences": uncertainty_sentences(page.row, classes),
            "maps": _by_map(page),
        }
        for page in pages
    ]
    return environment.get_template("case_report.html").render(
        case_id=case_id,
        slides=slides,
        synthetic=any(page.row.synthetic for page in pages),
        version=crcjax.__version__,
    )


def credible_interval(alpha: Sequence[float], index: int, level: float = _LEVEL) -> tuple[float, float]:
    """The equal-tailed interval of a class's probability under a Dirichlet distribution: its marginal is a Beta distribution."""
    of_class, of_others = alpha[index], sum(alpha) - alpha[index]
    low, high = betaincinv(of_class, of_others, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def uncertainty_sentences(row: PredictionRow, classes: Sequence[str]) -> list[str]:
    """Describes the model's uncertainty about a slide in sentences."""
    if not row.is_ok:
        return []
    order = np.argsort(row.probs)[::-1]
    first, second = (f"{classes[index]} ({row.probs[index]:.2f})" for index in order[:2])
    assert row.entropy is not None
    share = row.entropy / math.log(len(classes))
    if share < CLEAR:
        sentences = [f"The model clearly prefers {first} to {second}."]
    elif share <= UNDECIDED:
        sentences = [f"The model prefers {first}, but does not exclude {second}."]
    else:
        sentences = [f"The model is undecided: the most probable class is {first}, then {second}."]
    if row.vacuity is not None:
        amount = "little" if row.vacuity > LITTLE_EVIDENCE else "some"
        sentences.append(f"It found {amount} evidence in this slide (vacuity {row.vacuity:.2f}, from 0 to 1).")
    if row.mutual_information is not None and row.mutual_information > 0.5 * row.entropy > 0:
        sentences.append("Most of the uncertainty is the model's own: it has seen few slides like this one.")
    if row.conformal_set is not None:
        sentences.append(_set_sentence(row.conformal_set, classes))
    return sentences


def _set_sentence(conformal_set: Sequence[str], classes: Sequence[str]) -> str:
    if not conformal_set:
        return "Its conformal set is empty: the slide is unlike those of the calibration."
    if len(conformal_set) == len(classes):
        return "Its conformal set contains all classes: the calibration excludes none."
    names = " and ".join(conformal_set)
    return f"Its conformal set is {names}: the calibration excludes the other classes at its stated error."


def _probabilities(row: PredictionRow, classes: Sequence[str]) -> list[dict[str, object]]:
    """Each class with its probability and, for a Dirichlet distribution, the interval. A calibration would not fit the interval."""
    has_interval = bool(row.alpha) and not row.calibration
    return [
        {
            "name": name,
            "value": value,
            "interval": credible_interval(row.alpha, index) if has_interval else None,
            "is_call": name == row.call,
        }
        for index, (name, value) in enumerate(zip(classes, row.probs, strict=False))
    ]


def _by_map(page: SlidePage) -> dict[str, list[tuple[TopTile, Figure]]]:
    maps: dict[str, list[tuple[TopTile, Figure]]] = {}
    for tile, figure in page.tiles:
        maps.setdefault(tile.map_name, []).append((tile, figure))
    return maps
