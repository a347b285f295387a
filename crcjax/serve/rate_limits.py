"""Limits of requests per second, for accounts and for addresses that have not signed in, shared by all API processes.

The generic cell rate algorithm (ITU-T I.371, annex A): of every key, one number is stored, the time at which its requests so far
would be done at the sustained rate. It may be ahead of now by the burst.
"""

from __future__ import annotations

import math
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from crcjax.errors import CrcjaxError
from crcjax.monitor.logs import log
from crcjax.serve.database import Database

_MIGRATIONS = (("CREATE TABLE rates (key TEXT PRIMARY KEY, done_s REAL NOT NULL) WITHOUT ROWID",),)
# Rows of keys that are within their limits are removed once in this many seconds.
_TIDY_S = 600.0


class TooManyRequestsError(CrcjaxError):
    """An account or an address asks too often; `retry_after_s` is the time after which the next request is answered."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"too many requests; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Rate:
    """A sustained rate of requests, and how many may come at once."""

    per_s: float
    burst: int


class RateLimits:
    """The limits, with their counts in a SQLite file; losing it resets the counts, so it is not synchronised to the disk.

    Args:
      path: the file.
      account: for every account that has signed in.
      address: for every address without a valid token or password.
      now: the Unix time in seconds.
    """

    def __init__(self, path: Path, account: Rate, address: Rate, now: Callable[[], float] = time.time):
        self._database = Database(path, _MIGRATIONS, synchronous="OFF")
        self._account, self._address, self._now = account, address, now
        self._tidied_s = now()

    def count_account(self, name: str) -> None:
        """Counts a request of an account. Raises TooManyRequestsError."""
        self._count(f"account {name}", self._account)

    def count_address(self, address: str) -> None:
        """Counts a request of an address that is not signed in. Raises TooManyRequestsError."""
        self._count(f"address {address}", self._address)

    def _count(self, key: str, rate: Rate) -> None:
        try:
            self._count_or_raise(key, rate)
        except sqlite3.OperationalError as error:
            # Such as a full disk: results can still be read.
            log.warning(f"requests are not limited: {error}")

    def _count_or_raise(self, key: str, rate: Rate) -> None:
        now, interval_s = self._now(), 1 / rate.per_s
        latest = now + (rate.burst - 1) * interval_s
        row = self._database.row(
            """INSERT INTO rates VALUES (:key, :now + :interval) ON CONFLICT DO UPDATE
            SET done_s = max(min(done_s, :latest), :now) + :interval
            -- A time that lies further ahead than a burst is from before the clock was set back.
            WHERE done_s <= :latest OR done_s > :latest + 2 * :interval RETURNING done_s""",
            **{"key": key, "now": now, "interval": interval_s, "latest": latest},
        )
        if row is None:
            blocked = self._database.row("SELECT done_s FROM rates WHERE key = ?", key)
            wait_s = blocked["done_s"] - latest if blocked else 0.0
            raise TooManyRequestsError(max(1, math.ceil(wait_s)))
        if now - self._tidied_s > _TIDY_S:
            self._tidied_s = now
            self._database.row("DELETE FROM rates WHERE done_s < ?", now)
