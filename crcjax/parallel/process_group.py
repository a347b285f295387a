"""Synchronised start, liveness monitoring and coordinated shutdown, with an error message, of a run's processes."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

from crcjax.errors import PEER_STATUS, OutputError, StoppedError, exit_status
from crcjax.monitor.event_log import EVENTS, EventLog
from crcjax.monitor.heartbeat import HeartbeatWriter, read_heartbeats
from crcjax.monitor.logs import log, log_stacks, prefix_lines
from crcjax.monitor.stragglers import stragglers
from crcjax.parallel.cluster_env import ClusterEnvironment, machine_name
from crcjax.parallel.device_probe import DeviceProbe
from crcjax.parallel.liveness import FAILED, LOST, Fault, Liveness
from crcjax.parallel.preemption_notice import PreemptionNotice
from crcjax.parallel.rendezvous import ControlChannel, connect_processes, rendezvous_secret
from crcjax.parallel.replica_check import first_difference, local_checksums

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_HEARTBEAT_S = 0.5
# A monitoring thread that comes this much too late was stopped with its process, and could not hear the others.
_SUSPENDED_S = 2.0
# Time for a last message to be read: closing a connection may discard unread data.
_DELIVERY_S = 0.3
# Time for the control channel to name the process whose failure made a computation fail here.
_ATTRIBUTION_S = 5.0
# How often process 0 looks for stragglers, and how often in series one must be slow to be named.
_STRAGGLER_CHECK_S, _STRAGGLER_CHECKS = 10.0, 3
# Beyond the timeout of a standstill, the interpreter itself does not answer: its lock is held.
_WATCHDOG_S, _WATCHDOG_AFTER_S = 10.0, 60.0
_LONGEST_WATCHDOG_S = 1e6
_STDERR = 2
# The longest time that an event holds up the end of a process; the disk may hang.
_EVENT_WAIT_S = 1.0


class ProcessGroup:
    """This process and its connection to the run's other processes; by default there are none.

    `is_main` is true for process 0, which alone writes the run directory's tables and logs progress on the terminal.
    """

    def __init__(
        self,
        process_index: int = 0,
        channel: ControlChannel | None = None,
        stall_timeout_s: float = float("inf"),
        peer_timeout_s: float = float("inf"),
    ):
        self.process_index, self.is_main = process_index, process_index == 0
        self._channel, self._stall_timeout_s = channel, stall_timeout_s
        self._stop_requested = False
        hosts = channel.hosts if channel else [machine_name(os.environ)]
        names = channel.names if channel else [f"process 0 ({hosts[0]})"]
        self._hosts, self._names = hosts, names
        self.heartbeat = HeartbeatWriter(process_index, len(names), hosts[process_index])
        self._liveness = Liveness(names, process_index, peer_timeout_s, stall_timeout_s, time.monotonic())
        # The run whose events and heartbeats this process writes.
        self._run: Path | None = None
        # By step and process: the checksums of each of its devices.
        self._checksums: dict[int, dict[int, list[dict[str, int]]]] = {}
        self._finished: set[int] = set()
        self._probe = DeviceProbe()
        # Acquired once, and never released, by the thread that reports why this process ends.
        self._ending = threading.Lock()
        self._monitoring_ended = threading.Event()
        self._comparing = threading.Lock()

    def start_heartbeats(self, runs: Iterable[Path]) -> None:
        """Starts to write heartbeats to these run directories, and the faults of processes to the first one's events."""
        paths = list(runs)
        self._run = paths[0]
        self.heartbeat.open(paths)

    @property
    def local_rank(self) -> int:
        """The number of processes of the run on this machine before this one."""
        return self._hosts[: self.process_index].count(self._hosts[self.process_index])

    def report_progress(self, step: int, phase: str) -> None:
        """Records what this process is doing; the run ends if a process reports nothing for `stall_timeout_s`."""
        self.heartbeat.report(step, phase)

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

    def probe_devices(self) -> None:
        """Measures now and then how fast the devices of this process are, so that a straggler is known.

        Call it between steps, when the devices are idle. A single process has no peers to be compared with.
        """
        if self._channel is not None and (seconds := self._probe()) is not None:
            self.heartbeat.probed(seconds)

    def start_monitoring(self) -> None:
        """Starts the threads that read the control channel, send heartbeats and detect lost processes and stalls."""
        if self._channel is not None:
            self._channel.subscribe(self._on_message)
        threading.Thread(target=self._monitor, daemon=True, name="monitor").start()

    def stop_monitoring(self) -> None:
        """From here on nothing ends this process."""
        self._ending.acquire(timeout=_ATTRIBUTION_S)
        self._monitoring_ended.set()
        faulthandler.cancel_dump_traceback_later()

    def finish(self) -> None:
        """Waits for all processes to finish their work, then disconnects."""
        if self._channel is None:
            return
        self.report_progress(self.heartbeat.step, "finishing")
        jax.distributed.shutdown()
        self.stop_monitoring()
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
            failure = f"{self._names[0]} failed: {reason}; see its log in RUN/logs/process-0.log"
            self._channel.send({"error": failure, "status": status})
            self._record_fault(Fault(FAILED, failure, (0,)), status)
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
        before_first_step = self.heartbeat.step == 0
        if before_first_step or self._stop_requested:
            raise KeyboardInterrupt
        self.request_stop()

    def _on_message(self, process: int, message: dict[str, Any] | None) -> None:
        if message is None:
            if process not in self._finished:
                reason = f"{self._names[process]} was lost: it was killed, or its machine or its network failed"
                self._end(reason, fault=Fault(LOST, reason, (process,)))
        elif "finished" in message:
            self._finished.add(process)
            self._liveness.finished(process)
        elif "failed" in message:
            self._end_by_failure(process, message["failed"], message["status"])
        elif "error" in message:
            self._end(message["error"], message["status"])
        elif "progress" in message:
            step, phase = message["progress"]
            self._liveness.heard(process, step, phase, time.monotonic())
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
            process, leaf = difference
            reason = (
                f"{self._names[process]} has another {leaf} than the other processes after step {step}: its memory, device or "
                "network is faulty; leave that machine out"
            )
            self._end(reason, fault=Fault("replica_differs", reason, (process,)))

    def _monitor(self) -> None:
        """Sends heartbeats and ends this process if another one is lost or the run stands still. Runs in a thread."""
        before = watchdog_time = straggler_time = time.monotonic()
        slow: Counter[int] = Counter()
        self._arm_watchdog()
        while not self._monitoring_ended.wait(_HEARTBEAT_S):
            now = time.monotonic()
            late_s, before = now - before - _HEARTBEAT_S, now
            if late_s > _SUSPENDED_S:
                self._liveness.forgive(late_s)
                self.heartbeat.forgive(late_s)
            step, phase, idle_s = self.heartbeat.step, self.heartbeat.phase, self.heartbeat.phase_s
            if self._channel:
                self._channel.send({"progress": (step, phase)})
            if fault := self._liveness.fault(step, phase, idle_s, now):
                self._end(fault.reason, fault=fault)
            if now - watchdog_time > _WATCHDOG_S:
                watchdog_time = now
                self._arm_watchdog()
            if self.is_main and self._run and now - straggler_time > _STRAGGLER_CHECK_S:
                straggler_time = now
                slow = self._name_stragglers(slow)

    def _arm_watchdog(self) -> None:
        """Prints all stacks and ends this process if the interpreter does not answer: the monitor cannot run then."""
        timeout_s = max(self._stall_timeout_s, _WATCHDOG_S) + _WATCHDOG_AFTER_S
        if timeout_s < _LONGEST_WATCHDOG_S and not self._ending.locked():
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=_STDERR)

    def _name_stragglers(self, slow: Counter[int]) -> Counter[int]:
        """Logs the processes that are stragglers for the third time in series; returns how often each one was."""
        assert self._run
        current = {straggler.process: straggler for straggler in stragglers(read_heartbeats(self._run))}
        slow = Counter({process: slow[process] + 1 for process in current})
        for process, straggler in current.items():
            if slow[process] == _STRAGGLER_CHECKS:
                log.warning(str(straggler))
                self._record_event("straggler", reason=str(straggler), processes=[process], hosts=[straggler.host])
        return slow

    def _end_by_failure(self, process: int, reason: str, status: int) -> None:
        failure = f"{self._names[process]} failed: {reason}; see its log in RUN/logs/process-{process}.log"
        self._end(failure, status, Fault(FAILED, failure, (process,)))

    def _end(self, reason: str, status: int = PEER_STATUS, fault: Fault | None = None) -> None:
        """Ends this process, and from process 0 all others, unless this process is ending already.

        The fault becomes an event if this process is the one to record it.
        """
        if not self._ending.acquire(blocking=False):
            return
        if self._channel and self.is_main:
            self._channel.send({"error": reason, "status": status})
        log_stacks()
        log.error(f"crcjax: {reason}; the same command resumes from the last checkpoint")
        # Of several survivors of process 0, the first one records it.
        if fault and (self.is_main or (self.process_index == 1 and 0 in fault.processes)):
            self._record_fault(fault, status)
        self.heartbeat.close(reason)
        time.sleep(_DELIVERY_S)
        # Not sys.exit: the main thread waits inside jax, which would wait for minutes more for the others.
        os._exit(status)

    def _record_fault(self, fault: Fault, status: int) -> None:
        hosts = [self._hosts[process] for process in fault.processes]
        self._record_event(fault.kind, reason=fault.reason, processes=list(fault.processes), hosts=hosts, status=status)

    def _record_event(self, kind: str, **facts: Any) -> None:
        """Adds an event to the run's events.jsonl, in a thread: the disk may be full, or hang."""
        if not self._run:
            return
        events = EventLog(self._run / EVENTS)

        def record() -> None:
            with suppress(OutputError):
                events.append(kind, **facts)

        thread = threading.Thread(target=record, daemon=True, name="event")
        thread.start()
        thread.join(_EVENT_WAIT_S)


