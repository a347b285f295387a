"""The command `crcjax serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR, EncoderWeights, TrustedKeys
from crcjax.environment import require_extra
from crcjax.errors import InputError


def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML file of these options (docs/service.md); options given here replace its"
        ),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="folder of crcjax checkpoints export, which predicts; required")
    ] = None,
    state: Annotated[
        Path | None,
        typer.Option(help="folder of everything that the service keeps, new or from an earlier start; required"),
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on", show_default="127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on; 0: any free one", show_default="8443")] = None,
    workers: Annotated[
        int | None, typer.Option(help="worker processes; each loads the bundle", show_default="1")
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="processes that answer HTTP", show_default="1")] = None,
    slides: Annotated[
        list[str] | None, typer.Option(metavar="SITE=FOLDER", help="a site may name slides there by path; repeatable")
    ] = None,
    trust: TrustedKeys = None,
    encoder_weights: EncoderWeights = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM file of your certificate; by default the service signs one itself")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's private key")] = None,
    audit_key: Annotated[
        Path | None, typer.Option(help="private key that signs the log's checkpoints; by default STATE/audit.pem")
    ] = None,
    audit_anchor: Annotated[
        list[Path] | None, typer.Option(help="file on another system that gets a copy of every checkpoint; repeatable")
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(help="keys that encrypt slides and results: file:PATH, env:NAME or command:PROGRAM"),
    ] = None,
    encrypted_volume: Annotated[
        bool | None,
        typer.Option("--encrypted-volume", help="state that the disk of --state is encrypted below this machine"),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="threads of each worker that decode tiles; by default one per core")
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(help="cases that may wait; further ones are answered 429", show_default="10000")
    ] = None,
    ageing_h: Annotated[
        float | None,
        typer.Option(
            help="hours after which a waiting case gets every second turn, even before urgent ones", show_default="4"
        ),
    ] = None,
    drain_s: Annotated[
        float | None, typer.Option(help="seconds that running cases get when the service stops", show_default="30")
    ] = None,
    redis: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Redis server that holds the queue; by default a file in --state does"),
    ] = None,
) -> None:
    """Serves predictions over HTTPS: API, page and queue, without another server (docs/service.md).

    Prints the address and, at the first start, the one-time secret of the first administrator. Stops on SIGTERM and Ctrl-C.
    Needs the extra `serve`: pip install 'crcjax[serve]'.
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in ("config", "slides")}
    for module in ("fastapi", "uvicorn", "argon2", "jwt", "pyotp", "prometheus_client"):
        require_extra(module, "serve", "crcjax serve")
    from crcjax.serve.config import read_config
    from crcjax.serve.run_service import run_service

    if slides:
        given["slides"] = _folders(slides)
    raise typer.Exit(run_service(read_config(config, given), lambda line: STDERR.print(line, markup=False)))


def _folders(slides: list[str]) -> dict[str, list[str]]:
    """The folders of each site."""
    folders: dict[str, list[str]] = {}
    for text in slides:
        site, equals, folder = text.partition("=")
        if not (site and equals and folder):
            raise InputError(f"--slides must be SITE=FOLDER, got {text!r}")
        folders.setdefault(site, []).append(folder)
    return folders
