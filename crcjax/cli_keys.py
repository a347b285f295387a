"""The commands of `crcjax keys`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crcjax.cli_options import STDERR
from crcjax.errors import InputError

app = typer.Typer(
    help="Makes and rotates the keys that encrypt a service's slides and results (docs/security.md).",
    no_args_is_help=True,
)
KeySource = Annotated[str, typer.Option("--keys", help="file:PATH, env:NAME or command:PROGRAM")]


@app.command()
def create(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="the key file, new or with earlier keys")],
) -> None:
    """Adds a new key to a file, which then encrypts; makes the file if there is none. Keep a copy elsewhere: without it, nothing opens."""
    from crcjax.encryption.keys import create_key

    STDERR.print(f"{path}: key {create_key(path)} is the current one", markup=False)


@app.command()
def rotate(
    keys: KeySource,
    state: Annotated[Path, typer.Option(help="the service's state folder; the service may run")],
    retire: Annotated[
        bool, typer.Option("--retire", help="remove the earlier keys from the file once nothing needs them")
    ] = False,
) -> None:
    """Makes a new key and wraps all keys of the state folder with it; no slide or result is written again.

    With env: or command:, the new key is made there first, and this command wraps with it.
    """
    from crcjax.encryption.keys import create_key, open_keys, retire_keys
    from crcjax.serve.vault import KEYS, Vault

    if not (state / KEYS).is_file():
        raise InputError(f"{state}: holds no {KEYS}; give the --state of crcjax serve")
    kind, _, place = keys.partition(":")
    if retire and kind != "file":
        raise InputError(f"--retire needs --keys file:PATH, got {keys!r}; remove the earlier keys where they are kept")
    open_keys(keys)
    if kind == "file":
        STDERR.print(f"{place}: key {create_key(Path(place))} is the current one", markup=False)
    count = Vault(state / KEYS, open_keys(keys)).rewrap()
    STDERR.print(f"{count} keys of {state} are wrapped by the current key", markup=False)
    if retire:
        STDERR.print(f"{place}: removed {', '.join(retire_keys(Path(place))) or 'no key'}", markup=False)
