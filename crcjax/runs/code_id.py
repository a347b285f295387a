"""The id of the code that runs."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

import crcjax


@cache
def code_id() -> str:
    """The first 12 hex digits of the SHA-256 of all sources of crcjax, as they were at the first call."""
    digest = sha256()
    folder = Path(crcjax.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
