"""The persistent compilation cache of XLA."""

from __future__ import annotations

import os
from pathlib import Path

import jax

# Programs that take less time to compile are not stored, in seconds.
_STORED_FROM_S = 0.1


def use_compilation_cache() -> None:
    """Stores compiled programs under ~/.cache/crcjax/xla, unless JAX_COMPILATION_CACHE_DIR names another folder."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crcjax" / "xla"
        except RuntimeError:
            # An account without a home, as in containers, compiles anew.
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
        # By default JAX does not store what it compiles in less than a second, and a prediction has many such programs.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _STORED_FROM_S)
