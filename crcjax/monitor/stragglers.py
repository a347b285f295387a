"""Detection of stragglers: processes that are slower than the median of their peers, so that all wait for them.

The processes of a run take each step together, so that their steps take the same time. What a slow process does alone tells it
apart: how long it waits for its own bags, and how long its devices take for a fixed computation.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from crcjax.monitor.heartbeat import Heartbeat
from crcjax.monitor.spikes import robust_z

# The deviation is at least this fraction of the median: a straggler takes 1.2 times the median or more, and with few peers, from
# which no deviation can be estimated, 1.5 times.
_LEAST_Z, _LEAST_DEVIATION = 5.0, 0.04
_FEW_PEERS, _DEVIATION_OF_FEW = 4, 0.1
# A shorter time, as a fraction of a step, delays nobody.
_LEAST_SHARE = 0.05
# The attributes of a heartbeat that measure work without the other processes, and the names of that work.
_MEASURES = {"reading_s": "reading its bags", "probe_s": "computing on its slowest device"}


@dataclass(frozen=True)
class Straggler:
    """A process that is slow at `activity`: it takes `seconds`, and the median of its peers is `peer_seconds`."""

    process: int
    host: str
    activity: str
    seconds: float
    peer_seconds: float

    def __str__(self) -> str:
        factor = f"{self.seconds / self.peer_seconds:.1f} times " if self.peer_seconds else "more than "
        return (
            f"process {self.process} ({self.host}) is a straggler: {self.activity} takes it {self.seconds:.3g} s, {factor}"
            f"the median of its peers ({self.peer_seconds:.3g} s)"
        )


def stragglers(heartbeats: Sequence[Heartbeat]) -> list[Straggler]:
    """The processes that are slower than their peers, by index and activity.

    A process is a straggler if the robust z-score of its time against those of the other processes is at least 5, and it takes at
    least 1.2 times their median (1.5 times with fewer than four others). Waiting for bags counts from a twentieth of a step.
    """
    slow = []
    for name, activity in _MEASURES.items():
        measured = [heartbeat for heartbeat in heartbeats if getattr(heartbeat, name) is not None]
        for heartbeat in measured:
            seconds = getattr(heartbeat, name)
            others = [getattr(other, name) for other in measured if other is not heartbeat]
            if not others:
                continue
            peer_seconds = statistics.median(others)
            fraction = _DEVIATION_OF_FEW if len(others) < _FEW_PEERS else _LEAST_DEVIATION
            least_deviation_s = max(fraction * peer_seconds, 1e-9)
            if name == "reading_s" and seconds - peer_seconds < _LEAST_SHARE * (heartbeat.step_s or 0.0):
                continue
            if robust_z(seconds, others, least_deviation_s) >= _LEAST_Z:
                slow.append(Straggler(heartbeat.process, heartbeat.host, activity, seconds, peer_seconds))
    return sorted(slow, key=lambda straggler: straggler.process)
