"""Progress bars with the time remaining, on a terminal or in a notebook."""

from __future__ import annotations

from importlib.util import find_spec

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


def progress_bar(console: Console | None = None, *texts: str, quiet: bool = False) -> Progress:
    """A progress bar: description, bar, count, time elapsed and time remaining.

    Args:
      console: where it is shown; by default standard output, or the notebook if it has ipywidgets.
      texts: format strings of the task, in place of the count.
      quiet: shows nothing unless the console is a terminal or a notebook.
    """
    console = console or Console()
    middle: list[ProgressColumn] = [TextColumn(text) for text in texts] or [MofNCompleteColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *middle, TimeElapsedColumn(), TimeRemainingColumn())
    # Without ipywidgets, rich would print a warning into the notebook instead of a bar.
    in_notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    hidden = (quiet or console.is_jupyter) and not (console.is_terminal or in_notebook)
    return Progress(*columns, console=console, disable=hidden)
