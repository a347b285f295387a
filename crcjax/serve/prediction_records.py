"""The predictions that users asked for. Each refers to a job of the queue; requests for the same result share one."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import crcjax
from crcjax.errors import CrcjaxError
from crcjax.lifecycle.releases import Choice
from crcjax.serve.database import Database
from crcjax.serve.queue import Job, JobRequest, Priority, Queue, Status
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
    (
        # The bundle that was chosen; predictions of earlier versions name it in their results alone.
        "ALTER TABLE predictions ADD COLUMN bundle_id TEXT NOT NULL DEFAULT ''",
        "CREATE INDEX predictions_by_bundle ON predictions (bundle_id)",
        # Predictions of the same cases by a shadow; the job is empty until it is queued.
        """CREATE TABLE shadows (
          prediction_id TEXT NOT NULL,
          bundle_id TEXT NOT NULL,
          job_id TEXT NOT NULL DEFAULT '',
          PRIMARY KEY (prediction_id, bundle_id)
        )""",
        "CREATE INDEX shadows_by_job ON shadows (job_id)",
    ),
)


# A request whose job stands so can be given to another bundle: it has neither a result nor a failure of its slides.
_MOVABLE = (Status.QUEUED, Status.RUNNING, Status.QUARANTINED)
# Who takes turns in the queue for shadows; no account can have this name.
SHADOW_OWNER = "(shadow)"


class RequestRefusedError(CrcjaxError):
    """A prediction cannot be asked for so."""


class KeyReusedError(CrcjaxError):
    """The idempotency key belongs to another request."""


@dataclass(frozen=True)
class PredictionRecord:
    """One request: whose it is, its slides, the job that computes it, and the bundle that was chosen for it."""

    sequence: int
    id: str
    site: str
    owner: str
    case_id: str
    slides: tuple[str, ...]
    job_id: str
    requested_s: float
    is_cancelled: bool
    bundle_id: str


class PredictionRecords:
    """The table of predictions, and the way from a request to a job.

    Args:
      database: its tables are those of MIGRATIONS.
      queue: the jobs.
      choose: the bundle of a case, from its site and id.
    """

    def __init__(self, database: Database, queue: Queue, choose: Callable[[str, str], Choice]):
        self._database, self._queue, self._choose = database, queue, choose

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
        site, case_id = slides[0].site, slides[0].case_id
        described = [
            {"content": slide.content, "path": str(slide.path), "mpp": slide.mpp, "site": site} for slide in slides
        ]
        choice = self._choose(site, case_id)
        # If the service dies before the request is recorded, the client's next try finds the job by its result key.
        job = self._queue.submit(job_request(owner, site, described, choice, priority))
        record = self._add(owner, slides, job, idempotency_key, request, choice)
        newer = self._choose(site, case_id)
        if newer.bundle_id == choice.bundle_id or record.bundle_id != choice.bundle_id:
            return record
        # The bundle may have been withdrawn before the request was recorded, when nothing could move it yet.
        self.move(record, newer)
        return self.prediction(record.id) or record

    def move(self, record: PredictionRecord, choice: Choice) -> bool:
        """Lets another bundle predict a request that has no result yet; returns whether it did. Raises QueueFullError."""
        job = self._queue.job(record.job_id)
        if job is None or job.status not in _MOVABLE:
            return False
        moved = self._queue.submit(job_request(record.owner, record.site, job.payload["slides"], choice, job.priority))
        with self._database.transaction() as connection:
            changed = connection.execute(
                "UPDATE predictions SET job_id = ?, bundle_id = ? WHERE id = ? AND job_id = ?",
                (moved.id, choice.bundle_id, record.id, record.job_id),
            ).rowcount
        self._cancel_unneeded(record.job_id)
        return changed > 0

    def of_bundle(self, bundle_id: str) -> list[PredictionRecord]:
        """The requests that a bundle was chosen for, newest first, without cancelled ones."""
        rows = self._database.rows(
            "SELECT * FROM predictions WHERE bundle_id = ? AND NOT cancelled ORDER BY sequence DESC", bundle_id
        )
        return [_record(row) for row in rows]

    def _add(
        self,
        owner: str,
        slides: Sequence[SlideRecord],
        job: Job,
        idempotency_key: str | None,
        request: str,
        choice: Choice,
    ) -> PredictionRecord:
        prediction_id = str(uuid.uuid4())
        with self._database.transaction() as connection:
            connection.execute(
                """INSERT INTO predictions
                (id, site, owner, case_id, slides, job_id, idempotency_key, request_sha256, requested_s, bundle_id)
                VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (owner, idempotency_key) DO NOTHING""",
                (
                    *(prediction_id, slides[0].site, owner, slides[0].case_id),
                    *(json.dumps([slide.id for slide in slides]), job.id, idempotency_key, request, time.time()),
                    choice.bundle_id,
                ),
            )
            # The same request, sent twice at the same time, may be there already.
            row = connection.execute(
                "SELECT * FROM predictions WHERE id = ? OR (owner = ? AND idempotency_key = ?)",
                (prediction_id, owner, idempotency_key),
            ).fetchone()
            if choice.shadow_id and row["id"] == prediction_id:
                connection.execute(
                    "INSERT INTO shadows (prediction_id, bundle_id) VALUES (?, ?)", (prediction_id, choice.shadow_id)
                )
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
        self._cancel_unneeded(record.job_id)

    def _cancel_unneeded(self, job_id: str) -> None:
        row = self._database.row("SELECT 1 FROM predictions WHERE job_id = ? AND NOT cancelled", job_id)
        if row is None:
            self._queue.cancel(job_id)

    def waiting_shadows(self, bundle_id: str, limit: int) -> list[str]:
        """The predictions that wait to be repeated by a shadow, oldest first."""
        rows = self._database.rows(
            "SELECT prediction_id FROM shadows WHERE bundle_id = ? AND job_id = '' ORDER BY rowid LIMIT ?",
            bundle_id,
            limit,
        )
        return [row["prediction_id"] for row in rows]

    def queue_shadow(self, prediction_id: str, choice: Choice) -> None:
        """Queues the repetition of a prediction by a shadow; its result is kept apart from that of the request."""
        record = self.prediction(prediction_id)
        job = self._queue.job(record.job_id) if record else None
        if record is None or job is None:
            return
        request = job_request(SHADOW_OWNER, record.site, job.payload["slides"], choice, Priority.ROUTINE, "shadow")
        shadow = self._queue.submit(request)
        with self._database.transaction() as connection:
            connection.execute(
                "UPDATE shadows SET job_id = ? WHERE prediction_id = ? AND bundle_id = ?",
                (shadow.id, prediction_id, choice.bundle_id),
            )

    def shadow_jobs(self, bundle_id: str) -> list[tuple[PredictionRecord, str]]:
        """The predictions that a shadow repeats, each with the shadow's job."""
        rows = self._database.rows(
            """SELECT predictions.*, shadows.job_id AS shadow_job FROM shadows JOIN predictions ON id = prediction_id
            WHERE shadows.bundle_id = ? AND shadows.job_id != '' ORDER BY sequence""",
            bundle_id,
        )
        return [(_record(row), row["shadow_job"]) for row in rows]

    def drop_shadows(self, bundle_id: str) -> None:
        """Cancels what a withdrawn shadow has not predicted yet."""
        for _, job_id in self.shadow_jobs(bundle_id):
            self._queue.cancel(job_id)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM shadows WHERE bundle_id = ? AND job_id = ''", (bundle_id,))


