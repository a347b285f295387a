"""A section of the analysis: its estimates and tests by id, with tables and figures for the report."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from crcjax.pages.render import Figure, Table, number
from crcjax.validation.estimate import LEVEL, Estimate, TestResult

# Blanks that do not break: an interval and its heading stay on one line.
INTERVAL = f"{LEVEL:.0%} interval".replace("%", "\u00a0%").replace(" ", "\u00a0")


@dataclass
class Section:
    """Filled by one function, and then read by the report and results.json.

    Attributes:
      id: begins the ids of its estimates.
      number, title: of its heading.
      classes: the names that replace class indices in warnings.
      sentences: read before the tables.
      messages: what a reader must know before any number of the report.
      missing: why the section is empty; the plan did not name its data.
      estimates, tests: by id, each with its label.
      tables, figures: of the report, and files of their own.
    """

    id: str
    number: str
    title: str
    classes: tuple[str, ...]
    sentences: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    missing: str = ""
    estimates: dict[str, tuple[str, Estimate]] = field(default_factory=dict)
    tests: dict[str, tuple[str, TestResult]] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)

    def add_sentences(self, *sentences: str) -> None:
        """Adds sentences before the tables."""
        self.sentences += sentences

    def estimate(self, name: str, label: str, estimate: Estimate) -> Estimate:
        """Keeps an estimate under the id SECTION.NAME; returns it with the names of classes in its warnings."""
        named = replace(estimate, warnings=tuple(self.named(warning) for warning in estimate.warnings))
        self.estimates[f"{self.id}.{name}"] = label, named
        return named

    def test(self, name: str, label: str, result: TestResult) -> TestResult:
        """Keeps a test under the id SECTION.NAME."""
        named = replace(result, warnings=tuple(self.named(warning) for warning in result.warnings))
        self.tests[f"{self.id}.{name}"] = label, named
        return named

    def has(self, name: str) -> bool:
        """Whether there is an estimate of the name."""
        return f"{self.id}.{name}" in self.estimates

    def estimate_table(
        self, name: str, title: str, ids: Iterable[str] | Mapping[str, str] | None = None, footnote: str = ""
    ) -> None:
        """Adds a table of estimates, by default of all so far; a mapping gives labels for this table."""
        names = list(ids) if ids is not None else [each.removeprefix(f"{self.id}.") for each in self.estimates]
        labels = ids if isinstance(ids, Mapping) else {}
        shown = {each: self.estimates[f"{self.id}.{each}"] for each in names}
        chosen = [(labels.get(each, label), estimate) for each, (label, estimate) in shown.items()]
        notes = _Notes()
        rows = tuple(
            (label + notes.marks(e.warnings), number(e.value), interval(e), units(e), e.method) for label, e in chosen
        )
        columns = ("", "value", INTERVAL, "n", "method")
        self.table(name, title, columns, rows, ("value", INTERVAL, "n"), " ".join(filter(None, (footnote, notes.text))))

    def estimate_matrix(
        self,
        name: str,
        title: str,
        heading: str,
        rows: Mapping[str, str],
        columns: Mapping[str, str],
        footnote: str = "",
    ) -> None:
        """Adds a table whose cells are the estimates ROW COLUMN, where a row's `{}` is replaced by the column's text.

        Args:
          name: of the table.
          title: above it.
          heading: of the first column.
          rows: by label, the id with `{}` in it.
          columns: by label, the text for `{}`.
          footnote: below it, before the methods and warnings.
        """
        notes, methods, cells = _Notes(), dict[str, None](), []
        for label, pattern in rows.items():
            row = [label]
            for part in columns.values():
                stored = self.estimates.get(f"{self.id}.{pattern.replace('{}', part)}")
                if stored is None:
                    row.append("")
                    continue
                row.append(f"{value_and_interval(stored[1])}{notes.marks(stored[1].warnings)}\nn = {units(stored[1])}")
                methods[_without_effective_n(stored[1].method)] = None
            cells.append(row)
        words = f"Methods: {'; '.join(methods)}."
        self.table(
            name,
            title,
            (heading, *columns),
            cells,
            tuple(columns),
            " ".join(filter(None, (footnote, words, notes.text))),
        )

    def test_table(self, name: str, title: str, ids: Mapping[str, str] | None = None, footnote: str = "") -> None:
        """Adds a table of tests, by default of all; a mapping names some, with labels for this table."""
        notes = _Notes()
        chosen = list(self.tests.values())
        if ids is not None:
            chosen = [(label, self.tests[f"{self.id}.{each}"][1]) for each, label in ids.items()]
        rows = tuple(
            (
                label + notes.marks(t.warnings),
                number(t.statistic),
                "" if t.df is None else str(t.df),
                p_text(t.p_value),
                t.method,
            )
            for label, t in chosen
        )
        columns = ("", "statistic", "df", "p", "method")
        self.table(name, title, columns, rows, ("statistic", "df", "p"), " ".join(filter(None, (footnote, notes.text))))

    def table(
        self,
        name: str,
        title: str,
        columns: Sequence[str],
        rows: Iterable[Sequence[str]],
        numeric: Sequence[str] = (),
        footnote: str = "",
    ) -> None:
        """Adds a table of texts."""
        cells = tuple(tuple(row) for row in rows)
        self.tables.append(Table(f"{self.id}_{name}", title, tuple(columns), cells, tuple(numeric), footnote))

    def named(self, text: str) -> str:
        """A text with the names of classes in place of their indices."""

        def name(match: re.Match[str]) -> str:
            place = int(match[1])
            return self.classes[place] if place < len(self.classes) else match[0]

        return re.sub(r"\bclass (\d+)\b", name, text)


def _without_effective_n(method: str) -> str:
    return method.partition(", effective n")[0]


class _Notes:
    """Numbered notes below a table; equal ones share a number."""

    def __init__(self) -> None:
        self._notes: dict[str, int] = {}

    def marks(self, warnings: Iterable[str]) -> str:
        """The marks of a row: [1] [2]."""
        numbers = [self._notes.setdefault(warning, len(self._notes) + 1) for warning in warnings]
        return "".join(f" [{each}]" for each in numbers)

    @property
    def text(self) -> str:
        return "; ".join(f"[{each}] {warning}" for warning, each in self._notes.items())


def id_part(text: str) -> str:
    """A name of the data as a part of an id, in which dots are %2E: parts are separated by dots."""
    return text.replace("%", "%25").replace(".", "%2E")


def interval(estimate: Estimate) -> str:
    """An interval on one line; empty for a description that has none."""
    if estimate.ci_low != estimate.ci_low:
        return "—"
    return f"{number(estimate.ci_low)} to {number(estimate.ci_high)}"


def value_and_interval(estimate: Estimate) -> str:
    """A value with its interval, on one line."""
    if estimate.value != estimate.value:
        return "not determined"
    return f"{number(estimate.value)} ({interval(estimate)})"


def units(estimate: Estimate) -> str:
    """The number of units, of clusters where several belong to one, and of excluded units."""
    text = f"{estimate.n:,}"
    if estimate.n_clusters is not None:
        text += f" of {estimate.n_clusters:,}"
    return text + (f", {estimate.n_excluded:,} excl." if estimate.n_excluded else "")


def p_text(p_value: float) -> str:
    """A p-value with three digits."""
    if p_value != p_value:
        return "not determined"
    return "< 0.001" if p_value < 0.001 else f"{p_value:.3f}"
