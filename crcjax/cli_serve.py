"""The commands `crcjax serve`, `crcjax loadtest` and `crcjax install-viewer`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from crcjax.cli_options import STDERR, EncoderWeights, TrustedKeys
from crcjax.environment import require_extra
from crcjax.errors import InputError, writing


def serve(
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="TOML file of these options (docs/service.md); options given here replace its"
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(help="folder of crcjax checkpoints export, which predicts; this or --models is required"),
    ] = None,
    models: Annotated[
        Path | None,
        typer.Option(metavar="REGISTRY", help="registry of models, which says which bundle predicts a case"),
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
    viewer: Annotated[
        Path | None, typer.Option(help="script of crcjax install-viewer, if it was installed for another user")
    ] = None,
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


def loadtest(
    url: Annotated[str, typer.Argument(metavar="URL", help="the service, such as https://127.0.0.1:8443")],
    slides: Annotated[list[Path], typer.Argument(metavar="SLIDES...", help="slide files; folders are searched")],
    token: Annotated[
        Path, typer.Option(help="file with the token of an account that may add slides, such as a service account's")
    ],
    certificate: Annotated[
        Path | None,
        typer.Option(help="PEM file of the certificate that the service must show, such as STATE/tls/certificate.pem"),
    ] = None,
    users: Annotated[int, typer.Option(min=1, help="users who each make a request a second")] = 10,
    duration_s: Annotated[float, typer.Option(min=1, help="seconds for which they do")] = 30.0,
    out: Annotated[Path | None, typer.Option(help="also write the table to this JSON file")] = None,
) -> None:
    """Measures a running service with your slides: latency, throughput and errors of uploads, predictions and views.

    The slides and predictions stay in the service. Slides that it has predicted before are answered at once: for the speed of new
    predictions, give new slides. Exits with 1 if a request failed.
    """
    require_extra("httpx", "serve", "crcjax loadtest")
    from crcjax.serve.client import Client, ServiceError
    from crcjax.serve.load_test import load_test
    from crcjax.slides.wsi.discovery import find_slides

    try:
        secret = token.read_text().strip()
    except OSError as error:
        raise InputError(
            f"--token {token}: cannot be read ({error.strerror}); write the account's token into a file"
        ) from error
    files = find_slides(slides)
    for path in files:
        if not path.is_file():
            raise InputError(f"{path}: is no file; give slides of one file each")
    try:
        rows = load_test(
            lambda: Client(url, secret, verify=certificate),
            files,
            users,
            duration_s,
            lambda text: STDERR.print(text, markup=False),
        )
    except ServiceError as error:
        raise InputError(f"{url}: {error}; check the address, the certificate and the token") from error
    table = Table("request", "answered", "errors", "per second", "median ms", "p99 ms", box=None)
    for row in rows:
        figures = (f"{row.per_s:.1f}", f"{1e3 * row.median_s:.1f}", f"{1e3 * row.p99_s:.1f}")
        table.add_row(row.name, str(row.requests), str(row.errors), *figures)
    Console().print(table)
    if out is not None:
        with writing(out):
            out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    raise typer.Exit(1 if any(row.errors for row in rows) else 0)


def install_viewer(
    package: Annotated[
        Path | None, typer.Option(help="archive of npm pack from another machine; by default npm fetches it")
    ] = None,
    to: Annotated[
        Path | None, typer.Option(help="file to write, for crcjax serve --viewer; by default this user's data folder")
    ] = None,
) -> None:
    """Installs OpenSeadragon, by which the page of crcjax serve zooms into slides (docs/service.md).

    Only the release whose hash crcjax states is installed. The service works without it, with heatmaps in place of the viewer.
    """
    from crcjax.serve.viewer_library import PACKAGE, VERSION, default_file, install

    file = to or default_file()
    install(file, package)
    STDERR.print(f"{PACKAGE} {VERSION}: {file}", markup=False)
