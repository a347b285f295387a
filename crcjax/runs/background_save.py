"""A save in a background thread that is abandoned if it takes too long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from crcjax.errors import CrcjaxError


class BackgroundSave:
    """One save. It starts after the save before it and takes at most `timeout_s`; then it is abandoned.

    A thread that waits for a disk cannot be ended. An abandoned one is left alone, and `check` raises in it as soon as the
    disk answers, so that it changes nothing any more.

    Attributes:
      step: the step that is saved.
      error: why it failed; empty while it runs and if it succeeded. Valid after `wait`.
      seconds: how long it took.
    """

    def __init__(
        self,
        step: int,
        write: Callable[[BackgroundSave], None],
        on_end: Callable[[BackgroundSave], None],
        timeout_s: float,
        previous: BackgroundSave | None = None,
    ):
        self.step, self.error, self.seconds = step, "", 0.0
        self._write, self._on_end, self._timeout_s, self._previous = write, on_end, timeout_s, previous
        self._ended = threading.Event()
        self._abandoned = False
        self._writer = threading.Thread(target=self._run, name=f"write-{step}", daemon=True)
        threading.Thread(target=self._supervise, name=f"save-{step}", daemon=True).start()

    @property
    def is_ended(self) -> bool:
        """Whether it succeeded, failed or was abandoned."""
        return self._ended.is_set()

    @property
    def is_stuck(self) -> bool:
        """Whether it was abandoned and still waits for the disk, so that its copy of the state is not freed yet."""
        return self._abandoned and self._writer.is_alive()

    def wait(self) -> None:
        """Waits until it has ended, which the timeouts of this save and of the saves before it bound."""
        self._ended.wait()

    def check(self) -> None:
        """Raises TimeoutError if the save was abandoned."""
        if self._abandoned:
            raise TimeoutError("abandoned")

    def _supervise(self) -> None:
        if self._previous:
            self._previous.wait()
            # A chain of all saves of a run would never be freed.
            self._previous = None
        start = time.monotonic()
        self._writer.start()
        self._writer.join(self._timeout_s)
        self.seconds = time.monotonic() - start
        if self._writer.is_alive():
            self._abandoned = True
            self.error = f"not finished within {self._timeout_s:.0f} s, and abandoned: the disk or its network hangs"
        try:
            self._on_end(self)
        finally:
            # Its closure holds a copy of the training state.
            del self._write
            self._ended.set()

    def _run(self) -> None:
        write = self._write
        try:
            write(self)
        except CrcjaxError as error:
            self._fail(str(error))
        # Whatever a library raises here must be reported; it must not end the training.
        except Exception as error:
            self._fail(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _fail(self, reason: str) -> None:
        if not self._abandoned:
            self.error = reason
