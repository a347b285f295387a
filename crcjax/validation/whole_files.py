"""Writes text files whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from crcjax.errors import writing


def write_whole(texts: Mapping[Path, str]) -> None:
    """Writes text files; no older file is replaced before all new ones are complete.

    A killed process or a full disk leaves the older files as they were. Line ends are written as they are, in UTF-8.

    Args:
      texts: the text of each file.

    Raises:
      OutputError: a file cannot be written.
    """
    partials = {path: path.with_name(f".{path.name}") for path in texts}
    try:
        for path, text in texts.items():
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                partials[path].write_text(text, encoding="utf-8", newline="")
        for path, partial in partials.items():
            with writing(path):
                partial.replace(path)
    finally:
        for partial in partials.values():
            with suppress(OSError):
                partial.unlink()
