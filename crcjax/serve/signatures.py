"""Signatures of results: a pathologist agrees with the predicted class, or records another call with a reason.

A signature is bound to the result by its hash, and to the signature before it, so that a version cannot be left out or changed
unnoticed. Versions are only ever added: a correction is a new version with a reason. Each one is in the log before it counts.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from crcjax.errors import CrcjaxError
from crcjax.serve.database import Database

MIGRATIONS = (
    (
        """CREATE TABLE signatures (
          prediction_id TEXT NOT NULL,
          version INTEGER NOT NULL,
          content TEXT NOT NULL,
          sha256 TEXT NOT NULL,
          PRIMARY KEY (prediction_id, version)
        )""",
        """CREATE TRIGGER signatures_stay BEFORE UPDATE ON signatures
        BEGIN SELECT RAISE(ABORT, 'signatures are never changed'); END""",
    ),
)
# The `previous_sha256` of a first version.
NONE_BEFORE = ""
# The call for a case that allows none.
NOT_EVALUABLE = "not evaluable"


class Meaning(StrEnum):
    """What a signature says."""

    AGREE = "agree"
    DISAGREE = "disagree"

    @property
    def text(self) -> str:
        """The meaning in words, as the signer reads it."""
        if self == Meaning.AGREE:
            return "I have reviewed the slides of this case and agree with the predicted class"
        return "I have reviewed the slides of this case and make another call"


class SignatureRefusedError(CrcjaxError):
    """A signature is incomplete, or does not fit the result."""


class SignatureConflictError(CrcjaxError):
    """The result, or its newest signature, is not the one that the signer saw."""


@dataclass(frozen=True)
class Signature:
    """One version of the signature of a prediction.

    Attributes:
      prediction: the id of the prediction.
      version: from 1.
      result_sha256: the hash of the result that was signed (`result_hash`).
      meaning: agreement, or another call.
      calls: the call of each slide in agreement with the prediction; one call of the signer's for the case otherwise.
      reason: of another call, and of every version after the first; may be empty otherwise.
      signer: the account.
      signed_s: Unix time.
      previous_sha256: the hash of the version before it, NONE_BEFORE for the first.
      sha256: of all of the above.
    """

    prediction: str
    version: int
    result_sha256: str
    meaning: Meaning
    calls: tuple[str, ...]
    reason: str
    signer: str
    signed_s: float
    previous_sha256: str
    sha256: str


def result_hash(prediction_id: str, result: Mapping[str, Any]) -> str:
    """The SHA-256 of a prediction's committed result."""
    return _sha256({"prediction": prediction_id, "result": result})


