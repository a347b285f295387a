"""Tables and pictures that a notebook displays."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from crcjax.environment import require_extra
from crcjax.errors import writing

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

# Rows of the HTML table.
_DISPLAYED_ROWS = 20


class Table(Sequence[Mapping[str, Any]]):
    """Rows with named columns: a sequence of dictionaries that a notebook displays as a table and pandas can read."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        self.rows = [dict(row) for row in rows]

    @property
    def columns(self) -> list[str]:
        """The names of the columns, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def column(self, name: str) -> list[Any]:
        """The values of one column; None where a row lacks it."""
        return [row.get(name) for row in self.rows]

    def to_pandas(self) -> pd.DataFrame:
        """Returns the rows as a DataFrame. Raises InputError without the extra `notebook`."""
        pandas = require_extra("pandas", "notebook", "to_pandas")
        return pandas.DataFrame(self.rows, columns=self.columns)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Table: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Table:
        return Table(self.rows[index]) if isinstance(index, slice) else self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return f"Table({len(self)} rows: {', '.join(self.columns)})"

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in self.columns)
        body = "".join(
            "<tr>" + "".join(f"<td>{_text(row.get(name))}</td>" for name in self.columns) + "</tr>"
            for row in self.rows[:_DISPLAYED_ROWS]
        )
        hidden = len(self) - _DISPLAYED_ROWS
        remark = f"<p>and {hidden} more rows; to_pandas() returns all</p>" if hidden > 0 else ""
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{remark}"


class Picture:
    """A PNG picture that a notebook displays."""

    def __init__(self, png: bytes, title: str):
        self.png, self.title = png, title

    @classmethod
    def of_figure(cls, figure: Figure, title: str) -> Picture:
        """Renders a matplotlib figure."""
        from io import BytesIO

        png = BytesIO()
        figure.savefig(png, format="png")
        return cls(png.getvalue(), title)

    def save(self, path: str | Path) -> Path:
        """Writes the PNG file. Raises OutputError."""
        path = Path(path)
        with writing(path, "choose another path"):
            path.write_bytes(self.png)
        return path

    def __repr__(self) -> str:
        return f"Picture({self.title!r})"

    def _repr_png_(self) -> bytes:
        return self.png


def heading(text: str) -> str:
    """An HTML line above a table."""
    return f"<p><b>{html.escape(text)}</b></p>"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return html.escape(f"{value:.4g}" if isinstance(value, float) else str(value))
