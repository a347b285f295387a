"""Where the keys come from that wrap all others: a file, an environment variable, or a command that asks a key service.

file:/etc/crcjax/keys         lines of an id and 64 hexadecimal digits; the last one wraps, the others still unwrap
env:CRCJAX_KEYS               the same text
command:/usr/local/bin/kms    a program that wraps and unwraps, so that the key never leaves its service
"""

from __future__ import annotations

import base64
import json
import os
import re
import secrets
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, runtime_checkable

from crcjax.encryption.frames import KEY_BYTES, DecryptionError, decrypt, encrypt
from crcjax.errors import InputError, writing

_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}) ([0-9a-fA-F]{64})")
_COMMAND_S = 30.0
_FORMS = "file:PATH, env:NAME or command:PROGRAM"


@runtime_checkable
class Keys(Protocol):
    """Wraps keys with the current key, and unwraps those that it or an earlier one wrapped."""

    def wrap(self, key: bytes, context: bytes) -> tuple[str, bytes]:
        """The id of the current key, and `key` encrypted by it for a context, which must be given again to unwrap it."""

    def unwrap(self, key_id: str, wrapped: bytes, context: bytes) -> bytes:
        """The inverse of `wrap`. Raises DecryptionError."""


def open_keys(source: str) -> Keys:
    """Opens `file:PATH`, `env:NAME` or `command:PROGRAM`. Raises InputError."""
    kind, _, place = source.partition(":")
    if kind == "file" and place:
        return LocalKeys(source, lambda: _file_text(Path(place)))
    if kind == "env" and place:
        return LocalKeys(source, lambda: os.environ.get(place, ""))
    if kind == "command" and place:
        return CommandKeys(shlex.split(place))
    raise InputError(f"keys must be {_FORMS}, got {source!r}")


def create_key(path: Path) -> str:
    """Adds a new key to a key file, which becomes the current one; makes the file if there is none. Returns the key's id.

    Raises InputError for a file that holds no keys, OutputError.
    """
    known = _parsed(f"file:{path}", _file_text(path)) if path.exists() else {}
    key_id = f"k{len(known) + 1}-{secrets.token_hex(4)}"
    _write(path, known | {key_id: secrets.token_bytes(KEY_BYTES)})
    return key_id


def retire_keys(path: Path) -> list[str]:
    """Removes all keys but the current one from a key file, once nothing is wrapped by them; returns their ids."""
    known = _parsed(f"file:{path}", _file_text(path))
    current = list(known)[-1]
    _write(path, {current: known[current]})
    return [key_id for key_id in known if key_id != current]


def _write(path: Path, keys: dict[str, bytes]) -> None:
    text = "".join(f"{key_id} {key.hex()}\n" for key_id, key in keys.items())
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path, "choose another place for the keys"):
        try:
            with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _file_text(path: Path) -> str:
    try:
        text, mode = path.read_text(), path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the keys cannot be read ({error}); make them with crcjax keys create") from error
    if mode & 0o077:
        raise InputError(f"{path}: others can read the keys; chmod 600 it, and rotate them if anybody read it")
    return text


def _parsed(source: str, text: str) -> dict[str, bytes]:
    """The keys by their ids, the current one last."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[1] in keys:
            raise InputError(
                f"{source}: line {number} must be a new id and 64 hexadecimal digits; make keys with crcjax keys create"
            )
        keys[match[1]] = bytes.fromhex(match[2])
    if not keys:
        raise InputError(f"{source}: holds no key; make one with crcjax keys create")
    return keys


class LocalKeys:
    """Keys in this process's memory, read again when an id is unknown: another process may have added a key meanwhile."""

    def __init__(self, source: str, read: Callable[[], str]):
        self._source, self._read = source, read
        self._keys = _parsed(source, read())

    def wrap(self, key: bytes, context: bytes) -> tuple[str, bytes]:
        # Another process may have made a new key, and removes this one as soon as nothing needs it.
        self._keys = _parsed(self._source, self._read())
        key_id = list(self._keys)[-1]
        return key_id, encrypt(self._keys[key_id], key, context)

    def unwrap(self, key_id: str, wrapped: bytes, context: bytes) -> bytes:
        if key_id not in self._keys:
            self._keys = _parsed(self._source, self._read())
        if key_id not in self._keys:
            raise DecryptionError(f"{self._source}: has no key {key_id}; add it, or restore it from its copy")
        return decrypt(self._keys[key_id], wrapped, context)


class CommandKeys:
    """A program that is called with `wrap` or `unwrap`, and reads and writes one JSON object.

    wrap:    {"key": BASE64, "context": BASE64}                       → {"key_id": TEXT, "wrapped": BASE64}
    unwrap:  {"key_id": TEXT, "wrapped": BASE64, "context": BASE64}   → {"key": BASE64}
    """

    def __init__(self, command: list[str]):
        self._command = command

    def wrap(self, key: bytes, context: bytes) -> tuple[str, bytes]:
        answer = self._call("wrap", {"key": _text(key), "context": _text(context)}, ("key_id", "wrapped"))
        return answer["key_id"], base64.b64decode(answer["wrapped"])

    def unwrap(self, key_id: str, wrapped: bytes, context: bytes) -> bytes:
        request = {"key_id": key_id, "wrapped": _text(wrapped), "context": _text(context)}
        return base64.b64decode(self._call("unwrap", request, ("key",))["key"])

    def _call(self, action: str, request: dict[str, str], fields: tuple[str, ...]) -> dict[str, str]:
        # Its output may hold a key, so that no error repeats it.
        try:
            done = subprocess.run(
                [*self._command, action], input=json.dumps(request), capture_output=True, text=True, timeout=_COMMAND_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise DecryptionError(
                f"{self._command[0]}: {type(error).__name__} while it should {action} a key"
            ) from error
        try:
            answer = json.loads(done.stdout) if done.returncode == 0 else {}
        except ValueError:
            answer = {}
        if not isinstance(answer, dict) or any(not isinstance(answer.get(field), str) for field in fields):
            raise DecryptionError(f"{self._command[0]}: must {action} a key, got status {done.returncode}")
        return answer


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode()
