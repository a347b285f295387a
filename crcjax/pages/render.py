"""Renders a page that needs nothing beside itself: no network, no further file."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jinja2

import crcjax

RESEARCH_USE = "Research use only. Not a medical device; no clinical claim."


@dataclass(frozen=True)
class Table:
    """A table of texts.

    Attributes:
      id: names its file and its place on the page.
      title: shown above it; empty for none.
      columns: the header.
      rows: the cells.
      numeric: the columns that are aligned to the right and never broken.
      footnote: shown below it.
    """

    id: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: tuple[str, ...] = ()
    footnote: str = ""


@dataclass(frozen=True)
class Figure:
    """A figure as SVG; `description` says in words what it shows, for readers who cannot see it."""

    id: str
    title: str
    svg: str
    description: str
    caption: str = ""
    wide: bool = False

    @property
    def data_uri(self) -> str:
        """The figure as the source of an image; ids within several figures of a page then never clash."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg.encode()).decode()}"


def render_page(package: str, template: str, values: Mapping[str, Any], *, title: str, stamp: str = "") -> str:
    """Renders a template that extends `page.html`.

    Args:
      package: the package that holds the template.
      template: the file.
      values: the template's variables.
      title: the page's title and first heading.
      stamp: shown at the head and the end, and on every printed page: "SYNTHETIC DATA", "DRAFT".
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(package, ""), jinja2.PackageLoader("crcjax.pages", "")]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "zip": lambda columns, row: zip(columns, row, strict=True)}
    return environment.get_template(template).render(
        **values, title=title, stamp=stamp, version=crcjax.__version__, research_use=RESEARCH_USE
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number as text; `not determined` for None and NaN."""
    if value is None or value != value:
        return "not determined"
    if abs(value) >= 10000 or (value and abs(value) < 10**-digits):
        return f"{value:.2g}" if abs(value) < 1 else f"{value:.5g}"
    return f"{value:.{digits}f}"