def job_request(
    owner: str,
    site: str,
    slides: Sequence[Mapping[str, Any]],
    choice: Choice,
    priority: Priority,
    purpose: str = "request",
) -> JobRequest:
    """The job of a case. Sites do not share results, so that none learns what another has.

    Args:
      owner, site: who asks for it.
      slides: content, path and µm per pixel of each.
      choice: the bundle that predicts, which is part of the result's key.
      priority: urgent or routine.
      purpose: results of a `shadow` are not shared with a `request`.
    """
    contents = [[slide["content"], slide["mpp"]] for slide in slides]
    values = [site, choice.bundle_id, crcjax.__version__, contents, *([purpose] if purpose != "request" else [])]
    key = hashlib.sha256(json.dumps(values).encode()).hexdigest()
    payload = {"slides": list(slides), "bundle": str(choice.folder)}
    return JobRequest(key, owner, payload, priority, site)


def _record(row: sqlite3.Row) -> PredictionRecord:
    return PredictionRecord(
        *(row["sequence"], row["id"], row["site"], row["owner"], row["case_id"]),
        slides=tuple(json.loads(row["slides"])),
        job_id=row["job_id"],
        requested_s=row["requested_s"],
        is_cancelled=bool(row["cancelled"]),
        bundle_id=row["bundle_id"],
    )
