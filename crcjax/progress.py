"""Progress bars with the time remaining, on a terminal or in a notebook."""

from __future__ import annotations

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
      console: where it is shown; by default standard output, or the notebook.
      texts: format strings of the task, in place of the count.
      quiet: shows nothing unless the console is a terminal or a notebook.
    """
    console = console or Console()
    middle: list[ProgressColumn] = [TextColumn(text) for text in texts] or [MofNCompleteColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *middle, TimeElapsedColumn(), TimeRemainingColumn())
    hidden = quiet and not (console.is_terminal or console.is_jupyter)
    return Progress(*columns, console=console, disable=hidden)
