"""A run of several processes: they start together, watch each other, and end together, with words."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from crcjax.errors import AGAIN_STATUS, DeviceMemoryError, StoppedError
from crcjax.monitor.logs import log, prefix_lines
from crcjax.parallel.cluster_env import ClusterEnvironment
from crcjax.parallel.rendezvous import LOOPBACK, Line, call_roll
from crcjax.parallel.replica_check import disagreement, local_sums

PEER_STATUS = 4  # of a process that ends because another one did
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_HEARING_S = 0.5  # between looks at the clock, and between words to process 0
_SILENT_S = 5.0  # a process that was not heard for so long is frozen, or its network is
_DELIVERY_S = 0.3  # for last words: a closed connection may lose what was not read
_BLAME_S = 5.0  # for the line to say whose end made a computation fail


class ProcessGroup:
    """This process among those of its run; by default it is alone.

    `is_main` is true for process 0, which alone writes the run directory's tables and talks on the terminal.
    """

    def __init__(self, process_index: int = 0, line: Line | None = None, stall_timeout_s: float = float("inf")):
        self.process_index, self.is_main = process_index, process_index == 0
        self._line, self._stall_timeout_s = line, stall_timeout_s
        self._asked_to_stop = False
        self._place: tuple[int, str] = (0, "starting")
        self._since = time.monotonic()
        self._heard_of: dict[int, tuple[float, int, str]] = {}
        self._sums: dict[int, dict[int, list[dict[str, int]]]] = {}
        self._finished: set[int] = set()
        self._ending = threading.Lock()  # taken for good by whoever says this process's last words
        self._comparing = threading.Lock()

    def report_progress(self, step: int, activity: str) -> None:
        """Says where this process is; one that says nothing for `stall_timeout_s` ends all, with words."""
        self._place, self._since = (step, activity), time.monotonic()

    def should_stop(self, step: int) -> bool:
        """Whether the run was asked to stop (SIGTERM or SIGUSR1, to any process) and does so after this step.

        All processes get the same answer; to be asked once a step.
        """
        if self._line is None:
            return self._asked_to_stop
        return multihost_utils.reached_preemption_sync_point(step)

    def barrier(self, name: str) -> None:
        """Until all processes are here."""
        if self._line is not None:
            multihost_utils.sync_global_devices(name)

    def maximum(self, value: float) -> float:
        """The largest of the processes' values; all call it together."""
        return float(np.max(multihost_utils.process_allgather(np.float32(value)))) if self._line else value

    def check_replicas(self, step: int, values: PyTree[Array]) -> None:
        """Has process 0 compare the copies of all devices; if they differ, all processes end soon after, with words."""
        if self._line is None:
            return
        sums = local_sums(values)
        if self.is_main:
            self._collect(0, step, sums)
        else:
            self._line.tell({"sums": sums, "step": step})

    def start_monitoring(self) -> None:
        """Starts to listen to the others and to look at the clock."""
        if self._line is not None:
            self._line.listen(self._heard)
            threading.Thread(target=self._look, daemon=True, name="watch").start()

    def finish(self) -> None:
        """Leaves together with the others, all having done their work."""
        if self._line is None:
            return
        self.report_progress(self._place[0], "finishing")
        jax.distributed.shutdown()
        self._ending.acquire(timeout=_BLAME_S)  # nobody ends any more for another's end
        self._line.tell({"finished": True})
        time.sleep(_DELIVERY_S)
        self._line.close()

    def report_failure(self, error: BaseException) -> None:
        """Tells the others that this process ends; does not return if it ends for another's end, and says whose."""
        if self._line is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(_BLAME_S)
        if not self._ending.acquire(blocking=False):
            time.sleep(60)  # the watch has spoken and is ending this process
        words = " ".join(str(error).split()) or type(error).__name__
        # One status of all, so that whoever started them sees it, whichever ends first.
        status = AGAIN_STATUS if isinstance(error, DeviceMemoryError) else PEER_STATUS
        if self.is_main:
            self._line.tell({"error": f"{self._line.names[0]} ended: {words}", "status": status})
        else:
            self._line.tell({"ended": words, "status": status})
        time.sleep(_DELIVERY_S)

    def request_stop(self) -> None:
        """As a signal does."""
        self._asked_to_stop = True

    def _heard(self, process: int, message: dict[str, Any] | None) -> None:
        assert self._line is not None
        name = self._line.names[process]
        if message is None:
            if process not in self._finished:
                self._end(f"{name} is gone without a word: it was killed, or its machine or its network failed")
        elif "finished" in message:
            self._finished.add(process)
        elif "ended" in message:
            self._end(f"{name} ended: {message['ended']}", message["status"])
        elif "error" in message:
            self._end(message["error"], message["status"])
        elif "at" in message:
            self._heard_of[process] = (time.monotonic(), *message["at"])
        elif "sums" in message:
            self._collect(process, message["step"], message["sums"])

    def _collect(self, process: int, step: int, sums: list[dict[str, int]]) -> None:
        assert self._line is not None
        with self._comparing:
            so_far = self._sums.setdefault(step, {})
            so_far[process] = sums
            if len(so_far) < len(self._line.names):
                return
            found = disagreement(self._sums.pop(step))
        if found:
            self._end(
                f"{self._line.names[found[0]]} has another {found[1]} than the other processes after step {step}: its "
                "memory, device or network is faulty; leave that machine out"
            )

    def _look(self) -> None:
        assert self._line is not None
        while True:
            time.sleep(_HEARING_S)
            idle_s = time.monotonic() - self._since
            if not self.is_main:
                self._line.tell({"at": self._place})
                if idle_s > self._stall_timeout_s + 2 * _SILENT_S:
                    self._end(f"no step was finished for {idle_s:.0f} s, and {self._line.names[0]} says nothing of it")
            elif idle_s > self._stall_timeout_s:
                self._end(f"no step was finished for {idle_s:.0f} s: {self._whereabouts()}")

    def _whereabouts(self) -> str:
        """The processes that the others wait for, as far as can be seen from here."""
        assert self._line is not None
        now = time.monotonic()
        places = {0: (now, *self._place)} | self._heard_of
        silent = [process for process, (heard, _, _) in places.items() if now - heard > _SILENT_S]
        busy = [process for process, (_, _, doing) in places.items() if doing != "computing"]
        told = []
        for process in silent or busy or sorted(places):
            heard, step, doing = places[process]
            silence = f", not heard for {now - heard:.0f} s" if process in silent else ""
            told.append(f"{self._line.names[process]} is {doing}, step {step}{silence}")
        return "; ".join(told[:8])

    def _end(self, words: str, status: int = PEER_STATUS) -> None:
        """Ends this process and, as process 0, all others, unless it has begun to end already."""
        if not self._ending.acquire(blocking=False):
            return
        assert self._line is not None
        if self.is_main:
            self._line.tell({"error": words, "status": status})
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        log.debug("the main thread is here:\n" + "".join(traceback.format_stack(frame)))
        log.error(f"crcjax: {words}; started again, the run goes on from its last checkpoint")
        time.sleep(_DELIVERY_S)
        # Not sys.exit: the main thread waits within jax, which would wait for minutes more for the others.
        os._exit(status)


