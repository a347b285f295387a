"""Logging of a run: process 0 to the terminal, every process to RUN/logs/process-I.log.

`log` is the logger of the whole package. Its levels:

* info: progress; the terminal of process 0 and the log file.
* error: the terminal of every process and the log file.
* debug: the log file alone.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crcjax.errors import writing

log = logging.getLogger("crcjax")


def prefix_lines(process_index: int, process_count: int) -> None:
    """Prefixes each line on the terminal with the process index if there are several, and limits all but process 0 to errors."""
    prefix = f"[{process_index}] " if process_count > 1 else ""
    _TERMINAL.setFormatter(logging.Formatter(f"{prefix}%(message)s"))
    _TERMINAL.setLevel(logging.INFO if process_index == 0 else logging.ERROR)


@contextmanager
def log_to_run(run: Path, process_index: int = 0) -> Iterator[None]:
    """Writes log records, other packages' warnings and the exception that ends the block to RUN/logs/process-I.log.

    Raises OutputError if that file cannot be written.
    """
    path = run / "logs" / f"process-{process_index}.log"
    with writing(path, "choose another --workdir"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file_handler = logging.FileHandler(path, encoding="utf-8")
    file_handler.setFormatter(logging.Formatter(f"%(asctime)s [{process_index}] %(name)s %(levelname)s %(message)s"))
    # Without a handler of its own, the root logger shows warnings on the terminal; with the file's alone it would not.
    warning_handlers = [] if logging.root.handlers else [_TerminalHandler(logging.WARNING)]
    for handler in (file_handler, *warning_handlers):
        logging.root.addHandler(handler)
    log.addHandler(file_handler)
    try:
        yield
    except BaseException as error:
        exc_info = (type(error), error, error.__traceback__)
        file_handler.handle(log.makeRecord(log.name, logging.ERROR, "", 0, "the run ends", (), exc_info))
        raise
    finally:
        for handler in (file_handler, *warning_handlers):
            logging.root.removeHandler(handler)
        log.removeHandler(file_handler)
        file_handler.close()


def log_stacks() -> None:
    """Writes what every thread of this process is doing to the log file."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    for ident, frame in sys._current_frames().items():
        log.debug(f"stack of the thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame)))


class _TerminalHandler(logging.Handler):
    """Prints to the current sys.stderr, which tests and notebooks replace."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr, flush=True)


_TERMINAL = _TerminalHandler()
log.setLevel(logging.DEBUG)
log.propagate = False
log.addHandler(_TERMINAL)
prefix_lines(0, 1)
