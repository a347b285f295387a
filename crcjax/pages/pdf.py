"""A page as a PDF, by WeasyPrint."""

from __future__ import annotations

import logging
from pathlib import Path

from crcjax.environment import require_extra
from crcjax.errors import InputError, writing


def write_pdf(html: str, path: Path) -> None:
    """Writes a page as a PDF on A4. Pages are self-contained, so nothing is fetched.

    Raises:
      InputError: the extra `pdf` or the system's library Pango is missing.
      OutputError: the file cannot be written.
    """
    try:
        weasyprint = require_extra("weasyprint", "pdf", "writing a PDF")
    except OSError as error:
        raise InputError(
            f"writing a PDF needs the system's library Pango ({error}); install it (Debian, Ubuntu: apt-get install "
            "libpango-1.0-0 libpangoft2-1.0-0)"
        ) from error
    # It warns of properties that only screens use.
    logging.getLogger("weasyprint").setLevel(logging.ERROR)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(weasyprint.HTML(string=html).write_pdf())