@contextmanager
def process_group(
    cluster: ClusterEnvironment | None,
    fingerprint: Mapping[str, str],
    wait_s: float,
    stall_timeout_s: float,
    peer_timeout_s: float = 10.0,
    preemption_notice: str = "",
) -> Iterator[ProcessGroup]:
    """Starts jax over all processes, once they have connected and their fingerprints agree.

    Within the block, SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) make `should_stop` true. An exception that leaves the block is sent to the other
    processes, which end too.

    Args:
      cluster: this process's place in the run; None for a single process.
      fingerprint: values by name that must be equal in all processes.
      wait_s: how long the processes wait for each other.
      stall_timeout_s: how long a process may report no progress.
      peer_timeout_s: how long a process may send no heartbeat.
      preemption_notice: where a notice of preemption appears (`PreemptionNotice`); it stops the run as SIGTERM does. A process
        that starts while there is a notice waits until it is gone.

    Raises, in every process, PeerError if one did not connect within `wait_s`, and InputError if one differs in its fingerprint or
    secret.
    """
    notice = PreemptionNotice(preemption_notice) if preemption_notice else None
    if notice:
        notice.wait_until_gone()
    if cluster is None:
        group = ProcessGroup(stall_timeout_s=stall_timeout_s)
        group.start_monitoring()
        try:
            with _signal_handlers(group):
                if notice:
                    notice.watch(lambda announced: _stop_by_notice(announced, group.request_stop))
                yield group
        finally:
            group.stop_monitoring()
        return
    prefix_lines(cluster.process_index, cluster.process_count)
    channel = connect_processes(cluster, fingerprint, wait_s, rendezvous_secret(os.environ))
    group = ProcessGroup(cluster.process_index, channel, stall_timeout_s, peer_timeout_s)
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
            signal.signal(number, lambda *_: _terminate_this_process())
        if notice:
            notice.watch(lambda announced: _stop_by_notice(announced, _terminate_this_process))
        yield group
    except StoppedError:
        group.finish()
        raise
    except BaseException as error:
        group.report_failure(error)
        raise
    group.finish()


def _stop_by_notice(announced: str, stop: Callable[[], None]) -> None:
    log.warning(f"notice of preemption: {announced}; all processes save after the same step and end")
    stop()


def _terminate_this_process() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _signal_handlers(group: ProcessGroup) -> Iterator[None]:
    previous = {number: signal.signal(number, lambda *_: group.request_stop()) for number in _STOP_SIGNALS}
    previous[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: group.interrupt())
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