@contextmanager
def process_group(
    cluster: ClusterEnvironment | None, facts: Mapping[str, str], wait_s: float, stall_timeout_s: float
) -> Iterator[ProcessGroup]:
    """Starts jax over all processes, having waited for them and compared their `facts`; alone if `cluster` is None.

    SIGTERM and SIGUSR1 then ask the run to stop after a step. An exception within is told to the other processes, which
    end too. Raises InputError, in every process: one did not come within `wait_s`, or is not of the same facts.
    """
    if cluster is None:
        group = ProcessGroup()
        with _signals(group.request_stop):
            yield group
        return
    prefix_lines(cluster.process, cluster.processes)
    line = call_roll(cluster, facts, wait_s)
    group = ProcessGroup(cluster.process, line, stall_timeout_s)
    group.start_monitoring()
    try:
        jax.distributed.initialize(
            line.service,
            cluster.processes,
            cluster.process,
            local_device_ids=cluster.gpus,
            # SLURM's own would give every process one GPU alone.
            cluster_detection_method="deactivate",
            initialization_timeout=max(1, round(wait_s)),
            coordinator_bind_address=line.service if line.service.rpartition(":")[0] in LOOPBACK else None,
        )
        # jax has SIGTERM to itself, and makes all processes agree on the step after which they stop.
        signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        yield group
    except StoppedError:
        group.finish()
        raise
    except BaseException as error:
        group.report_failure(error)
        raise
    group.finish()


@contextmanager
def _signals(ask: Any) -> Iterator[None]:
    before = {number: signal.signal(number, lambda *_: ask()) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
