"""The QC result of a slide, as the store, the predictions and the reports state it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

REFUSED = "refused"


@dataclass(frozen=True)
class QCResult:
    """The QC result of a slide.

    Attributes:
      status: `accept`, `review` or `reject`; `refused` for a slide that tiling refused; empty if it is unknown.
      coverage: the fraction of the tiles with tissue that was kept, 0 for a refused slide; None if it is unknown.
      reasons: why the slide is not accepted.
    """

    status: str = ""
    coverage: float | None = None
    reasons: tuple[str, ...] = ()

    @classmethod
    def of_refusal(cls, reason: str) -> QCResult:
        """The result of a slide that tiling refused."""
        return cls(REFUSED, 0.0, (reason,))

    @classmethod
    def from_json(cls, verdict: Mapping[str, Any]) -> QCResult:
        """Reads the result of `slide_verdict`, which a store has among its attributes."""
        return cls(verdict["verdict"], float(verdict["coverage"]), tuple(verdict["reasons"]))

    def __str__(self) -> str:
        coverage = "" if self.coverage is None or self.status == REFUSED else f"{self.coverage:.0%} of the tissue kept"
        return "; ".join(filter(None, (coverage, *self.reasons)))
