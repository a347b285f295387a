"""What a run says: the main process on the terminal, and every process in RUN/logs/process-I.log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crcjax.errors import OutputError

_LOG = logging.getLogger("crcjax")


def say(line: str) -> None:
    """A line on the main process's terminal and in this process's log."""
    _LOG.info(line)


def complain(line: str) -> None:
    """An error: on the terminal of every process, and in its log."""
    _LOG.error(line)


def note(lines: str) -> None:
    """For this process's log alone."""
    _LOG.debug(lines)


def number_lines(process: int, processes: int) -> None:
    """From here on, lines begin with the index of the process if there are several, and those but the first are quiet."""
    prefix = f"[{process}] " if processes > 1 else ""
    _CONSOLE.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    _CONSOLE.setLevel(logging.INFO if process == 0 else logging.ERROR)


@contextmanager
def kept_in(run: Path, process: int = 0) -> Iterator[None]:
    """Within it, all that is said, noted or raised, and other packages' warnings, go to RUN/logs/process-I.log with the time.

    Raises OutputError if that cannot be written.
    """
    path = run / "logs" / f"process-{process}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); free space, or ask for the rights") from error
    file.setFormatter(logging.Formatter(f"%(asctime)s [{process}] %(name)s %(levelname)s %(message)s"))
    # A root logger with this handler alone would no longer show warnings on the terminal.
    others = [] if logging.root.handlers else [_Console(logging.WARNING)]
    for handler in (file, *others):
        logging.root.addHandler(handler)
    _LOG.addHandler(file)
    try:
        yield
    except BaseException as error:
        file.handle(_LOG.makeRecord(_LOG.name, logging.ERROR, "", 0, "the run ends", (), _info(error)))
        raise
    finally:
        for handler in (file, *others):
            logging.root.removeHandler(handler)
        _LOG.removeHandler(file)
        file.close()


def _info(error: BaseException) -> tuple:
    return type(error), error, error.__traceback__


class _Console(logging.Handler):
    """The terminal of the moment: tests and notebooks exchange sys.stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_CONSOLE = _Console()
_LOG.setLevel(logging.DEBUG)
_LOG.propagate = False
_LOG.addHandler(_CONSOLE)
number_lines(0, 1)
