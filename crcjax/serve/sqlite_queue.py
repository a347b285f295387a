"""The queue in a SQLite file: for one machine, without a server."""

from __future__ import annotations

import json
import math
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crcjax.serve.database import Database
from crcjax.serve.queue import (
    DEFAULT_JOB_S,
    Job,
    JobRequest,
    Lease,
    LeaseLostError,
    Priority,
    QueueFullError,
    QueueLimits,
    QueueStats,
    Status,
    WorkerState,
)

MIGRATIONS = (
    (
        """CREATE TABLE jobs (
          sequence INTEGER PRIMARY KEY AUTOINCREMENT,
          id TEXT NOT NULL UNIQUE,
          result_key TEXT NOT NULL,
          owner TEXT NOT NULL,
          priority INTEGER NOT NULL,
          turn INTEGER NOT NULL,
          payload TEXT NOT NULL,
          status TEXT NOT NULL DEFAULT 'queued',
          submitted_s REAL NOT NULL,
          started_s REAL,
          ended_s REAL,
          tries INTEGER NOT NULL DEFAULT 0,
          token INTEGER,
          worker TEXT,
          lease_until_s REAL,
          progress REAL NOT NULL DEFAULT 0,
          stage TEXT NOT NULL DEFAULT '',
          result TEXT,
          reason TEXT NOT NULL DEFAULT '',
          revision INTEGER NOT NULL DEFAULT 1
        )""",
        "CREATE INDEX jobs_in_turn ON jobs (status, priority, turn, sequence)",
        "CREATE INDEX jobs_by_age ON jobs (status, sequence)",
        "CREATE INDEX jobs_by_end ON jobs (status, ended_s)",
        """CREATE UNIQUE INDEX jobs_by_key ON jobs (result_key) WHERE status IN ('queued', 'running', 'done')""",
        # The last turn of every owner, and, under the owner '', the turn of the job that was claimed last.
        "CREATE TABLE turns (owner TEXT, priority INTEGER, turn INTEGER NOT NULL, PRIMARY KEY (owner, priority))",
        "CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
        "INSERT INTO facts VALUES ('token', '0'), ('last_claim', ''), ('boot', '')",
        "CREATE TABLE workers (name TEXT PRIMARY KEY, state TEXT NOT NULL, reported_s REAL NOT NULL)",
    ),
    (
        # Sites take turns, and at each site its users. An owner was a site and a user before.
        "ALTER TABLE jobs ADD COLUMN site TEXT NOT NULL DEFAULT ''",
        "UPDATE jobs SET site = substr(owner, 1, instr(owner, '/') - 1), owner = substr(owner, instr(owner, '/') + 1) WHERE instr(owner, '/')",
        "DROP INDEX jobs_in_turn",
        "CREATE INDEX jobs_in_turn ON jobs (status, priority, site, turn, sequence)",
        # The next turn of every site.
        "CREATE TABLE sites (site TEXT, priority INTEGER, turn INTEGER NOT NULL, PRIMARY KEY (site, priority))",
        "INSERT INTO sites SELECT DISTINCT site, priority, 0 FROM jobs",
        # In `turns`, the owner SITE/USER has the user's last turn, and SITE/ the turn that was claimed last at the site.
        "INSERT INTO turns SELECT site || '/', priority, turns.turn FROM sites JOIN turns USING (priority) WHERE owner = ''",
        "DELETE FROM turns WHERE owner = ''",
        "INSERT INTO facts VALUES ('round 0', '0'), ('round 1', '0')",
        # Jobs whose results are no longer shared have the result key ''.
        "DROP INDEX jobs_by_key",
        """CREATE UNIQUE INDEX jobs_by_key ON jobs (result_key)
        WHERE status IN ('queued', 'running', 'done') AND result_key != ''""",
        "CREATE INDEX jobs_shared ON jobs (ended_s) WHERE status = 'done' AND result_key != ''",
    ),
)
# The jobs whose mean duration predicts those of others.
_RECENT_JOBS = 50
# The results that stop being shared are looked for once in this many claims.
_TRIM_EVERY = 100


@dataclass(frozen=True)
class Clock:
    """The time of day (Unix, s), for people; the time since the machine started (s), for leases, which no one can set."""

    now: Callable[[], float] = time.time
    since_boot: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)


