"""Synchronised start, liveness monitoring and coordinated shutdown, with an error message, of a run's processes."""

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

from crcjax.errors import StoppedError, exit_status
from crcjax.monitor.logs import log, prefix_lines
from crcjax.parallel.cluster_env import ClusterEnvironment
from crcjax.parallel.rendezvous import ControlChannel, connect_processes, rendezvous_secret
from crcjax.parallel.replica_check import first_difference, local_checksums

# The exit status of a process that ends because another one failed.
PEER_STATUS = 4
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_HEARTBEAT_S = 0.5
# A process without a heartbeat for this long is frozen, or its network is.
_SILENCE_S = 5.0
# Time for a last message to be read: closing a connection may discard unread data.
_DELIVERY_S = 0.3
# Time for the control channel to name the process whose failure made a computation fail here.
_ATTRIBUTION_S = 5.0
_SHOWN_PROCESSES = 8


class ProcessGroup:
    """This process and its connection to the run's other processes; by default there are none.

    `is_main` is true for process 0, which alone writes the run directory's tables and logs progress on the terminal.
    """

    def __init__(
        self, process_index: int = 0, channel: ControlChannel | None = None, stall_timeout_s: float = float("inf")
    ):
        self.process_index, self.is_main = process_index, process_index == 0
        self._channel, self._stall_timeout_s = channel, stall_timeout_s
        self._stop_requested = False
        self._progress: tuple[int, str] = (0, "starting")
        self._progress_time = time.monotonic()
        # By process: when its last heartbeat came, and its step and activity then.
        self._heartbeats: dict[int, tuple[float, int, str]] = {}
        # By step and process: the checksums of each of its devices.
        self._checksums: dict[int, dict[int, list[dict[str, int]]]] = {}
        self._finished: set[int] = set()
        # Acquired once, and never released, by the thread that reports why this process ends.
        self._ending = threading.Lock()
        self._comparing = threading.Lock()

    def report_progress(self, step: int, activity: str) -> None:
        """Records what this process is doing; all processes end if one reports nothing for `stall_timeout_s`."""
        self._progress, self._progress_time = (step, activity), time.monotonic()

    def should_stop(self, step: int) -> bool:
        """Whether the run stops after this step because any process received SIGTERM or SIGUSR1.

        Every process calls this once a step and gets the same answer.
        """
        if self._channel is None:
            return self._stop_requested
        return multihost_utils.reached_preemption_sync_point(step)

    def barrier(self, name: str) -> None:
        """Waits until all processes have reached the barrier of this name."""
        if self._channel is not None:
            multihost_utils.sync_global_devices(name)

    def maximum(self, value: float) -> float:
        """The largest of the processes' values; every process must call it."""
        if not self._channel:
            return value
        with jax.transfer_guard("allow"):  # JAX converts to device arrays and back implicitly
            return float(np.max(multihost_utils.process_allgather(np.float32(value))))

    def check_replicas(self, step: int, values: PyTree[Array]) -> None:
        """Sends checksums of this process's copies to process 0, which ends all processes soon after if any differ."""
        if self._channel is None:
            return
        checksums = local_checksums(values)
        if self.is_main:
            self._collect_checksums(0, step, checksums)
        else:
            self._channel.send({"checksums": checksums, "step": step})

    def start_monitoring(self) -> None:
        """Starts the threads that read the control channel, send heartbeats and detect stalls."""
        if self._channel is not None:
            self._channel.subscribe(self._on_message)
            threading.Thread(target=self._monitor, daemon=True, name="monitor").start()

    def finish(self) -> None:
        """Waits for all processes to finish their work, then disconnects."""
        if self._channel is None:
            return
        self.report_progress(self._progress[0], "finishing")
        jax.distributed.shutdown()
        # From here on the end of another process does not end this one.
        self._ending.acquire(timeout=_ATTRIBUTION_S)
        self._channel.send({"finished": True})
        time.sleep(_DELIVERY_S)
        self._channel.close()

    def report_failure(self, error: BaseException) -> None:
        """Sends the error of this process to the others.

        If the failure of another process caused it, this process ends here with the other's error.
        """
        if self._channel is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            time.sleep(_ATTRIBUTION_S)
        if not self._ending.acquire(blocking=False):
            # Another thread has reported the cause and is ending this process.
            time.sleep(60)
        reason = " ".join(str(error).split()) or type(error).__name__
        # All processes end with one status, so that the launcher sees the same whichever ends first, and a supervisor does not
        # take a wrong config or a full disk of one process for a failure of its machine.
        status = exit_status(error, otherwise=PEER_STATUS)
        if self.is_main:
            self._channel.send({"error": self._failure(0, reason), "status": status})
        else:
            self._channel.send({"failed": reason, "status": status})
        time.sleep(_DELIVERY_S)

    def request_stop(self) -> None:
        """Stops the run after its current step, as a signal does."""
        self._stop_requested = True

    def interrupt(self) -> None:
        """Handles Ctrl-C: the run stops after the step; before the first step, or if it comes again, it stops at once.

        Raises KeyboardInterrupt to stop at once.
        """
        before_first_step = self._progress[0] == 0
        if before_first_step or self._stop_requested:
            raise KeyboardInterrupt
        self.request_stop()

    def _on_message(self, process: int, message: dict[str, Any] | None) -> None:
        if message is None:
            if process not in self._finished:
                self._end(f"{self._name(process)} was lost: it was killed, or its machine or its network failed")
        elif "finished" in message:
            self._finished.add(process)
        elif "failed" in message:
            self._end(self._failure(process, message["failed"]), message["status"])
        elif "error" in message:
            self._end(message["error"], message["status"])
        elif "progress" in message:
            self._heartbeats[process] = (time.monotonic(), *message["progress"])
        elif "checksums" in message:
            self._collect_checksums(process, message["step"], message["checksums"])

    def _collect_checksums(self, process: int, step: int, checksums: list[dict[str, int]]) -> None:
        assert self._channel is not None
        with self._comparing:
            by_process = self._checksums.setdefault(step, {})
            by_process[process] = checksums
            if len(by_process) < len(self._channel.names):
                return
            difference = first_difference(self._checksums.pop(step))
        if difference:
            differing_process, leaf = difference
            self._end(
                f"{self._name(differing_process)} has another {leaf} than the other processes after step {step}: its "
                "memory, device or network is faulty; leave that machine out"
            )

    def _monitor(self) -> None:
        assert self._channel is not None
        while True:
            time.sleep(_HEARTBEAT_S)
            idle_s = time.monotonic() - self._progress_time
            if not self.is_main:
                self._channel.send({"progress": self._progress})
                # Process 0 knows more of the cause, and reports first if it can.
                if idle_s > self._stall_timeout_s + 2 * _SILENCE_S:
                    self._end(f"no step was finished for {idle_s:.0f} s, and {self._name(0)} does not report why")
            elif idle_s > self._stall_timeout_s:
                self._end(f"no step was finished for {idle_s:.0f} s: {self._stragglers()}")

    def _stragglers(self) -> str:
        """The processes that the others wait for: the silent ones, else those not computing, else all."""
        now = time.monotonic()
        progress = {0: (now, *self._progress)} | self._heartbeats
        silent = [process for process, (heartbeat, _, _) in progress.items() if now - heartbeat > _SILENCE_S]
        busy = [process for process, (_, _, activity) in progress.items() if activity != "computing"]
        descriptions = []
        for process in (silent or busy or sorted(progress))[:_SHOWN_PROCESSES]:
            heartbeat, step, activity = progress[process]
            silence = f", no heartbeat for {now - heartbeat:.0f} s" if process in silent else ""
            descriptions.append(f"{self._name(process)} is {activity}, step {step}{silence}")
        return "; ".join(descriptions)

    def _end(self, reason: str, status: int = PEER_STATUS) -> None:
        """Ends this process, and from process 0 all others, unless this process is ending already."""
        if not self._ending.acquire(blocking=False):
            return
        assert self._channel is not None
        if self.is_main:
            self._channel.send({"error": reason, "status": status})
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        log.debug("stack of the main thread:\n" + "".join(traceback.format_stack(frame)))
        log.error(f"crcjax: {reason}; the same command resumes from the last checkpoint")
        time.sleep(_DELIVERY_S)
        # Not sys.exit: the main thread waits inside jax, which would wait for minutes more for the others.
        os._exit(status)

    def _failure(self, process: int, reason: str) -> str:
        return f"{self._name(process)} failed: {reason}; see its log in RUN/logs/process-{process}.log"

    def _name(self, process: int) -> str:
        assert self._channel is not None
        return self._channel.names[process]


