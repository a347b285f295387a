"""The command `crcjax serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR, EncoderWeights, TrustedKeys
from crcjax.environment import require_extra


def serve(
    bundle: Annotated[Path, typer.Option(help="folder of crcjax checkpoints export, which predicts")],
    state: Annotated[
        Path, typer.Option(help="folder of everything that the service keeps, new or from an earlier start")
    ],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="port to listen on; 0: any free one")] = 8443,
    workers: Annotated[int, typer.Option(min=1, help="worker processes; each loads the bundle")] = 1,
    slides: Annotated[
        list[str] | None, typer.Option(metavar="SITE=FOLDER", help="a site may name slides there by path; repeatable")
    ] = None,
    trust: TrustedKeys = None,
    encoder_weights: EncoderWeights = None,
    certificate: Annotated[
        Path | None, typer.Option(help="PEM file of your certificate; by default the service signs one itself")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file of the certificate's private key")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="threads of each worker that decode tiles; by default one per core")
    ] = None,
    max_queued: Annotated[int, typer.Option(min=1, help="cases that may wait; further ones are answered 429")] = 10_000,
    ageing_h: Annotated[
        float,
        typer.Option(min=0, help="hours after which a waiting case gets every second turn, even before urgent ones"),
    ] = 4.0,
    drain_s: Annotated[float, typer.Option(min=0, help="seconds that running cases get when the service stops")] = 30.0,
) -> None:
    """Serves predictions over HTTPS: API, page and queue, without another server (docs/service.md).

    Prints the address and, at the first start, the one-time secret of the first administrator. Stops on SIGTERM and Ctrl-C.
    Needs the extra `serve`: pip install 'crcjax[serve]'.
    """
    for module in ("fastapi", "uvicorn", "argon2", "pyotp", "prometheus_client"):
        require_extra(module, "serve", "crcjax serve")
    from crcjax.serve.queue import QueueLimits
    from crcjax.serve.run_service import ServeOptions, run_service

    options = ServeOptions(
        state=state,
        bundle=bundle,
        host=host,
        port=port,
        workers=workers,
        slides=tuple(slides or ()),
        trust=tuple(trust or ()),
        encoder_weights=encoder_weights,
        certificate=certificate,
        key=key,
        threads=threads,
        drain_s=drain_s,
        limits=QueueLimits(max_queued=max_queued, ageing_s=3600 * ageing_h),
    )
    raise typer.Exit(run_service(options, lambda line: STDERR.print(line, markup=False)))
