"""The predictions that users asked for. Each refers to a job of the queue; requests for the same result share one."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import crcjax
from crcjax.errors import CrcjaxError
from crcjax.serve.database import Database
from crcjax.serve.queue import Job, JobRequest, Priority, Queue
from crcjax.serve.slide_records import SlideRecord

MIGRATIONS = (
    (
        """CREATE TABLE predictions (
          sequence INTEGER PRIMARY KEY AUTOINCREMENT,
          id TEXT NOT NULL UNIQUE,
          site TEXT NOT NULL,
          owner TEXT NOT NULL,
          case_id TEXT NOT NULL,
          slides TEXT NOT NULL,
          job_id TEXT NOT NULL,
          idempotency_key TEXT,
          request_sha256 TEXT NOT NULL,
          requested_s REAL NOT NULL,
          cancelled INTEGER NOT NULL DEFAULT 0,
          UNIQUE (owner, idempotency_key)
        )""",
        "CREATE INDEX predictions_by_site ON predictions (site, sequence)",
        "CREATE INDEX predictions_by_job ON predictions (job_id)",
    ),
)


class RequestRefusedError(CrcjaxError):
    """A prediction cannot be asked for so."""


class KeyReusedError(CrcjaxError):
    """The idempotency key belongs to another request."""


@dataclass(frozen=True)
class PredictionRecord:
    """One request: whose it is, its slides, and the job that computes it."""

    sequence: int
    id: str
    site: str
    owner: str
    case_id: str
    slides: tuple[str, ...]
    job_id: str
    requested_s: float
    is_cancelled: bool


class PredictionRecords:
    """The table of predictions, and the way from a request to a job.

    Args:
      database: its tables are those of MIGRATIONS.
      queue: the jobs.
      bundle_id: the bundle that predicts.
    """

    def __init__(self, database: Database, queue: Queue, bundle_id: str):
        self._database, self._queue, self._bundle_id = database, queue, bundle_id

    def request(
        self, owner: str, slides: Sequence[SlideRecord], priority: Priority, idempotency_key: str | None
    ) -> PredictionRecord:
        """Queues the prediction of a case; with a key that was used before, returns the earlier request.

        Raises RequestRefusedError for slides of several cases or sites, or equal ones; KeyReusedError; QueueFullError.
        """
        if {(slide.site, slide.case_id) for slide in slides} != {(slides[0].site, slides[0].case_id)}:
            raise RequestRefusedError("slides must all be of one case at one site; ask for each case by itself")
        if len({slide.content for slide in slides}) != len(slides):
            raise RequestRefusedError("slides must differ, got the same content twice; leave one out")
        request = hashlib.sha256(json.dumps([[slide.id for slide in slides], int(priority)]).encode()).hexdigest()
        if idempotency_key is not None:
            row = self._database.row(
                "SELECT * FROM predictions WHERE owner = ? AND idempotency_key = ?", owner, idempotency_key
            )
            if row is not None:
                if row["request_sha256"] != request:
                    raise KeyReusedError("Idempotency-Key must be new for a new request, got that of another request")
                return _record(row)
        # If the service dies before the request is recorded, the client's next try finds the job by its result key.
        job = self._queue.submit(self._job_request(owner, slides, priority))
        return self._add(owner, slides, job, idempotency_key, request)

    def _job_request(self, owner: str, slides: Sequence[SlideRecord], priority: Priority) -> JobRequest:
        """The job of a case. Sites do not share results, so that none learns what another has."""
        site = slides[0].site
        contents = [[slide.content, slide.mpp] for slide in slides]
        key = json.dumps([site, self._bundle_id, crcjax.__version__, contents])
        payload = {
            "slides": [
                {"content": slide.content, "path": str(slide.path), "mpp": slide.mpp, "site": site} for slide in slides
            ]
        }
        return JobRequest(hashlib.sha256(key.encode()).hexdigest(), owner, payload, priority, site)

    def _add(
        self, owner: str, slides: Sequence[SlideRecord], job: Job, idempotency_key: str | None, request: str
    ) -> PredictionRecord:
        prediction_id = str(uuid.uuid4())
        with self._database.transaction() as connection:
            connection.execute(
                """INSERT INTO predictions
                (id, site, owner, case_id, slides, job_id, idempotency_key, request_sha256, requested_s)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (owner, idempotency_key) DO NOTHING""",
                (
                    *(prediction_id, slides[0].site, owner, slides[0].case_id),
                    *(json.dumps([slide.id for slide in slides]), job.id, idempotency_key, request, time.time()),
                ),
            )
            # The same request, sent twice at the same time, may be there already.
            row = connection.execute(
                "SELECT * FROM predictions WHERE id = ? OR (owner = ? AND idempotency_key = ?)",
                (prediction_id, owner, idempotency_key),
            ).fetchone()
        return _record(row)

    def prediction(self, prediction_id: str) -> PredictionRecord | None:
        """The prediction of an id."""
        row = self._database.row("SELECT * FROM predictions WHERE id = ?", prediction_id)
        return None if row is None else _record(row)

    def worklist(self, site: str, owner: str | None, before: int | None, limit: int) -> list[PredictionRecord]:
        """The predictions of a site, newest first; only those of an owner, or from the one before a sequence number on."""
        rows = self._database.rows(
            """SELECT * FROM predictions WHERE site = ? AND (? IS NULL OR owner = ?) AND (? IS NULL OR sequence < ?)
            ORDER BY sequence DESC LIMIT ?""",
            *(site, owner, owner, before, before, limit),
        )
        return [_record(row) for row in rows]

    def recent_jobs(self, limit: int) -> list[tuple[str, str]]:
        """The site and the job of the last predictions of all sites, newest first, each job once."""
        rows = self._database.rows(
            "SELECT site, job_id FROM predictions WHERE NOT cancelled ORDER BY sequence DESC LIMIT ?", limit
        )
        return list(dict.fromkeys((row["site"], row["job_id"]) for row in rows))

    def cancel(self, record: PredictionRecord) -> None:
        """Cancels a request, and its job if no other request needs it."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE predictions SET cancelled = 1 WHERE id = ?", (record.id,))
            others = connection.execute(
                "SELECT count(*) FROM predictions WHERE job_id = ? AND NOT cancelled", (record.job_id,)
            ).fetchone()[0]
        if not others:
            self._queue.cancel(record.job_id)


def _record(row: sqlite3.Row) -> PredictionRecord:
    return PredictionRecord(
        *(row["sequence"], row["id"], row["site"], row["owner"], row["case_id"]),
        slides=tuple(json.loads(row["slides"])),
        job_id=row["job_id"],
        requested_s=row["requested_s"],
        is_cancelled=bool(row["cancelled"]),
    )
