"""What the log of a model registry says: versions, aliases, evidence, approvals.

REGISTRY/registry.jsonl    the hash-chained log, from which everything follows
REGISTRY/bundles/ID/       a copy of each bundle
REGISTRY/evidence/SHA256   a copy of each file of evidence
REGISTRY/canary.key        the key by which cases are chosen for a canary
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from crcjax.errors import InputError
from crcjax.lifecycle.evidence import Evidence
from crcjax.lifecycle.policy import STAGES, Policy, parse_policy, policy_sha256
from crcjax.monitor.event_log import START, Event, read_events, verify
from crcjax.runs.signature import is_signed_by_hex

LOG, BUNDLES, EVIDENCE, CANARY_KEY = "registry.jsonl", "bundles", "evidence", "canary.key"
ALIASES = ("candidate", *STAGES)
CREATED, POLICY, ADDED, EVIDENCE_ADDED = "registry_created", "policy_adopted", "bundle_added", "evidence_added"
APPROVED, PROMOTED, ROLLED_BACK = "approved", "promoted", "rolled_back"


@dataclass(frozen=True)
class Version:
    """A bundle of the registry.

    Attributes:
      number: its version, from 1.
      bundle_id: the SHA-256 of its bundle.json.
      target, classes: what it predicts.
      lineage: its members with the hashes of their configs and data manifests, the code that exported it, and its parent.
      added_at, added_by: when (UTC, ISO 8601), and the name that was given.
    """

    number: int
    bundle_id: str
    target: str
    classes: tuple[str, ...]
    lineage: Mapping[str, Any]
    added_at: str
    added_by: str


@dataclass(frozen=True)
class Approval:
    """A person's signed approval of a subject, such as `canary:BUNDLE_ID`."""

    subject: str
    person: str
    signature: str


@dataclass(frozen=True)
class RegistryState:
    """The registry after an event.

    Attributes:
      path: its folder.
      id: a random name, part of what people sign.
      policy, policy_sha256: the policy in force.
      versions: all bundles, in the order in which they were added.
      aliases: the bundle of each alias that has one.
      evidence: the newest evidence of each bundle by kind.
      withdrawn: the bundles that were rolled back and not promoted since.
      predecessors: the bundles that production had before the present one, newest last.
      approvals: those given since the last change of an alias or of the policy.
      epoch: the hash of that change, part of what people sign, so that no approval can be used twice.
      events: the log.
    """

    path: Path
    id: str = ""
    policy: Policy = field(default_factory=Policy)
    policy_sha256: str = ""
    versions: tuple[Version, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, Mapping[str, Evidence]] = field(default_factory=dict)
    withdrawn: frozenset[str] = frozenset()
    predecessors: tuple[str, ...] = ()
    approvals: tuple[Approval, ...] = ()
    epoch: str = START
    events: tuple[Event, ...] = ()

    def version(self, name: str) -> Version:
        """The bundle of a version number, an alias, or the first digits (at least 6) of an id. Raises InputError."""
        bundle_id = self.aliases.get(name, name)
        matches = [
            v
            for v in self.versions
            if str(v.number) == name or (len(bundle_id) > 5 and v.bundle_id.startswith(bundle_id))
        ]
        if len(matches) != 1:
            known = ", ".join(str(version.number) for version in self.versions) or "none"
            raise InputError(
                f"{self.path}: must have one bundle {name!r}, got {len(matches)}; give a version ({known}), an alias "
                f"({', '.join(self.aliases) or 'none'}) or the first digits of an id"
            )
        return matches[0]

    def alias_of(self, bundle_id: str) -> str:
        """The alias of a bundle that counts most; empty without one."""
        return next((alias for alias in reversed(ALIASES) if self.aliases.get(alias) == bundle_id), "")

    def folder(self, bundle_id: str) -> Path:
        """The folder of a bundle."""
        return self.path / BUNDLES / bundle_id


def is_registry(path: Path) -> bool:
    """Whether a folder is a model registry."""
    return (path / LOG).is_file()


def read_registry(path: Path) -> RegistryState:
    """Reads and verifies the log. Raises InputError if it is damaged, or records a promotion that nobody could approve so."""
    if not is_registry(path):
        raise InputError(f"{path}: is not a model registry (no {LOG}); make one with crcjax models add")
    broken = verify(path / LOG)
    if broken is not None and not broken.is_unfinished:
        raise InputError(f"{path / LOG}: line {broken.line} {broken.reason}; restore the file from a copy")
    state, events = RegistryState(path), read_events(path / LOG)
    for number, event in enumerate(events, 1):
        try:
            state = _APPLY.get(event.kind, _ignored)(state, event)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{path / LOG}: line {number} ({event.kind}) is not valid: {error}; restore the file from a copy"
            ) from error
    return replace(state, events=tuple(events))


def statement(state: RegistryState, subject: str) -> bytes:
    """What a person signs: the registry, the subject, its evidence, the policy, and the last change before it."""
    bundle_id = subject.partition(":")[2]
    evidence = {kind: newest.sha256 for kind, newest in sorted(state.evidence.get(bundle_id, {}).items())}
    values = {"registry": state.id, "subject": subject, "evidence": evidence}
    return json.dumps(values | {"policy": state.policy_sha256, "epoch": state.epoch}, sort_keys=True).encode()


