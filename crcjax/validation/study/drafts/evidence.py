"""What a draft may state: the results, the plan that they belong to, and the model card of the bundle that predicted."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crcjax.errors import InputError
from crcjax.validation.study.drafts.software_list import Package, installed_packages
from crcjax.validation.study.plan import Plan
from crcjax.validation.study.plan_lock import sha256_of
from crcjax.validation.study.read_plan import read_plan
from crcjax.validation.study.results import FORMAT

_MANIFEST, _CARD = "bundle.json", "model_card.md"


@dataclass(frozen=True)
class Evidence:
    """The sources of a draft.

    Attributes:
      results: the content of results.json.
      plan: the plan with the hash that the results state.
      plan_name: the plan's file name.
      card: the bundle's model card as Markdown; empty without a bundle.
      bundle_id: the SHA-256 of the bundle's bundle.json; empty without a bundle.
      packages: the installed crcjax and what it needs.
    """

    results: dict[str, Any]
    plan: Plan
    plan_name: str
    card: str = ""
    bundle_id: str = ""
    packages: tuple[Package, ...] = ()

    @property
    def data_sha256(self) -> str:
        """One hash for all tables: that of their names and hashes as results.json lists them."""
        text = "".join(f"{name} {file['sha256']}\n" for name, file in sorted(self.results["inputs"].items()))
        return hashlib.sha256(text.encode()).hexdigest()


def read_evidence(results: Path, plan: Path, bundle: Path | None = None) -> Evidence:
    """Reads the sources of drafts.

    Args:
      results: results.json of crcjax validate --plan.
      plan: the plan's file.
      bundle: the folder of the bundle that predicted.

    Raises:
      InputError: a file cannot be read, the results are of another plan, or the predictions are of another bundle.
    """
    content = _read_json(results, "give the results.json of crcjax validate --plan")
    if content.get("format") != FORMAT or "estimates" not in content:
        raise InputError(
            f"{results}: must be the results of a plan in format {FORMAT}, got format {content.get('format')!r}; run "
            "crcjax validate --plan again"
        )
    plan_file = read_plan(plan)
    if plan_file.sha256 != content["plan"]["sha256"]:
        raise InputError(
            f"{plan}: is not the plan of {results}: its SHA-256 is {plan_file.sha256}, the results' is "
            f"{content['plan']['sha256']}; give that plan, or validate again"
        )
    card, bundle_id = ("", "") if bundle is None else _read_card(bundle, content["predicted_by"]["bundle_id"])
    return Evidence(content, plan_file.plan, plan.name, card, bundle_id, installed_packages())


def _read_card(bundle: Path, predicted_by: list[str]) -> tuple[str, str]:
    manifest = _read_json(bundle / _MANIFEST, "give the folder that crcjax checkpoints export wrote")
    bundle_id = sha256_of(bundle / _MANIFEST)
    if bundle_id not in predicted_by:
        raise InputError(
            f"{bundle}: its id is {bundle_id}, and the predictions are of {', '.join(predicted_by) or 'no bundle'}; give the "
            "bundle that predicted, or leave it out"
        )
    if sha256_of(bundle / _CARD) != manifest.get("files", {}).get(_CARD):
        raise InputError(f"{bundle / _CARD}: is changed since the bundle was exported; copy the bundle again")
    return (bundle / _CARD).read_text(), bundle_id


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is not JSON: {error}"
        raise InputError(f"{path}: cannot be read ({reason}); {remedy}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: must hold a JSON object, got a {type(content).__name__}; {remedy}")
    return content