class Signatures:
    """The table of signatures.

    Args:
      database: its tables are those of MIGRATIONS.
      log: records a signature (`EventLog.append`); if it fails, nothing is signed.
      now: the Unix time in seconds.
    """

    def __init__(self, database: Database, log: Callable[..., object], now: Callable[[], float] = time.time):
        self._database, self._log, self._now = database, log, now

    def sign(
        self,
        prediction_id: str,
        result: Mapping[str, Any],
        *,
        site: str,
        signer: str,
        result_sha256: str,
        after_version: int,
        call: str | None,
        reason: str,
    ) -> Signature:
        """Adds a version, and returns it.

        Args:
          prediction_id: the prediction.
          result: its committed result.
          site: the prediction's site, for the log.
          signer: the account, which has just proved who it is.
          result_sha256: the hash of the result that the signer saw.
          after_version: the newest version that the signer saw, 0 for none.
          call: another class or NOT_EVALUABLE; None agrees with the predicted ones.
          reason: required for another call, and for every version after the first.

        Raises:
          SignatureRefusedError: a reason is missing, the call is no class, or there is no predicted class to agree with.
          SignatureConflictError: the result or the newest version is another one.
          OutputError: the log cannot be written.
        """
        calls = _calls(result, call)
        reason = reason.strip()
        if not reason and (call is not None or after_version):
            what = "another call" if call is not None else "a correction"
            raise SignatureRefusedError(f"reason must be given for {what}, got none")
        if result_sha256 != result_hash(prediction_id, result):
            raise SignatureConflictError("the result is not the one that was shown; read it again")
        with self._database.transaction() as connection:
            newest = _newest(connection, prediction_id)
            if after_version != (newest.version if newest else 0):
                raise SignatureConflictError(
                    f"after_version must be {newest.version if newest else 0}, the newest, got {after_version}; read it again"
                )
            content = {
                "prediction": prediction_id,
                "version": after_version + 1,
                "result_sha256": result_sha256,
                "meaning": Meaning.AGREE if call is None else Meaning.DISAGREE,
                "calls": calls,
                "reason": reason,
                "signer": signer,
                "signed_s": self._now(),
                "previous_sha256": newest.sha256 if newest else NONE_BEFORE,
            }
            signature = _signature(content, _sha256(content))
            connection.execute(
                "INSERT INTO signatures VALUES (?, ?, ?, ?)",
                (prediction_id, signature.version, json.dumps(content), signature.sha256),
            )
            # Within the transaction: what is not in the log is not signed. The reason may name a person, and a log forgets nothing;
            # the hash holds it fast.
            logged = {name: value for name, value in asdict(signature).items() if name != "reason"}
            self._log("signature", site=site, **logged)
        return signature

    def versions(self, prediction_id: str) -> list[Signature]:
        """The versions of a prediction's signature, oldest first."""
        rows = self._database.rows("SELECT * FROM signatures WHERE prediction_id = ? ORDER BY version", prediction_id)
        return [_signature(json.loads(row["content"]), row["sha256"]) for row in rows]

    def newest(self, prediction_ids: Sequence[str]) -> dict[str, Signature]:
        """The newest version for each of the predictions that are signed."""
        marks = ", ".join("?" * len(prediction_ids))
        rows = self._database.rows(
            f"SELECT * FROM signatures WHERE prediction_id IN ({marks}) ORDER BY version", *prediction_ids
        )
        return {row["prediction_id"]: _signature(json.loads(row["content"]), row["sha256"]) for row in rows}


def are_intact(versions: Sequence[Signature], result_sha256: str) -> bool:
    """Whether all versions are there, unchanged, and of this result."""
    previous = NONE_BEFORE
    for number, signature in enumerate(versions, 1):
        content = {name: value for name, value in asdict(signature).items() if name != "sha256"}
        is_next = (signature.version, signature.previous_sha256) == (number, previous)
        if not is_next or signature.sha256 != _sha256(content) or signature.result_sha256 != result_sha256:
            return False
        previous = signature.sha256
    return True


def _calls(result: Mapping[str, Any], call: str | None) -> list[str]:
    if call is None:
        predicted = [row["call"] for row in result["slides"]]
        if not any(predicted):
            raise SignatureRefusedError("call must be given, since no slide of the case has a predicted class")
        return predicted
    if call not in (*result["classes"], NOT_EVALUABLE):
        known = ", ".join((*result["classes"], NOT_EVALUABLE))
        raise SignatureRefusedError(f"call must be one of {known}, got {call!r}")
    return [call]


def _newest(connection: sqlite3.Connection, prediction_id: str) -> Signature | None:
    row = connection.execute(
        "SELECT * FROM signatures WHERE prediction_id = ? ORDER BY version DESC LIMIT 1", (prediction_id,)
    ).fetchone()
    return None if row is None else _signature(json.loads(row["content"]), row["sha256"])


def _signature(content: Mapping[str, Any], sha256: str) -> Signature:
    changed = {"meaning": Meaning(content["meaning"]), "calls": tuple(content["calls"]), "sha256": sha256}
    return Signature(**{**content, **changed})


def _sha256(content: Mapping[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
