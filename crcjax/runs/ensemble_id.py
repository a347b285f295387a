"""The id of an ensemble."""

from __future__ import annotations

from collections.abc import Iterable


def ensemble_id(model_ids: Iterable[str], dropout_samples: int = 0) -> str:
    """The id of an ensemble in predictions.csv and calibration.json."""
    return "+".join(model_ids) + (f" dropout {dropout_samples}" if dropout_samples else "")
