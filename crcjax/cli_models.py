"""The commands of `crcjax models`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from crcjax.cli_options import STDERR, TrustedKeys
from crcjax.errors import InputError

if TYPE_CHECKING:
    from crcjax.lifecycle.registry import PromotionResult

app = typer.Typer(
    help="The registry of bundles: versions, lineage, promotion by two people, rollback (docs/lifecycle.md).",
    no_args_is_help=True,
)
Registry = Annotated[Path, typer.Argument(metavar="REGISTRY", help="folder of the registry")]
BundleName = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="version, alias, or the first digits of a bundle's id")
]
Stage = Annotated[str, typer.Option("--to", help="shadow, canary or production")]
By = Annotated[str, typer.Option(help="name of the person, as in the policy")]
Key = Annotated[Path | None, typer.Option(help="file of that person's private key (Ed25519, PEM)")]


@app.command()
def add(
    registry: Registry,
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder of crcjax checkpoints export")],
    by: Annotated[str, typer.Option(help="who adds it")],
    parent: Annotated[
        str | None, typer.Option(help="bundle that it was retrained from; by default the one in production")
    ] = None,
    policy: Annotated[Path | None, typer.Option(help="policy (TOML) of a new registry")] = None,
    trust: TrustedKeys = None,
) -> None:
    """Copies a bundle into the registry as its next version and candidate; the first one makes the registry."""
    from crcjax.lifecycle.registry import add_bundle

    version = add_bundle(registry, bundle, by, parent=parent, policy=policy, trust=tuple(trust or ()))
    print(f"version {version.number} {version.bundle_id}")


@app.command("list")
def list_(
    registry: Registry, as_json: Annotated[bool, typer.Option("--json", help="print JSON, for programs")] = False
) -> None:
    """Lists the versions with their aliases and evidence."""
    from crcjax.lifecycle.registry_state import read_registry

    state = read_registry(registry)
    if as_json:
        rows = [vars(v) | {"alias": state.alias_of(v.bundle_id)} for v in state.versions]
        print(json.dumps(rows, indent=1))
        return
    table = Table("version", "alias", "bundle", "added (UTC)", "by", "evidence", box=None)
    for version in state.versions:
        evidence = state.evidence.get(version.bundle_id, {})
        verdicts = ", ".join(f"{kind} {'passed' if e.passed else 'did not pass'}" for kind, e in evidence.items())
        alias = "withdrawn" if version.bundle_id in state.withdrawn else state.alias_of(version.bundle_id)
        cells = (str(version.number), alias, version.bundle_id[:12], version.added_at[:16].replace("T", " "))
        table.add_row(*cells, version.added_by, verdicts)
    Console(soft_wrap=True).print(table)


@app.command()
def show(registry: Registry, bundle: BundleName) -> None:
    """Shows a bundle as JSON: aliases, lineage, evidence, and what it needs for each stage. Also by the id in a result."""
    from crcjax.lifecycle.policy import STAGES
    from crcjax.lifecycle.registry_state import missing_approvals, obstacles, read_registry

    state = read_registry(registry)
    version = state.version(bundle)
    needs = {
        stage: [*obstacles(state, stage, version.bundle_id), missing_approvals(state, stage, version.bundle_id)]
        for stage in STAGES
        if state.aliases.get(stage) != version.bundle_id
    }
    values = vars(version) | {
        "folder": str(state.folder(version.bundle_id)),
        "alias": state.alias_of(version.bundle_id),
        "is_withdrawn": version.bundle_id in state.withdrawn,
        "evidence": {kind: vars(e) for kind, e in state.evidence.get(version.bundle_id, {}).items()},
        "needs": {stage: [reason for reason in reasons if reason] for stage, reasons in needs.items()},
    }
    print(json.dumps(values, indent=1))


@app.command()
def promote(
    registry: Registry,
    bundle: BundleName,
    to: Stage,
    by: By = "",
    key: Key = None,
    evidence: Annotated[
        list[str] | None, typer.Option(metavar="KIND=FILE", help="evidence to add first; repeatable")
    ] = None,
) -> None:
    """Approves a promotion; the bundle is promoted once the policy's evidence and people are complete."""
    from crcjax.lifecycle.registry import promote as promote_bundle

    files = {}
    for text in evidence or ():
        kind, equals, file = text.partition("=")
        if not (kind and equals and file):
            raise InputError(f"--evidence must be KIND=FILE, got {text!r}")
        files[kind] = Path(file)
    _report(promote_bundle(registry, bundle, to, by, key, files), f"promoted to {to}")


@app.command()
def rollback(
    registry: Registry,
    by: By,
    reason: Annotated[str, typer.Option(help="why, for the log")],
    stage: Annotated[str, typer.Option(help="shadow, canary or production")] = "production",
) -> None:
    """Takes a bundle out of a stage at once; in production the one before takes its place."""
    from crcjax.lifecycle.registry import roll_back

    state = roll_back(registry, stage, by, reason)
    current = state.aliases.get(stage)
    print(f"{stage}: {f'version {state.version(current).number}' if current else 'none'}")


@app.command()
def policy(
    registry: Registry,
    file: Annotated[Path, typer.Argument(metavar="POLICY.toml", help="the new policy")],
    by: By = "",
    key: Key = None,
) -> None:
    """Approves another policy, which is in force once two people of the present one have approved it."""
    from crcjax.lifecycle.registry import adopt_policy

    _report(adopt_policy(registry, file, by, key), "in force")


@app.command()
def history(
    registry: Registry, as_json: Annotated[bool, typer.Option("--json", help="print JSON, for programs")] = False
) -> None:
    """Verifies the log, signatures included, and prints who did what, oldest first."""
    from crcjax.lifecycle.registry_state import read_registry

    state = read_registry(registry)
    if as_json:
        print(json.dumps([vars(event) for event in state.events], indent=1))
        return
    for event in state.events:
        shown = {name: value for name, value in event.facts.items() if name not in ("lineage", "signature", "text")}
        facts = ", ".join(f"{name} {value}" for name, value in shown.items())
        print(f"{event.time[:19].replace('T', ' ')} {event.kind}: {facts}")
    STDERR.print(f"{len(state.events)} events, the chain is whole, every promotion has its approvals", markup=False)


def _report(result: PromotionResult, made: str) -> None:
    print(f"approved; still needed: {result.missing}" if result.missing else made)
