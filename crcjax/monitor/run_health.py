"""The health of a run as seen from outside: which processes are alive, where they stand, who is slow, and the goodput."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from crcjax.errors import InputError
from crcjax.monitor.goodput import Goodput, read_goodput
from crcjax.monitor.heartbeat import FINISHED, FOLDER, STOPPED, Heartbeat, read_heartbeats
from crcjax.monitor.stragglers import Straggler, stragglers

# Heartbeats come every second; a file system may show them some seconds late.
_SILENCE_S = 10.0


@dataclass(frozen=True)
class ProcessHealth:
    """One process of a run: its last heartbeat (None if it wrote none), its state in words, and whether it is well."""

    process: int
    heartbeat: Heartbeat | None
    state: str
    is_well: bool


@dataclass(frozen=True)
class RunHealth:
    """The processes of a run's last attempt, its stragglers, and its goodput over all attempts (None if it has no record)."""

    processes: list[ProcessHealth]
    stragglers: list[Straggler]
    goodput: Goodput | None

    @property
    def is_well(self) -> bool:
        """Whether every process is alive or finished its work."""
        return all(process.is_well for process in self.processes)


def run_health(run: str | Path, silence_s: float = _SILENCE_S) -> RunHealth:
    """The health of a run; of the members of an ensemble, which are trained together, that of the first.

    Ages are differences between the clock of this machine and those of the run's.

    Args:
      run: the run directory.
      silence_s: the age in seconds from which a heartbeat means that its process is lost.

    Raises InputError if the run has no heartbeats.
    """
    run = next(iter(folder.parent for folder in sorted(Path(run).glob(f"seed-*/{FOLDER}"))), Path(run))
    heartbeats = {heartbeat.process: heartbeat for heartbeat in read_heartbeats(run)}
    if not heartbeats:
        raise InputError(f"{run}: has no heartbeats; give the --workdir of a training that has begun its first step")
    count, now = next(iter(heartbeats.values())).process_count, time.time()
    processes = [_process_health(process, heartbeats.get(process), now, silence_s) for process in range(count)]
    alive = [health.heartbeat for health in processes if health.heartbeat and health.is_well]
    return RunHealth(processes, stragglers(alive), read_goodput(run))


def _process_health(process: int, heartbeat: Heartbeat | None, now: float, silence_s: float) -> ProcessHealth:
    if heartbeat is None:
        return ProcessHealth(process, None, "no heartbeat", False)
    if heartbeat.ending:
        return ProcessHealth(process, heartbeat, heartbeat.ending, heartbeat.ending in (FINISHED, STOPPED))
    age_s = now - heartbeat.time_s
    if age_s > silence_s:
        state = f"no heartbeat for {age_s:.0f} s; it was {heartbeat.phase}"
        return ProcessHealth(process, heartbeat, state, False)
    return ProcessHealth(process, heartbeat, f"{heartbeat.phase} for {heartbeat.phase_s + max(age_s, 0.0):.0f} s", True)