class SqliteQueue:
    """The queue in the file at `path`; any number of processes of one machine may open it."""

    def __init__(self, path: Path, limits: QueueLimits | None = None, clock: Clock | None = None):
        self.limits = limits or QueueLimits()
        self._clock = clock or Clock()
        self._database = Database(path, MIGRATIONS)
        self._expire_leases_of_another_boot()

    def _expire_leases_of_another_boot(self) -> None:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        with self._database.transaction() as connection:
            if _fact(connection, "boot") != boot:
                connection.execute("UPDATE jobs SET lease_until_s = 0 WHERE status = 'running'")
                connection.execute("DELETE FROM workers")
                _set_fact(connection, "boot", boot)

    def submit(self, request: JobRequest) -> Job:
        with self._database.transaction() as connection:
            row = connection.execute(
                "SELECT * FROM jobs WHERE result_key = ? AND status IN ('queued', 'running', 'done')",
                (request.result_key,),
            ).fetchone()
            if row is not None:
                self._raise_priority(connection, row, request)
                job_id = row["id"]
            else:
                self._check_room(connection)
                job_id = str(uuid.uuid4())
                connection.execute(
                    """INSERT INTO jobs (id, result_key, site, owner, priority, turn, payload, submitted_s)
                    VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
                    (
                        job_id,
                        request.result_key,
                        request.site,
                        request.owner,
                        int(request.priority),
                        _next_turn(connection, request.site, request.owner, request.priority),
                        json.dumps(request.payload),
                        self._clock.now(),
                    ),
                )
        job = self.job(job_id)
        assert job is not None
        return job

    def _raise_priority(self, connection: sqlite3.Connection, row: sqlite3.Row, request: JobRequest) -> None:
        if row["status"] == Status.QUEUED and request.priority < row["priority"]:
            connection.execute(
                "UPDATE jobs SET priority = ?, turn = ?, revision = revision + 1 WHERE id = ?",
                (
                    int(request.priority),
                    _next_turn(connection, row["site"], row["owner"], request.priority),
                    row["id"],
                ),
            )

    def _check_room(self, connection: sqlite3.Connection) -> None:
        queued = connection.execute("SELECT count(*) FROM jobs WHERE status = 'queued'").fetchone()[0]
        if queued >= self.limits.max_queued:
            raise QueueFullError(queued, max(1, math.ceil(_mean_job_s(connection) or DEFAULT_JOB_S)))

    def job(self, job_id: str) -> Job | None:
        row = self._database.row("SELECT * FROM jobs WHERE id = ?", job_id)
        if row is None:
            return None
        position = self._position(row) if row["status"] == Status.QUEUED else None
        return Job(
            id=row["id"],
            priority=Priority(row["priority"]),
            status=Status(row["status"]),
            payload=json.loads(row["payload"]),
            submitted_s=row["submitted_s"],
            started_s=row["started_s"],
            ended_s=row["ended_s"],
            tries=row["tries"],
            progress=row["progress"],
            stage=row["stage"],
            position=position,
            result=json.loads(row["result"]) if row["result"] else None,
            reason=row["reason"],
            revision=row["revision"],
        )

    def _position(self, row: sqlite3.Row) -> int:
        """The jobs that would be claimed before a queued one: the site's own, and those whose sites have earlier turns."""
        queued = self._database.rows(
            """SELECT site, priority, count(*) AS jobs, total(site = :site AND (turn, sequence) < (:turn, :sequence)) AS earlier
            FROM jobs WHERE status = 'queued' AND priority <= :priority GROUP BY site, priority""",
            **{name: row[name] for name in ("site", "turn", "sequence", "priority")},
        )
        statement = "SELECT site, turn FROM sites WHERE priority = ?"
        turns = {site["site"]: site["turn"] for site in self._database.rows(statement, row["priority"])}
        ahead = sum(site["jobs"] for site in queued if site["priority"] < row["priority"])
        of_priority = [site for site in queued if site["priority"] == row["priority"]]
        earlier = int(sum(site["earlier"] for site in of_priority))
        its_turn = turns.get(row["site"], 0) + earlier
        for site in of_priority:
            if site["site"] != row["site"]:
                turns_before = its_turn - turns[site["site"]] + (site["site"] < row["site"])
                ahead += max(0, min(turns_before, site["jobs"]))
        return ahead + earlier

    def cancel(self, job_id: str) -> Job | None:
        with self._database.transaction() as connection:
            connection.execute(
                """UPDATE jobs SET status = 'cancelled', ended_s = ?, token = NULL, worker = NULL, revision = revision + 1
                WHERE id = ? AND status IN ('queued', 'running')""",
                (self._clock.now(), job_id),
            )
        return self.job(job_id)

    def claim(self, worker: str) -> Lease | None:
        with self._database.transaction() as connection:
            self._requeue_expired(connection)
            row, kind = self._next(connection)
            if row is None:
                return None
            token = int(_fact(connection, "token")) + 1
            _set_fact(connection, "token", str(token))
            _set_fact(connection, "last_claim", kind)
            _count_turn(connection, row, kind)
            if token % min(_TRIM_EVERY, self.limits.max_shared) == 0:
                self._trim(connection)
            connection.execute(
                """UPDATE jobs SET status = 'running', token = ?, worker = ?, lease_until_s = ?, tries = tries + 1,
                started_s = ?, progress = 0, stage = '', revision = revision + 1 WHERE id = ?""",
                (token, worker, self._clock.since_boot() + self.limits.lease_s, self._clock.now(), row["id"]),
            )
            return Lease(row["id"], token, json.loads(row["payload"]))

    def _next(self, connection: sqlite3.Connection) -> tuple[sqlite3.Row | None, str]:
        """The job to be claimed next, and why: it is `urgent`, it is `aged`, or it is its `turn`."""

        last = _fact(connection, "last_claim")
        # The oldest job first, so that its age decides whether there is an aged one.
        oldest = connection.execute("SELECT * FROM jobs WHERE status = 'queued' ORDER BY sequence LIMIT 1").fetchone()
        aged = oldest if oldest and oldest["submitted_s"] <= self._clock.now() - self.limits.ageing_s else None
        urgent = _first(connection, Priority.URGENT)
        if urgent:
            return (aged, "aged") if aged and last == "urgent" else (urgent, "urgent")
        if aged and last != "aged":
            return aged, "aged"
        return _first(connection, Priority.ROUTINE), "turn"

    def _trim(self, connection: sqlite3.Connection) -> None:
        """Stops sharing the oldest results."""
        connection.execute(
            """UPDATE jobs SET result_key = '' WHERE id IN (SELECT id FROM jobs WHERE status = 'done' AND result_key != ''
            ORDER BY ended_s DESC LIMIT -1 OFFSET ?)""",
            (self.limits.max_shared,),
        )

    def forget_results(self) -> None:
        with self._database.transaction() as connection:
            connection.execute("UPDATE jobs SET result_key = '' WHERE status = 'done' AND result_key != ''")

    def _requeue_expired(self, connection: sqlite3.Connection) -> None:
        expired = connection.execute(
            "SELECT id, tries FROM jobs WHERE status = 'running' AND lease_until_s < ?", (self._clock.since_boot(),)
        ).fetchall()
        for row in expired:
            self._try_again(connection, row["id"], row["tries"], "the worker died or did not report")

    def _try_again(self, connection: sqlite3.Connection, job_id: str, tries: int, reason: str) -> None:
        """Queues a job again, in its old place, or quarantines it."""
        status, ended_s = Status.QUEUED, None
        if tries >= self.limits.max_tries:
            status, ended_s = Status.QUARANTINED, self._clock.now()
            reason = f"tried {tries} times without an end; the last time: {reason}"
        connection.execute(
            """UPDATE jobs SET status = ?, reason = ?, ended_s = ?, token = NULL, worker = NULL, progress = 0, stage = '',
            revision = revision + 1 WHERE id = ?""",
            (status, reason, ended_s, job_id),
        )

    def renew(self, lease: Lease, progress: float, stage: str) -> None:
        with self._database.transaction() as connection:
            _check_lease(connection, lease)
            connection.execute(
                """UPDATE jobs SET lease_until_s = ?, revision = revision + ((progress, stage) != (?, ?)), progress = ?,
                stage = ? WHERE id = ?""",
                (self._clock.since_boot() + self.limits.lease_s, progress, stage, progress, stage, lease.job_id),
            )

    def commit(self, lease: Lease, result: Mapping[str, Any]) -> None:
        self._end(lease, Status.DONE, json.dumps(result), "")

    def fail(self, lease: Lease, reason: str) -> None:
        self._end(lease, Status.FAILED, None, reason)

    def _end(self, lease: Lease, status: Status, result: str | None, reason: str) -> None:
        with self._database.transaction() as connection:
            _check_lease(connection, lease)
            connection.execute(
                """UPDATE jobs SET status = ?, result = ?, reason = ?, ended_s = ?, token = NULL, worker = NULL, stage = '',
                progress = CASE ? WHEN 'done' THEN 1 ELSE progress END, revision = revision + 1 WHERE id = ?""",
                (status, result, reason, self._clock.now(), status, lease.job_id),
            )

    def abandon(self, lease: Lease, reason: str) -> None:
        with self._database.transaction() as connection:
            row = _check_lease(connection, lease)
            self._try_again(connection, lease.job_id, row["tries"], reason)

    def release(self, lease: Lease) -> None:
        with self._database.transaction() as connection:
            _check_lease(connection, lease)
            connection.execute("UPDATE jobs SET tries = tries - 1 WHERE id = ?", (lease.job_id,))
            self._try_again(connection, lease.job_id, 0, "")

    def worker_died(self, worker: str) -> None:
        with self._database.transaction() as connection:
            connection.execute("UPDATE jobs SET lease_until_s = 0 WHERE status = 'running' AND worker = ?", (worker,))
            connection.execute("DELETE FROM workers WHERE name = ?", (worker,))
            self._requeue_expired(connection)

    def report_worker(self, worker: str, state: str) -> None:
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO workers VALUES (?, ?, ?)", (worker, state, self._clock.since_boot())
            )

    def workers(self) -> list[WorkerState]:
        now = self._clock.since_boot()
        rows = self._database.rows("SELECT * FROM workers ORDER BY name")
        return [WorkerState(row["name"], row["state"], now - row["reported_s"]) for row in rows]

    def stats(self) -> QueueStats:
        with self._database.transaction() as connection:
            counts = connection.execute("SELECT status, count(*) FROM jobs GROUP BY status").fetchall()
            oldest = connection.execute(
                "SELECT submitted_s FROM jobs WHERE status = 'queued' ORDER BY sequence LIMIT 1"
            ).fetchone()
            return QueueStats(
                {Status(status): count for status, count in counts},
                0.0 if oldest is None else max(0.0, self._clock.now() - oldest[0]),
                _mean_job_s(connection),
            )

    def close(self) -> None:
        """Closes this thread's connection."""
        self._database.close()


