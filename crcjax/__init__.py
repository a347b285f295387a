"""crcjax: the molecular subtype of colorectal cancer from whole-slide images, in JAX.

The Python API (docs/python.md) loads on first use, so that `import crcjax` is quick and does not start JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from crcjax.environment import check_platform, set_environment

__version__ = "0.1.0"

_MODULE_OF = {
    "open_slide": "crcjax.api.slides",
    "demo_cohort": "crcjax.api.slides",
    "Store": "crcjax.api.stores",
    "tile": "crcjax.api.stores",
    "open_store": "crcjax.api.stores",
    "embed": "crcjax.api.stores",
    "Run": "crcjax.api.runs",
    "add_aggregator": "crcjax.models.aggregators.registry",
    "Bundle": "crcjax.api.bundles",
    "export_bundle": "crcjax.api.bundles",
    "open_bundle": "crcjax.api.bundles",
    "Predictions": "crcjax.api.predictions",
    "calibrate": "crcjax.api.predictions",
    "validate": "crcjax.api.predictions",
}
# Functions whose name is also a package's; `crcjax.environment.make_callable` makes the package call the function.
_CALLABLE_PACKAGES = ("train", "predict")
__all__ = ["__version__", *_MODULE_OF, *_CALLABLE_PACKAGES]

set_environment()


def __getattr__(name: str) -> Any:
    if name in _CALLABLE_PACKAGES:
        return import_module(f"crcjax.{name}")
    if name in _MODULE_OF:
        check_platform()
        return getattr(import_module(_MODULE_OF[name]), name)
    raise AttributeError(f"module 'crcjax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
