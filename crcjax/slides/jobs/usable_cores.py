"""How many cores this process may use."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """The cores that the system lets this process use, which SLURM, containers and taskset limit; at least 1."""
    return len(os.sched_getaffinity(0))