def _check_lease(connection: sqlite3.Connection, lease: Lease) -> sqlite3.Row:
    row = connection.execute("SELECT * FROM jobs WHERE id = ?", (lease.job_id,)).fetchone()
    if row is None or row["status"] != Status.RUNNING or row["token"] != lease.token:
        status = "gone" if row is None else row["status"]
        raise LeaseLostError(f"job {lease.job_id} is {status}, and not this worker's any more; drop its result")
    return row


def _first(connection: sqlite3.Connection, priority: Priority) -> sqlite3.Row | None:
    """The first job of the site whose turn it is."""
    for (site,) in connection.execute("SELECT site FROM sites WHERE priority = ? ORDER BY turn, site", (priority,)):
        row = connection.execute(
            """SELECT * FROM jobs WHERE status = 'queued' AND priority = ? AND site = ? ORDER BY turn, sequence LIMIT 1""",
            (priority, site),
        ).fetchone()
        if row is not None:
            return row
    return None


def _next_turn(connection: sqlite3.Connection, site: str, owner: str, priority: Priority) -> int:
    """The turn of a user's next job: one after the last one, and not before the turn that is being claimed at the site."""
    claimed, last = (_turn(connection, f"{site}/{name}", priority) for name in ("", owner))
    turn = max(claimed or 0, 0 if last is None else last + 1)
    _set_turn(connection, f"{site}/{owner}", priority, turn)
    # A site that had no jobs joins the round of the others.
    connection.execute(
        "INSERT INTO sites VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET turn = max(turn, excluded.turn)",
        (site, int(priority), int(_fact(connection, f"round {int(priority)}"))),
    )
    return turn


