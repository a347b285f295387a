"""The ids of the models and settings behind a prediction, and a slide's row before its prediction."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from crcjax.predict.attribution_method import Method
from crcjax.runs.code_id import code_id
from crcjax.slides.preprocess.manifest import REFUSALS
from crcjax.slides.tiling.qc_result import QCResult
from crcjax.validation.calibration import Calibration
from crcjax.validation.predictions_table import FAILED, NOT_EVALUABLE, PredictionRow


@dataclass(frozen=True)
class PredictedBy:
    """The ids of the models and settings that predict, as the table of predictions states them.

    Attributes:
      model: the ensemble's id (`ensemble_id`).
      bundle_id: the bundle; empty for run directories.
      pipeline_id: a hash of all that decides a prediction besides the parameters and the slide (`pipeline_id`).
      split_of: the split of a slide or case in the training of the models.
      target_name: the name of the predicted property (config.data.label).
    """

    model: str
    bundle_id: str
    pipeline_id: str
    split_of: Callable[[str], str]
    target_name: str

    def row(
        self, slide_id: str, case_id: str, site: str | None, scanner: str | None, target: str | None
    ) -> PredictionRow:
        """The row of a slide before its prediction; its split is that of the slide, otherwise that of its case."""
        return PredictionRow(
            *(slide_id, case_id, FAILED),
            model=self.model,
            bundle_id=self.bundle_id,
            pipeline_id=self.pipeline_id,
            split=self.split_of(slide_id) or self.split_of(case_id),
            site=site or "",
            scanner=scanner or "",
            target=target or "",
            target_name=self.target_name,
        )


def result_key(by: PredictedBy, attribution: Method, content: object) -> str:
    """The key of a bag's result: equal keys mean that the result need not be computed again.

    Args:
      by: the ids of the models, the bundle, and the pipeline, which covers tiling, stains, calibration and code.
      attribution: the method of the evidence.
      content: the slides and everything of theirs that a result depends on, such as the hash of their content; JSON values.

    Returns:
      A SHA-256.
    """
    values = [by.model, by.bundle_id, by.pipeline_id, attribution, content]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def pipeline_id(settings: Mapping[str, Any], calibration: Calibration | None) -> str:
    """The first 12 hex digits of the SHA-256 of the code, the settings and the calibration of predictions.

    Args:
      settings: the tiling, stains, bag and dropout as JSON values (`Ensemble.settings`).
      calibration: the calibration, if there is one.
    """
    values = {"code": code_id(), **settings, "calibration": calibration.id if calibration else None}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def row_without_prediction(row: PredictionRow, cause: str, reason: str) -> PredictionRow:
    """The row of a slide that has no prediction.

    `cause` is the status of a SlideError or of a tiling's outcome. One of REFUSALS makes the slide `not_evaluable`, and its QC
    result a refusal; any other makes it `failed`.
    """
    refused = cause in REFUSALS
    finished = replace(row, status=NOT_EVALUABLE if refused else FAILED, reason=f"{cause}: {reason}")
    return finished.with_qc(QCResult.of_refusal(reason)) if refused else finished
