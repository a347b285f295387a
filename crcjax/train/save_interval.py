"""The time between checkpoints that loses the least: the cost of saving weighed against the steps that a failure loses.

Source: J. T. Daly (2006), "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation Computer
Systems 22, equation 37, which refines J. W. Young (1974), sqrt(2 · save · mean time between failures).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import pairwise

import jax
from ml_collections import ConfigDict

from crcjax.monitor.goodput import Attempt, Ledger

# The value of config.train.checkpoint_minutes that leaves the interval to the program.
AUTO = -1.0
# One failure in this time is assumed beside the measured ones, since most runs have not failed yet.
_ASSUMED_MTBF_S = 24 * 3600.0
# The cost of a save before one was measured.
_ASSUMED_SAVE_S = 1.0
# Saves whose median is the measured cost.
_SAVES = 11


def optimal_interval_s(save_s: float, mtbf_s: float) -> float:
    """The seconds of training between two saves that waste the least time.

    Args:
      save_s: the seconds that a save costs.
      mtbf_s: the mean time between failures, above 0.
    """
    ratio = save_s / (2.0 * mtbf_s)
    if ratio >= 1.0:
        return mtbf_s
    return math.sqrt(2.0 * save_s * mtbf_s) * (1.0 + math.sqrt(ratio) / 3.0 + ratio / 9.0) - save_s


def measured_mtbf_s(attempts: Sequence[Attempt]) -> float:
    """The mean time between failures of a run, from its attempts (oldest first), with one failure in 24 hours assumed beforehand.

    An attempt failed if the next one began before its last step. A preempted one saves its last step, and does not count.
    """
    failures = sum(after.start_step < before.last_step for before, after in pairwise(attempts))
    return (_ASSUMED_MTBF_S + sum(sum(attempt.seconds.values()) for attempt in attempts)) / (1 + failures)


class SaveTimer:
    """Says when a run saves by the clock, besides after a number of steps.

    Args:
      minutes: the time between saves; AUTO for `optimal_interval_s`, 0 for none.
      mtbf_s: the current estimate of the mean time between failures.
      shares_cores: whether writing takes the processors that the steps use. Then a save costs the time of its writing, and
        otherwise only the time that the loop waits for it.
      now: the clock, in seconds.
    """

    def __init__(
        self,
        minutes: float,
        mtbf_s: Callable[[], float],
        shares_cores: bool,
        now: Callable[[], float] = time.monotonic,
    ):
        self._minutes, self._mtbf_s, self._shares_cores, self._now = minutes, mtbf_s, shares_cores, now
        self._costs_s: deque[float] = deque(maxlen=_SAVES)
        self._write_s = 0.0
        self._saved_step, self._saved_at = -1, now()

    @property
    def is_on(self) -> bool:
        """Whether the run saves by the clock."""
        return self._minutes != 0.0

    @property
    def interval_s(self) -> float:
        """The seconds between saves. With AUTO, at least what the disk needs for one."""
        if self._minutes > 0.0:
            return self._minutes * 60.0
        save_s = statistics.median(self._costs_s) if self._costs_s else _ASSUMED_SAVE_S
        return max(optimal_interval_s(save_s, self._mtbf_s()), self._write_s)

    def is_due(self) -> bool:
        """Whether the last save, or the start, is an interval ago."""
        return self.is_on and self._now() - self._saved_at >= self.interval_s

    def start(self) -> None:
        """Training begins, from a checkpoint or anew."""
        self._saved_at = self._now()

    def saved(self, step: int, waited_s: float, write_s: float) -> None:
        """Records a save. Those of one step, by the members of an ensemble, cost their sum.

        Args:
          step: the step that was saved.
          waited_s: how long the loop waited.
          write_s: how long writing took, of the last save that has ended; 0 before the first one has.
        """
        cost_s = waited_s + (write_s if self._shares_cores else 0.0)
        if step == self._saved_step:
            self._costs_s[-1] += cost_s
        else:
            self._costs_s.append(cost_s)
        self._saved_step, self._saved_at, self._write_s = step, self._now(), write_s


def save_timer(config: ConfigDict, ledger: Ledger) -> SaveTimer:
    """The timer of a run, by `config` (config.train) and the failures in its ledger."""

    def mtbf_s() -> float:
        return config.mtbf_hours * 3600.0 or measured_mtbf_s(ledger.attempts())

    return SaveTimer(config.checkpoint_minutes, mtbf_s, shares_cores=jax.default_backend() == "cpu")