def _count_turn(connection: sqlite3.Connection, row: sqlite3.Row, kind: str) -> None:
    """Records that the site and the user of a job had their turns."""
    site, priority = row["site"], row["priority"]
    # An old job's turn may be behind the others'.
    claimed = max(_turn(connection, f"{site}/", priority) or 0, row["turn"])
    _set_turn(connection, f"{site}/", priority, claimed)
    statement = "SELECT turn FROM sites WHERE site = ? AND priority = ?"
    turn = connection.execute(statement, (site, priority)).fetchone()[0]
    if kind != "aged":
        turn = max(turn, int(_fact(connection, f"round {priority}")))
        _set_fact(connection, f"round {priority}", str(turn))
    connection.execute("UPDATE sites SET turn = ? WHERE site = ? AND priority = ?", (turn + 1, site, priority))


def _turn(connection: sqlite3.Connection, owner: str, priority: int) -> int | None:
    row = connection.execute(
        "SELECT turn FROM turns WHERE owner = ? AND priority = ?", (owner, int(priority))
    ).fetchone()
    return None if row is None else row[0]


def _set_turn(connection: sqlite3.Connection, owner: str, priority: int, turn: int) -> None:
    connection.execute("INSERT OR REPLACE INTO turns VALUES (?, ?, ?)", (owner, int(priority), turn))


def _mean_job_s(connection: sqlite3.Connection) -> float | None:
    return connection.execute(
        """SELECT avg(ended_s - started_s) FROM
        (SELECT ended_s, started_s FROM jobs WHERE status = 'done' ORDER BY ended_s DESC LIMIT ?)""",
        (_RECENT_JOBS,),
    ).fetchone()[0]


def _fact(connection: sqlite3.Connection, name: str) -> str:
    return connection.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()[0]


def _set_fact(connection: sqlite3.Connection, name: str, value: str) -> None:
    connection.execute("UPDATE facts SET value = ? WHERE name = ?", (value, name))
