"""XLA programs kept on disk between runs."""

from __future__ import annotations

import os
from pathlib import Path

import jax


def use_compilation_cache() -> None:
    """XLA's programs are kept between runs, unless the user has set where."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "crcjax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))
