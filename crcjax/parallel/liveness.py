"""Decides from heartbeats which processes of a run are lost, and whether the run stands still."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from crcjax.monitor.heartbeat import COMPUTING

_SHOWN_PROCESSES = 8
# Process 0 knows more of the cause of a standstill, and reports it first if it can.
_AFTER_PROCESS_0_S = 10.0
LOST, STALLED, FAILED = "process_lost", "run_stalled", "process_failed"


@dataclass(frozen=True)
class Fault:
    """Why a run has to end: the kind of an event, the reason in words, and the processes that are to blame."""

    kind: str
    reason: str
    processes: tuple[int, ...]


@dataclass(frozen=True)
class _Peer:
    heard_s: float
    step: int
    phase: str


class Liveness:
    """The last heartbeats that one process received. Process 0 receives those of all others; they receive those of process 0.

    Times are seconds of one clock, given by the caller.

    Args:
      names: the names of all processes.
      process: the index of this one.
      peer_timeout_s: the silence after which another process counts as lost.
      stall_timeout_s: the time without progress after which the run counts as standing still.
      now: the time of the start.
    """

    def __init__(self, names: Sequence[str], process: int, peer_timeout_s: float, stall_timeout_s: float, now: float):
        self._names, self._process = names, process
        self._peer_timeout_s, self._stall_timeout_s = peer_timeout_s, stall_timeout_s
        watched = [] if len(names) == 1 else [0] if process else range(1, len(names))
        self._peers = {peer: _Peer(now, 0, "starting") for peer in watched}

    def heard(self, process: int, step: int, phase: str, now: float) -> None:
        """A heartbeat came from another process."""
        self._peers[process] = _Peer(now, step, phase)

    def finished(self, process: int) -> None:
        """Another process has done its work, and may fall silent."""
        self._peers.pop(process, None)

    def forgive(self, seconds: float) -> None:
        """This process was stopped from outside for that long, and could not hear the others."""
        self._peers = {
            process: _Peer(peer.heard_s + seconds, peer.step, peer.phase) for process, peer in self._peers.items()
        }

    def fault(self, step: int, phase: str, idle_s: float, now: float) -> Fault | None:
        """Why the run has to end; None if all is well.

        Args:
          step: the step of this process.
          phase: what this process does.
          idle_s: the time since this process made progress.
          now: the time.
        """
        peers = dict(self._peers)
        silence_s = {process: now - peer.heard_s for process, peer in peers.items()}
        lost = [process for process in peers if silence_s[process] > self._peer_timeout_s]
        if lost:
            names = ", ".join(self._names[process] for process in lost[:_SHOWN_PROCESSES])
            was = "was" if len(lost) == 1 else "were"
            reason = (
                f"{names} {was} lost: no heartbeat for {max(silence_s[process] for process in lost):.0f} s, "
                f"{peers[lost[0]].phase} in step {peers[lost[0]].step}; stopped, or the machine or its network hangs"
            )
            return Fault(LOST, reason, tuple(lost))
        if self._process and idle_s > self._stall_timeout_s + _AFTER_PROCESS_0_S:
            reason = f"no step was finished for {idle_s:.0f} s, and {self._names[0]} does not report why"
            return Fault(STALLED, reason, ())
        if not self._process and idle_s > self._stall_timeout_s:
            peers[0] = _Peer(now, step, phase)
            # Processes that compute wait for the slowest one; a process in another phase is the one they wait for.
            busy = [process for process in sorted(peers) if peers[process].phase != COMPUTING] or sorted(peers)
            descriptions = [
                f"{self._names[process]} is {peers[process].phase}, step {peers[process].step}"
                for process in busy[:_SHOWN_PROCESSES]
            ]
            blamed = tuple(busy) if len(busy) == 1 < len(self._names) else ()
            return Fault(STALLED, f"no step was finished for {idle_s:.0f} s: {'; '.join(descriptions)}", blamed)
        return None
