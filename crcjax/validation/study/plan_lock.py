"""Locks an analysis plan before unblinding, and shows every later change.

The lock is an entry of a hash-chained log beside the plan (`monitor.event_log`): plan.toml has plan.lock.jsonl. Entries are
never removed; whoever keeps the log's last hash elsewhere can prove that it was not rewritten.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import crcjax
from crcjax.errors import InputError
from crcjax.monitor.event_log import EventLog, read_events, verify
from crcjax.validation.study.read_plan import PlanFile

_LOCKED = "plan_locked"


@dataclass(frozen=True)
class LockedVersion:
    """A version of the plan that was locked: when (UTC), its hash, its text, and the hashes of the files that existed then."""

    time: str
    sha256: str
    text: str
    files: dict[str, str]


@dataclass(frozen=True)
class PlanState:
    """What is known of a plan's lock.

    Attributes:
      versions: the locked versions, oldest first.
      is_current: whether the newest one is the plan that is in use.
      changes: a sentence and the changed lines for each step from the first version to the plan in use.
      fault: how the log was damaged; empty if it is whole.
    """

    versions: tuple[LockedVersion, ...]
    is_current: bool
    changes: tuple[tuple[str, tuple[str, ...]], ...]
    fault: str

    @property
    def sentence(self) -> str:
        """The state in words."""
        if self.fault:
            return f"The log of the plan's lock is damaged: {self.fault}."
        if not self.versions:
            return "The plan was not locked: nothing shows that it was written before the results were seen."
        first = self.versions[0]
        existing = " and the ".join(name for name in ("predictions", "cohort") if name in first.files)
        since = f" The {existing} existed then." if existing else " Neither predictions nor cohort existed then."
        times = {0: "has not changed since", 1: "has changed once since, as listed"}
        state = times.get(len(self.changes), f"has changed {len(self.changes)} times since, as listed")
        return f"The plan was locked on {first.time[:19].replace('T', ' ')} UTC and {state}.{since}"


def lock_file(plan: Path) -> Path:
    """The log of a plan's lock."""
    return plan.with_suffix(".lock.jsonl")


def lock_plan(plan: PlanFile, further: Sequence[Path] = ()) -> PlanState:
    """Locks the plan as it is; a plan that is locked already stays locked since then.

    Args:
      plan: the plan.
      further: files whose hashes the lock records too, such as a bundle's bundle.json.

    Raises:
      InputError: the log is damaged, or a file cannot be read.
      OutputError: the log cannot be written.
    """
    state = plan_state(plan)
    if state.fault:
        raise InputError(f"{lock_file(plan.path)}: {state.fault}; restore it from a copy")
    if not state.is_current:
        files = {name: sha256_of(path) for name, path in plan.plan.data if path is not None and path.is_file()}
        files |= {str(path): sha256_of(path) for path in further}
        EventLog(lock_file(plan.path)).append(
            *(_LOCKED,),
            plan_sha256=plan.sha256,
            title=plan.plan.title,
            version=plan.plan.version,
            crcjax=crcjax.__version__,
            files=files,
            text=plan.text,
        )
    return plan_state(plan)


def plan_state(plan: PlanFile) -> PlanState:
    """Compares the plan with the versions in its log. Raises nothing: a damaged log is a state."""
    path = lock_file(plan.path)
    broken = verify(path)
    fault = f"line {broken.line} {broken.reason}" if broken else ""
    versions = tuple(
        LockedVersion(event.time, event.facts["plan_sha256"], event.facts["text"], event.facts["files"])
        for event in read_events(path)
        if event.kind == _LOCKED
    )
    texts = [(f"locked again on {version.time[:19].replace('T', ' ')} UTC", version.text) for version in versions]
    if versions and versions[-1].sha256 != plan.sha256:
        texts.append(("in use, not locked", plan.text))
    changes = tuple(
        (name, tuple(_changed_lines(before, after))) for (_, before), (name, after) in itertools.pairwise(texts)
    )
    return PlanState(versions, bool(versions) and versions[-1].sha256 == plan.sha256, changes, fault)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file. Raises InputError if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from error


def _changed_lines(before: str, after: str) -> list[str]:
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]
