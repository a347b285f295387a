"""The child processes of the service: API replicas and workers, which are started again when they die."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from crcjax.monitor.logs import log
from crcjax.serve.queue import Queue

# The status of a process that cannot use its configuration: starting it again would not help.
UNUSABLE = 2
_POLL_S = 0.2
# The delay before a process that died is started again; it doubles while it dies within a minute of its start.
_FIRST_DELAY_S, _LONGEST_DELAY_S, _HEALTHY_S = 0.5, 60.0, 60.0


class Processes:
    """Processes that are started again when they die; a context manager, which stops them at the end.

    Args:
      queue: learns which workers died.
      slots: the places of the processes.
      drain_s: seconds that workers get to end their jobs.
      on_unusable: called when a process cannot use its configuration or bundle.

    Attributes:
      failed: whether that happened.
    """

    def __init__(self, queue: Queue, slots: Sequence[Slot], drain_s: float, on_unusable: Callable[[], None]):
        self._queue, self._slots, self._drain_s, self._on_unusable = queue, slots, drain_s, on_unusable
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="processes", daemon=True)
        self.failed = False

    def __enter__(self) -> Processes:
        # The state folder's earlier workers are dead: they end with their service.
        for worker in self._queue.workers():
            self._queue.worker_died(worker.name)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping.set()
        self._thread.join()
        for slot in self._slots:
            slot.terminate()
        for slot in self._slots:
            slot.wait(self._drain_s + 10)
            self._queue.worker_died(slot.name)

    def _watch(self) -> None:
        while not self._stopping.wait(_POLL_S):
            for slot in self._slots:
                try:
                    self._look_after(slot)
                except Exception as error:
                    # Such as a full disk; the next look may succeed.
                    log.error(f"{slot.name}: {error}")

    def _look_after(self, slot: Slot) -> None:
        if slot.process is None:
            if time.monotonic() >= slot.start_at:
                slot.start()
            return
        status = slot.process.poll()
        if status is None:
            return
        self._queue.worker_died(slot.name)
        slot.ended()
        if status == UNUSABLE:
            self.failed = True
            self._stopping.set()
            self._on_unusable()
            return
        log.error(f"{slot.name} ended with status {status}; it is started again in {slot.delay_s:g} s")


class Slot:
    """The place of one process.

    Args:
      name: of the place; each process has a name of its own that begins with it.
      command: the command line of the process of a name.
      environment: variables beside those of this process.
      descriptors: open files that the process inherits.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[str], list[str]],
        environment: Mapping[str, str],
        descriptors: Sequence[int] = (),
    ):
        self._place, self.name = name, name
        self._command, self._environment, self._descriptors = command, environment, descriptors
        self.process: subprocess.Popen | None = None
        self.start_at, self.delay_s, self._started = 0.0, _FIRST_DELAY_S, 0.0

    def start(self) -> None:
        """Starts the process; its standard input stays open as long as this process lives."""
        # A name of its own: the one before may not have ended yet.
        self.name = f"{self._place}-{secrets.token_hex(3)}"
        # A session of its own: Ctrl-C on the terminal is for the service, which then drains the workers.
        self.process = subprocess.Popen(
            self._command(self.name),
            stdin=subprocess.PIPE,
            start_new_session=True,
            env=os.environ | self._environment,
            pass_fds=self._descriptors,
        )
        self._started = time.monotonic()

    def ended(self) -> None:
        """Plans the next start."""
        if time.monotonic() - self._started > _HEALTHY_S:
            self.delay_s = _FIRST_DELAY_S
        else:
            self.delay_s = min(_LONGEST_DELAY_S, self.delay_s * 2)
        self._close()
        self.start_at = time.monotonic() + self.delay_s

    def terminate(self) -> None:
        """Asks the process to end."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> None:
        """Waits for the end, and kills the process if it takes longer."""
        if self.process is None:
            return
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._close()

    def _close(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        self.process = None
