"""Evidence for a promotion: a JSON file that names the bundle it is about, and says whether the bundle passed.

Two forms are read: results.json of `crcjax validate --plan`, which passes if its plan is locked and every primary gate passed,
and `{"bundle_id": …, "passed": …, "reason": …}`, which the other commands of the lifecycle write.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crcjax.errors import InputError


@dataclass(frozen=True)
class Evidence:
    """What a file of evidence says of a bundle, and the SHA-256 of the file."""

    bundle_id: str
    passed: bool
    reason: str
    sha256: str


def read_evidence(path: Path) -> tuple[bytes, Evidence]:
    """The content of a file of evidence and what it says. Raises InputError if it is no evidence, or of several bundles."""
    try:
        content = path.read_bytes()
        values = json.loads(content)
        bundle_id, passed, reason = _of_study(values) if "gates" in values else _of_step(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is no evidence ({error}); give results.json of crcjax validate --plan, or the JSON file of a crcjax "
            "lifecycle command"
        ) from error
    return content, Evidence(bundle_id, passed, reason, hashlib.sha256(content).hexdigest())


def _of_step(values: dict[str, Any]) -> tuple[str, bool, str]:
    bundle_id, passed, reason = values["bundle_id"], values["passed"], values["reason"]
    if not isinstance(bundle_id, str) or not isinstance(passed, bool) or not isinstance(reason, str):
        raise ValueError("bundle_id and reason must be texts, and passed true or false")
    return bundle_id, passed, reason


def _of_study(values: dict[str, Any]) -> tuple[str, bool, str]:
    bundles = values["predicted_by"].get("bundle_id", [])
    if len(bundles) != 1:
        raise ValueError(f"its predictions must be of one bundle, got {len(bundles)}; predict with --bundle")
    primary = [gate for gate in values["gates"] if gate["role"] in ("primary", "co_primary")]
    if not values["plan"]["is_locked"]:
        return bundles[0], False, "the analysis plan is not locked"
    if not primary:
        return bundles[0], False, "the analysis plan has no primary gate"
    missed = [
        f"{gate['title']}: {gate['verdict']}, {gate['sentence']}" for gate in primary if gate["verdict"] != "passed"
    ]
    return bundles[0], not missed, "; ".join(missed) or "every primary gate passed"
