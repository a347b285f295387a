"""The operating system and the environment variables that crcjax needs. `crcjax/__init__.py` imports this before JAX."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

from crcjax.errors import InputError

_PLATFORM = "linux"


def set_environment() -> None:
    """Sets what must be set before JAX starts, unless the user has set it.

    With several CPU devices on few cores, JAX 0.10 queues collectives on a thread pool that is as large as the number of
    cores, and hangs. PJRT_NPROC makes the pool larger.
    """
    os.environ.setdefault("PJRT_NPROC", "16")


def check_platform() -> None:
    """Raises InputError if the operating system is not Linux."""
    if not sys.platform.startswith(_PLATFORM):
        raise InputError(
            f"crcjax needs Linux, this is {sys.platform}; use a Linux machine, a container, or WSL 2 on Windows"
        )


def require_extra(module: str, extra: str, purpose: str) -> ModuleType:
    """Imports a package of an optional extra.

    Raises:
      InputError: the package is missing; the message names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise InputError(f"{purpose} needs {module}; install it: pip install 'crcjax[{extra}]'") from error


class _CallablePackage(ModuleType):
    """A package that is also a function of the Python API."""

    _function: tuple[str, str]

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        check_platform()
        module, name = self._function
        return getattr(import_module(module), name)(*arguments, **options)


def make_callable(package: str, module: str, function: str) -> None:
    """Makes `crcjax.train(...)` call a function of the Python API although `crcjax.train` is also a package."""
    loaded = sys.modules[package]
    loaded.__class__ = _CallablePackage
    loaded._function = (module, function)  # type: ignore[attr-defined]
