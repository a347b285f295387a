"""Changes of a model registry: each reads the log under a lock, checks the rules, and appends one event.

Any number of processes on one machine may do so at the same time.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crcjax.errors import InputError, writing
from crcjax.lifecycle.evidence import read_evidence
from crcjax.lifecycle.policy import STAGES, policy_sha256, read_policy
from crcjax.lifecycle.registry_state import (
    ADDED,
    APPROVED,
    CANARY_KEY,
    CREATED,
    EVIDENCE,
    EVIDENCE_ADDED,
    LOG,
    POLICY,
    PROMOTED,
    ROLLED_BACK,
    RegistryState,
    Version,
    approvers,
    is_registry,
    missing_approvals,
    obstacles,
    read_registry,
    statement,
    successor_of,
)
from crcjax.monitor.event_log import EventLog
from crcjax.runs.signature import public_key_of, sign

_LOCK = ".lock"
_INSTEAD = "ask for permission to write to the registry"


@dataclass(frozen=True)
class PromotionResult:
    """The registry after an approval, and the approvals that the change still needs; empty if it was made."""

    state: RegistryState
    missing: str


def add_bundle(
    registry: Path,
    bundle: Path,
    by: str,
    *,
    parent: str | None = None,
    policy: Path | None = None,
    trust: tuple[Path, ...] = (),
) -> Version:
    """Copies a bundle into a registry, which is made if there is none. The bundle becomes the candidate.

    Args:
      registry: the folder.
      bundle: the folder of the bundle; every file of it is checked.
      by: who adds it.
      parent: the version, alias or id that it was retrained from; by default the bundle in production.
      policy: the policy of a new registry.
      trust: public keys, one of which must have signed the bundle.

    Raises:
      InputError: the bundle is damaged, is there already, or predicts something else than the registry's bundles.
      OutputError: the registry cannot be written.
    """
    from crcjax.runs.bundle import open_bundle

    opened = open_bundle(bundle, trust)
    manifest = json.loads((bundle / "bundle.json").read_bytes())
    with _change(registry, policy, create=True) as (state, log):
        earlier = next((version for version in state.versions if version.bundle_id == opened.id), None)
        if earlier:
            raise InputError(f"{bundle}: is version {earlier.number} of {registry} already; nothing was added")
        first = state.versions[0] if state.versions else None
        if first and (first.target, first.classes) != (opened.target.name, opened.target.classes):
            raise InputError(
                f"{bundle}: must predict {first.target} ({', '.join(first.classes)}) as the registry's other bundles do, got "
                f"{opened.target.name} ({', '.join(opened.target.classes)}); add it to another registry"
            )
        origin = parent or state.aliases.get("production")
        _copy(bundle, state.folder(opened.id))
        # The copy is checked too: the bundle may have changed in the meantime.
        if open_bundle(state.folder(opened.id)).id != opened.id:
            raise InputError(f"{bundle}: changed while it was copied; add it again")
        log.append(
            ADDED,
            version=len(state.versions) + 1,
            bundle_id=opened.id,
            target=opened.target.name,
            classes=list(opened.target.classes),
            lineage={
                "members": manifest["members"],
                "code": manifest.get("made_by", {}),
                "parent": state.version(origin).bundle_id if origin else None,
                "is_signed": opened.is_signed,
            },
            by=by,
        )
    return read_registry(registry).version(opened.id)


def add_evidence(registry: Path, bundle: str, kind: str, file: Path) -> RegistryState:
    """Records a file of evidence for a bundle (a version, alias or id); the newest of each kind counts.

    Raises InputError if the file is no evidence or is about another bundle, OutputError.
    """
    content, evidence = read_evidence(file)
    with _change(registry) as (state, log):
        version = state.version(bundle)
        if evidence.bundle_id != version.bundle_id:
            raise InputError(
                f"{file}: must be about the bundle {version.bundle_id[:12]} (version {version.number}), got "
                f"{evidence.bundle_id[:12]}; give the evidence of this bundle"
            )
        copy = registry / EVIDENCE / evidence.sha256
        with writing(copy, _INSTEAD):
            copy.parent.mkdir(exist_ok=True)
            copy.write_bytes(content)
        log.append(EVIDENCE_ADDED, evidence=kind, **vars(evidence))
    return read_registry(registry)


def promote(
    registry: Path,
    bundle: str,
    stage: str,
    by: str = "",
    key: Path | None = None,
    evidence: Mapping[str, Path] | None = None,
) -> PromotionResult:
    """Approves the promotion of a bundle, and promotes it once the policy's evidence and people are complete.

    Args:
      registry: the folder.
      bundle: a version, alias or id.
      stage: `shadow`, `canary` or `production`.
      by: who approves, by the name in the policy; empty for a stage that needs nobody.
      key: the file of that person's private key.
      evidence: files of evidence to be added first, by kind.

    Raises:
      InputError: the policy is locked or does not know the person or the key; evidence is missing or did not pass. The
        log then has no new approval.
      OutputError: the registry cannot be written.
    """
    if stage not in STAGES:
        raise InputError(f"stage must be one of {', '.join(STAGES)}, got {stage!r}")
    for kind, file in (evidence or {}).items():
        add_evidence(registry, bundle, kind, file)
    with _change(registry) as (state, log):
        version = state.version(bundle)
        if state.aliases.get(stage) == version.bundle_id:
            return PromotionResult(state, "")
        subject = f"{stage}:{version.bundle_id}"
        if blocking := obstacles(state, stage, version.bundle_id):
            raise InputError(f"{registry}: version {version.number} cannot become {stage}: {'; '.join(blocking)}")
        if by:
            _approve(state, log, subject, by, key)
            state = read_registry(registry)
        missing = missing_approvals(state, stage, version.bundle_id)
        if not missing:
            log.append(PROMOTED, bundle_id=version.bundle_id, alias=stage, by=approvers(state, subject))
            state = read_registry(registry)
    return PromotionResult(state, missing)


def roll_back(registry: Path, stage: str, by: str, reason: str, bundle_id: str | None = None) -> RegistryState:
    """Takes a bundle out of a stage at once. In production the one before takes its place.

    One person, or a guard rail, suffices: a rollback returns to a state that was approved before.

    Args:
      registry: the folder.
      stage: `shadow`, `canary` or `production`.
      by: who does it.
      reason: why.
      bundle_id: does nothing unless the stage has this bundle; by default whichever it has.

    Raises:
      InputError: the stage has no bundle, or production had none before.
      OutputError: the registry cannot be written.
    """
    with _change(registry) as (state, log):
        current = state.aliases.get(stage) if stage in STAGES else None
        if bundle_id is not None and current != bundle_id:
            return state
        if current is None:
            raise InputError(f"{registry}: has no bundle in {stage!r} to roll back; see crcjax models list")
        successor = successor_of(state, stage)
        if stage == "production" and successor is None:
            raise InputError(f"{registry}: production had no other bundle before; promote one, or stop the service")
        log.append(ROLLED_BACK, alias=stage, bundle_id=current, to=successor, by=by, reason=reason)
    return read_registry(registry)


def adopt_policy(registry: Path, policy: Path, by: str = "", key: Path | None = None) -> PromotionResult:
    """Approves another policy, which is in force once two people of the present policy have approved it.

    A registry without people adopts the policy at once. Raises InputError, OutputError.
    """
    text, _ = read_policy(policy)
    subject = f"policy:{policy_sha256(text)}"
    with _change(registry) as (state, log):
        if state.policy_sha256 == policy_sha256(text):
            return PromotionResult(state, "")
        if state.policy.people:
            _approve(state, log, subject, by, key)
            state = read_registry(registry)
            people = approvers(state, subject)
            if len(people) < 2:
                return PromotionResult(state, f"1 of 2 approvals (by {people[0]})")
        log.append(POLICY, text=text, sha256=policy_sha256(text), by=approvers(state, subject))
    return PromotionResult(read_registry(registry), "")


def _approve(state: RegistryState, log: EventLog, subject: str, by: str, key: Path | None) -> None:
    """Raises InputError unless the key is that of a person of the policy."""
    people = state.policy.people
    if by not in people:
        raise InputError(
            f"{state.path}: {by!r} may not approve; the policy names {', '.join(people) or 'nobody'}; add people to it "
            "with crcjax models policy"
        )
    if key is None or public_key_of(key) != people[by]:
        raise InputError(f"{key}: must be the private key of {by}, whose public key the policy has; give it with --key")
    if by not in approvers(state, subject):
        log.append(APPROVED, subject=subject, by=by, signature=sign(key, statement(state, subject)).hex())


@contextmanager
def _change(
    registry: Path, policy: Path | None = None, *, create: bool = False
) -> Iterator[tuple[RegistryState, EventLog]]:
    """The state of a registry and its log while no other process changes it; with `create`, a new one is made first."""
    if not create:
        read_registry(registry)
    text = read_policy(policy)[0] if policy else ""
    with writing(registry, _INSTEAD):
        registry.mkdir(parents=True, exist_ok=True)
        lock = os.open(registry / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        log = EventLog(registry / LOG)
        if not is_registry(registry):
            with writing(registry, _INSTEAD):
                key = os.open(registry / CANARY_KEY, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.write(key, secrets.token_hex(32).encode())
                os.close(key)
            log.append(CREATED, registry_id=secrets.token_hex(8))
            if policy:
                log.append(POLICY, text=text, sha256=policy_sha256(text), by=[])
        elif policy:
            raise InputError(f"{registry}: has a policy already; change it with crcjax models policy")
        yield read_registry(registry), log
    finally:
        # Closing releases the lock.
        os.close(lock)


def _copy(bundle: Path, folder: Path) -> None:
    """Copies a folder, which appears under its name when it is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    with writing(folder, _INSTEAD):
        folder.parent.mkdir(exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        if not folder.exists():
            shutil.copytree(bundle, partial)
            partial.rename(folder)
