"""The commands of `crcjax checkpoints`."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crcjax.audit.commands import audited, record_details
from crcjax.cli_options import STDERR

if TYPE_CHECKING:
    from crcjax.runs.registry import CheckpointEntry, RunRegistry

app = typer.Typer(
    help="Lists, verifies, prunes and exports the checkpoints of a run (docs/recovery.md, docs/bundles.md).",
    no_args_is_help=True,
)
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="the --workdir of a training, of one run or of an ensemble")
]
_STEP_HELP = "step of the checkpoint; by default the best one, which predict --run uses"


@app.command("list")
def list_(
    run: RunFolder, as_json: Annotated[bool, typer.Option("--json", help="print JSON, for programs")] = False
) -> None:
    """Lists the checkpoints of a run, oldest first: metrics, size, age, hashes, and the result of verifying them.

    The hashes are the first 8 digits of the SHA-256 of the config and of the data manifest; `show` prints all of them.
    """
    registries = _registries(run)
    if as_json:
        print(json.dumps([_json_values(registry) for registry in registries], indent=1))
        return
    for registry in registries:
        print(registry.run)
        _print_table(registry)
        for folder in registry.renamed:
            print(f"{folder.name}: a damaged checkpoint that a resumed training renamed")


@app.command()
def show(run: RunFolder, step: Annotated[int | None, typer.Option(help=_STEP_HELP)] = None) -> None:
    """Shows one checkpoint: its metrics, its hashes, and every damaged file."""
    for registry in _registries(run):
        entry = registry.best() if step is None else registry.entry(step)
        lines = {
            "checkpoint": entry.verdict.folder,
            "used by": _uses(entry) or "nothing",
            "saved": f"{entry.saved_at:%Y-%m-%d %H:%M:%S} UTC, {_age(entry)} ago",
            "size": _size(entry.size_bytes),
            **{name: f"{value:.4f}" for name, value in sorted((entry.metrics or {}).items())},
            "state": entry.state + (", signed" if entry.verdict.is_signed else ""),
            "config SHA-256": entry.config_sha256 or "not recorded",
            "data SHA-256": entry.data_sha256 or "not recorded",
        }
        for name, value in lines.items():
            print(f"{name:<20} {value}")
        for file in entry.verdict.damaged:
            print(f"{'damaged':<20} {file.path}: {file.reason}")


@app.command()
def best(
    run: RunFolder,
    metric: Annotated[
        str | None, typer.Option(help="a validation metric, such as loss; by default what predict --run chooses by")
    ] = None,
) -> None:
    """Prints the step of the best checkpoint, for scripts; its metrics go to the standard error."""
    for registry in _registries(run):
        entry = registry.best(metric)
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted((entry.metrics or {}).items()))
        print(entry.step)
        STDERR.print(f"{entry.verdict.folder}: {metrics or 'not evaluated'}", markup=False)


@app.command()
def verify(
    run: RunFolder,
    trust: Annotated[Path | None, typer.Option(help="public key that must have signed every checkpoint")] = None,
) -> None:
    """Verifies every file of every checkpoint, and changes nothing.

    Prints one line for each damaged file. Exits with 0 if all are whole, and with 1 if one is damaged.
    """
    from crcjax.runs.integrity import verify_run
    from crcjax.runs.run_directory import member_runs

    verdicts = [verdict for member in member_runs(run) for verdict in verify_run(member, trust)]
    for verdict in verdicts:
        for file in verdict.damaged:
            print(f"{verdict.folder / file.path}: {file.reason}")
        if not verdict.damaged and not verdict.has_manifest:
            STDERR.print(
                f"{verdict.folder}: not verified: an earlier version wrote it, without a manifest", markup=False
            )
    damaged = sum(bool(verdict.damaged) for verdict in verdicts)
    undamaged = sum(verdict.has_manifest and not verdict.damaged for verdict in verdicts)
    STDERR.print(f"{run}: {len(verdicts)} checkpoints: {undamaged} whole, {damaged} damaged", markup=False)
    raise typer.Exit(1 if damaged else 0)


@app.command()
def prune(
    run: RunFolder,
    keep_newest: Annotated[int, typer.Option(min=1, help="newest checkpoints to keep")] = 1,
    keep_best: Annotated[int, typer.Option(min=1, help="best checkpoints to keep")] = 1,
    keep_best_by: Annotated[
        list[str] | None, typer.Option(metavar="METRIC", help="keep the best ones by this metric too; repeatable")
    ] = None,
    keep_every: Annotated[int, typer.Option(min=0, help="keep the steps that are multiples of this; 0: none")] = 0,
    keep: Annotated[list[int] | None, typer.Option(metavar="STEP", help="a step to keep; repeatable")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="remove them; without it the command only lists them")] = False,
) -> None:
    """Removes checkpoints that nothing uses.

    It never removes the one that predict --run uses, the one that training resumes from, and damaged ones.
    """
    from crcjax.runs.registry import remove_checkpoints, superfluous
    from crcjax.runs.retention import Retention

    retention = Retention(keep_newest, keep_best, tuple(keep_best_by or ()), keep_every)
    registries = _registries(run)
    # All of them first: a wrong --keep removes nothing.
    chosen = [superfluous(registry, retention, keep or ()) for registry in registries]
    for registry, entries in zip(registries, chosen, strict=True):
        if yes:
            remove_checkpoints(registry.run, entries)
        for entry in entries:
            print(f"{'removed' if yes else 'would remove'} {entry.verdict.folder}, {_size(entry.size_bytes)}")
    number = sum(map(len, chosen))
    left = sum(len(registry.checkpoints) for registry in registries) - number
    size = _size(sum(entry.size_bytes for entries in chosen for entry in entries))
    if yes:
        STDERR.print(f"{number} checkpoints removed, {size} freed, {left} left", markup=False)
    else:
        STDERR.print(f"{number} checkpoints, {size}, can go; {left} stay; add --yes to remove them", markup=False)


@app.command()
@audited("export")
def export(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="the --workdir of a training; several: an ensemble")
    ],
    out: Annotated[Path, typer.Option(help="folder of the bundle, new")],
    step: Annotated[int | None, typer.Option(help=_STEP_HELP)] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="calibration.json of crcjax calibrate, for the same checkpoints")
    ] = None,
    key: Annotated[
        Path | None,
        typer.Option(help="private key that signs the bundle: openssl genpkey -algorithm ed25519 -out KEY.pem"),
    ] = None,
    encoder_weights: Annotated[
        Path | None, typer.Option(help="weights of the published encoder, for a run that does not record their hash")
    ] = None,
) -> None:
    """Writes a bundle: everything that crcjax predict --bundle needs, with a hash of every file.

    Weights of a published encoder are named by their hash and not copied.
    """
    from crcjax.runs.bundle_export import export_bundle

    bundle = export_bundle(runs, out, step=step, calibration=calibration, key=key, encoder_weights=encoder_weights)
    record_details(bundle_id=bundle.id, is_signed=bundle.is_signed)
    for member in bundle.members:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted((member.metrics or {}).items()))
        STDERR.print(f"model {member.model_id}: step {member.step}{', ' * bool(metrics)}{metrics}", markup=False)
    if bundle.encoder:
        STDERR.print(f"without the weights of {bundle.encoder.name}, SHA-256 {bundle.encoder.sha256}", markup=False)
    signed = ", signed" if bundle.is_signed else ""
    STDERR.print(f"{bundle.path}: bundle {bundle.id}{signed}", markup=False)


def _registries(run: Path) -> list[RunRegistry]:
    from crcjax.runs.registry import open_registry
    from crcjax.runs.run_directory import member_runs

    return [open_registry(member) for member in member_runs(run)]


def _json_values(registry: RunRegistry) -> dict[str, Any]:
    checkpoints = [
        {
            "step": entry.step,
            "metrics": entry.metrics,
            "size_bytes": entry.size_bytes,
            "saved_at": entry.saved_at.isoformat(timespec="seconds"),
            "state": entry.state,
            "damaged_files": {file.path: file.reason for file in entry.verdict.damaged},
            "config_sha256": entry.config_sha256,
            "data_sha256": entry.data_sha256,
            "predicts": entry.predicts,
            "is_resumed_from": entry.is_resumed_from,
        }
        for entry in registry.checkpoints
    ]
    return {
        "run": str(registry.run),
        "checkpoints": checkpoints,
        "renamed": [folder.name for folder in registry.renamed],
    }


def _print_table(registry: RunRegistry) -> None:
    names = sorted({name for entry in registry.checkpoints for name in entry.metrics or ()})
    rows = [("step", *names, "size", "age", "config", "data", "state", "used by")]
    for entry in registry.checkpoints:
        values = [(entry.metrics or {}).get(name) for name in names]
        metrics = ["" if value is None else f"{value:.4f}" for value in values]
        hashes = (entry.config_sha256[:8], entry.data_sha256[:8])
        rows.append(
            (str(entry.step), *metrics, _size(entry.size_bytes), _age(entry), *hashes, entry.state, _uses(entry))
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        *cells, uses = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join((*cells, uses.strip())).rstrip())


def _uses(entry: CheckpointEntry) -> str:
    uses = {"predict": entry.predicts, "resume": entry.is_resumed_from}
    return ", ".join(name for name, is_used in uses.items() if is_used)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.1f} KiB"


def _age(entry: CheckpointEntry) -> str:
    seconds = max(0.0, (datetime.now(UTC) - entry.saved_at).total_seconds())
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