def approvers(state: RegistryState, subject: str) -> list[str]:
    """The people of the policy whose approvals of a subject are valid as the registry stands."""
    content, people = statement(state, subject), state.policy.people
    return sorted(
        {
            approval.person
            for approval in state.approvals
            if approval.subject == subject
            and approval.person in people
            and _is_signed(people[approval.person], content, bytes.fromhex(approval.signature))
        }
    )


def obstacles(state: RegistryState, stage: str, bundle_id: str) -> list[str]:
    """What forbids a promotion whoever approves it, in words; empty if nothing does."""
    rule, evidence = state.policy.stage(stage), state.evidence.get(bundle_id, {})
    missing = ["the policy is locked: nothing is promoted"] if state.policy.locked else []
    for kind in rule.evidence:
        if kind not in evidence:
            missing.append(f"evidence {kind!r} is missing")
        elif not evidence[kind].passed:
            missing.append(f"evidence {kind!r} did not pass: {evidence[kind].reason}")
    if stage != "production" and "production" not in state.aliases:
        missing.append(f"there is no bundle in production, so none can be {stage}")
    if stage != "production" and state.aliases.get("production") == bundle_id:
        missing.append("it is in production")
    return missing


def missing_approvals(state: RegistryState, stage: str, bundle_id: str) -> str:
    """The approvals that a promotion still needs, in words; empty if it has them."""
    people, needed = approvers(state, f"{stage}:{bundle_id}"), state.policy.stage(stage).people
    if len(people) >= needed:
        return ""
    return f"{len(people)} of {needed} approvals" + (f" (by {', '.join(people)})" if people else "")


# A service reads the whole log after each change: signatures that it has verified need not be verified again.
_is_signed = lru_cache(maxsize=65_536)(is_signed_by_hex)


def _ignored(state: RegistryState, event: Event) -> RegistryState:
    return state


def _created(state: RegistryState, event: Event) -> RegistryState:
    return replace(state, id=event.facts["registry_id"])


def _policy(state: RegistryState, event: Event) -> RegistryState:
    text = event.facts["text"]
    subject = f"policy:{policy_sha256(text)}"
    if state.policy.people and len(approvers(state, subject)) < 2:
        raise ValueError("the policy was changed without the approval of two people")
    policy = parse_policy(text, "policy")
    return replace(state, policy=policy, policy_sha256=policy_sha256(text), approvals=(), epoch=event.hash)


def _added(state: RegistryState, event: Event) -> RegistryState:
    facts = event.facts
    version = Version(
        *(facts["version"], facts["bundle_id"], facts["target"], tuple(facts["classes"]), facts["lineage"]),
        *(event.time, facts["by"]),
    )
    aliases = {**state.aliases, "candidate": version.bundle_id}
    return replace(state, versions=(*state.versions, version), aliases=aliases)


def _evidence_added(state: RegistryState, event: Event) -> RegistryState:
    facts = event.facts
    evidence = Evidence(facts["bundle_id"], facts["passed"], facts["reason"], facts["sha256"])
    of_bundle = {**state.evidence.get(evidence.bundle_id, {}), facts["evidence"]: evidence}
    return replace(state, evidence={**state.evidence, evidence.bundle_id: of_bundle})


def _approved(state: RegistryState, event: Event) -> RegistryState:
    approval = Approval(event.facts["subject"], event.facts["by"], event.facts["signature"])
    return replace(state, approvals=(*state.approvals, approval))


def _promoted(state: RegistryState, event: Event) -> RegistryState:
    bundle_id, stage = event.facts["bundle_id"], event.facts["alias"]
    approvals = missing_approvals(state, stage, bundle_id)
    if missing := [*obstacles(state, stage, bundle_id), *filter(None, [approvals])]:
        raise ValueError("; ".join(missing))
    # A bundle has one alias: it leaves the stage before.
    aliases = {alias: other for alias, other in state.aliases.items() if other != bundle_id} | {stage: bundle_id}
    predecessors = state.predecessors
    if stage == "production" and "production" in state.aliases:
        predecessors = (*predecessors, state.aliases["production"])
    return replace(
        state,
        aliases=aliases,
        predecessors=predecessors,
        withdrawn=state.withdrawn - {bundle_id},
        approvals=(),
        epoch=event.hash,
    )


def _rolled_back(state: RegistryState, event: Event) -> RegistryState:
    stage, bundle_id, successor = event.facts["alias"], event.facts["bundle_id"], event.facts["to"]
    aliases = {alias: other for alias, other in state.aliases.items() if other != bundle_id}
    predecessors = state.predecessors
    if successor:
        aliases = {alias: other for alias, other in aliases.items() if other != successor} | {stage: successor}
        predecessors = predecessors[: len(predecessors) - 1 - predecessors[::-1].index(successor)]
    return replace(
        state,
        aliases=aliases,
        predecessors=predecessors,
        withdrawn=state.withdrawn | {bundle_id},
        approvals=(),
        epoch=event.hash,
    )


def successor_of(state: RegistryState, stage: str) -> str | None:
    """The bundle that takes the place of a rolled-back one: in production the one before it; None if no bundle does."""
    usable: Sequence[str] = [other for other in state.predecessors if other not in state.withdrawn]
    return usable[-1] if stage == "production" and usable else None


_APPLY = {
    CREATED: _created,
    POLICY: _policy,
    ADDED: _added,
    EVIDENCE_ADDED: _evidence_added,
    APPROVED: _approved,
    PROMOTED: _promoted,
    ROLLED_BACK: _rolled_back,
}
