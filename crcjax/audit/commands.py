"""Commands that write to the audit log which CRCJAX_AUDIT names: one entry before they begin, and one when they end.

CRCJAX_AUDIT=/srv/crcjax/log.jsonl        the log; it may be that of a running service
CRCJAX_AUDIT_KEY=/etc/crcjax/audit.pem    optional: the private key that signs a checkpoint at the end of the command
CRCJAX_AUDIT_ANCHOR=/mnt/worm/anchors     optional: the anchor file of these checkpoints

If the log cannot be written, the command does not begin. Entries hold counts and digests, no names and no paths of slides.
"""

from __future__ import annotations

import getpass
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from hashlib import file_digest
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import crcjax
from crcjax.errors import exit_status
from crcjax.runs.code_id import code_id

if TYPE_CHECKING:
    from crcjax.audit.audit_log import AuditLog

VARIABLE, KEY_VARIABLE, ANCHOR_VARIABLE = "CRCJAX_AUDIT", "CRCJAX_AUDIT_KEY", "CRCJAX_AUDIT_ANCHOR"
BEGUN, ENDED = "command_begun", "command_ended"
_details: ContextVar[dict[str, Any] | None] = ContextVar("details", default=None)

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def audited(name: str) -> Callable[[Callable[_Parameters, _Result]], Callable[_Parameters, _Result]]:
    """Has a command, or a function of the Python API, write to the audit log if CRCJAX_AUDIT names one."""

    def decorate(command: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
        @wraps(command)
        def run(*arguments: _Parameters.args, **options: _Parameters.kwargs) -> _Result:
            with audited_command(name):
                return command(*arguments, **options)

        return run

    return decorate


@contextmanager
def audited_command(name: str) -> Iterator[None]:
    """Writes the entries of a command around the block. Raises OutputError, InputError before the block begins."""
    audit = _audit_log()
    # A command that another audited one calls is part of that one.
    if audit is None or _details.get() is not None:
        yield
        return
    command = {"command": name, "run": uuid.uuid4().hex, "user": _user()}
    audit.append(BEGUN, **command, crcjax=crcjax.__version__, code=code_id())
    details: dict[str, Any] = {}
    token = _details.set(details)
    status: int | None = None
    try:
        yield
        status = 0
    except BaseException as error:
        status = getattr(error, "exit_code", None)
        status = exit_status(error) if status is None else status
        if status and not hasattr(error, "exit_code"):
            details["error"] = type(error).__name__
        raise
    finally:
        _details.reset(token)
        audit.append(ENDED, **command, status=status, **details)
        audit.checkpoint()


def record_details(**facts: Any) -> None:
    """Adds facts to the last entry of the command that runs now; without an audited command, does nothing.

    They must name no patient: counts, digests and identities of models.
    """
    details = _details.get()
    if details is not None:
        details.update(facts)


def digest_of(path: Path) -> str:
    """The SHA-256 of a file; empty without one. Computed only for an audited command."""
    if _details.get() is None or not path.is_file():
        return ""
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


def _audit_log() -> AuditLog | None:
    path, key, anchors = (os.environ.get(name) for name in (VARIABLE, KEY_VARIABLE, ANCHOR_VARIABLE))
    if not path:
        return None
    # Imported here: other commands start without the packages of signatures.
    from crcjax.audit.audit_log import AuditLog

    return AuditLog(Path(path), Path(key) if key else None, [Path(anchors)] if anchors else [])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return str(os.getuid())