@contextmanager
def process_group(
    cluster: ClusterEnvironment | None, fingerprint: Mapping[str, str], wait_s: float, stall_timeout_s: float
) -> Iterator[ProcessGroup]:
    """Starts jax over all processes, once they have connected and their fingerprints agree.

    Within the block, SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) make `should_stop` true. An exception that leaves the block is sent to the other
    processes, which end too.

    Args:
      cluster: this process's place in the run; None for a single process.
      fingerprint: values by name that must be equal in all processes.
      wait_s: how long the processes wait for each other.
      stall_timeout_s: how long a process may report no progress.

    Raises InputError, in every process: one did not connect within `wait_s`, or differs in its fingerprint or secret.
    """
    if cluster is None:
        group = ProcessGroup()
        with _signal_handlers(group):
            yield group
        return
    prefix_lines(cluster.process_index, cluster.process_count)
    channel = connect_processes(cluster, fingerprint, wait_s, rendezvous_secret(os.environ))
    group = ProcessGroup(cluster.process_index, channel, stall_timeout_s)
    group.start_monitoring()
    try:
        with channel.jax_port_reservation:
            jax.distributed.initialize(
                channel.jax_address,
                cluster.process_count,
                cluster.process_index,
                local_device_ids=cluster.gpu_indices,
                # jax's own detection of SLURM would give every process one GPU.
                cluster_detection_method="deactivate",
                initialization_timeout=max(1, round(wait_s)),
                coordinator_bind_address=channel.jax_bind_address,
            )
        if jax.default_backend() == "cpu":
            # On CPUs jax 0.10 finds a program of all processes in the cache in process 0 alone. The others would compile it
            # while process 0 waits for them, and Gloo gives up after 30 seconds.
            jax.config.update("jax_enable_compilation_cache", False)
        # jax handles SIGTERM, and makes all processes agree on the step after which they stop.
        for number in (signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        yield group
    except StoppedError:
        group.finish()
        raise
    except BaseException as error:
        group.report_failure(error)
        raise
    group.finish()


@contextmanager
def _signal_handlers(group: ProcessGroup) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda *_: group.request_stop()) for number in _STOP_SIGNALS}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: group.interrupt())
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
