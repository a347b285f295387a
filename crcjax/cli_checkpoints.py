"""The commands of `crcjax checkpoints`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR

app = typer.Typer(help="Exports checkpoints of a run as a bundle (docs/bundles.md).", no_args_is_help=True)


@app.command()
def export(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="the --workdir of a training; several: an ensemble")
    ],
    out: Annotated[Path, typer.Option(help="folder of the bundle, new")],
    step: Annotated[
        int | None, typer.Option(help="step of the checkpoint; by default the best one, which predict --run uses")
    ] = None,
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
    for member in bundle.members:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in sorted((member.metrics or {}).items()))
        STDERR.print(f"model {member.model_id}: step {member.step}{', ' * bool(metrics)}{metrics}", markup=False)
    if bundle.encoder:
        STDERR.print(f"without the weights of {bundle.encoder.name}, SHA-256 {bundle.encoder.sha256}", markup=False)
    signed = ", signed" if bundle.is_signed else ""
    STDERR.print(f"{bundle.path}: bundle {bundle.id}{signed}", markup=False)
