"""What the model predicted of late, as gauges for Prometheus: class mix, confidence, uncertainty and rejections by site and scanner.

The gauges are counts and means over the last predictions, so that every replica of the service gives the same numbers, and a restart
changes none. Labels are sites, scanners and classes; no label names a person, a case or a slide. A group of fewer than ten slides is
not shown, since it could tell what was predicted for one of them.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Gauge

from crcjax.serve.service import Service

# The predictions that the gauges are computed of, and the seconds for which they are not computed again.
_PREDICTIONS = 200
_AGE_S = 30.0
# Above this number of values of a label, the rarer ones are shown together.
_MOST_VALUES = 20
OTHERS = "others"
_LEAST_SLIDES = 10
_UNCERTAINTIES = ("confidence", "entropy", "vacuity", "ood")


class ModelMetrics:
    """Gauges over the last 200 predictions of a service."""

    def __init__(self, registry: CollectorRegistry, age_s: float = _AGE_S):
        newest: Any = {"registry": registry, "multiprocess_mode": "mostrecent"}
        by = ("site", "scanner")
        self._slides = Gauge("crcjax_recent_slides", "Recent slides by status", (*by, "status"), **newest)
        self._classes = Gauge("crcjax_recent_predicted_slides", "Recent slides by class", (*by, "class_"), **newest)
        self._qc = Gauge("crcjax_recent_quality_slides", "Recent slides by QC result", (*by, "qc"), **newest)
        self._means = Gauge("crcjax_recent_mean", "Means over recent slides", (*by, "of"), **newest)
        self._age_s, self._updated_s = age_s, -float("inf")
        self._shown: set[tuple[Gauge, tuple[str, ...]]] = set()

    def update(self, service: Service) -> None:
        """Computes the gauges, unless they are less than half a minute old."""
        if time.monotonic() - self._updated_s < self._age_s:
            return
        self._updated_s = time.monotonic()
        values = self._values(_with_bounded_labels(_recent_rows(service)))
        # A series that is no longer there would keep its last value.
        for gauge, labels in self._shown - values.keys():
            gauge.labels(*labels).set(0)
        for (gauge, labels), value in values.items():
            gauge.labels(*labels).set(value)
        self._shown |= values.keys()

    def _values(self, rows: list[dict[str, Any]]) -> dict[tuple[Gauge, tuple[str, ...]], float]:
        counts: Counter[tuple[Gauge, tuple[str, ...]]] = Counter()
        numbers: defaultdict[tuple[Gauge, tuple[str, ...]], list[float]] = defaultdict(list)
        for row in rows:
            by = row["site"], row["scanner"]
            counts[self._slides, (*by, row["status"])] += 1
            if row["qc_verdict"]:
                counts[self._qc, (*by, row["qc_verdict"])] += 1
            if row["call"]:
                counts[self._classes, (*by, row["call"])] += 1
            for name in _UNCERTAINTIES:
                if row[name] is not None:
                    numbers[self._means, (*by, name)].append(float(row[name]))
        means = {key: statistics.fmean(values) for key, values in numbers.items()}
        return {key: float(count) for key, count in counts.items()} | means


def _recent_rows(service: Service) -> list[dict[str, Any]]:
    """The slides of the last predictions that are done, each with what the gauges need."""
    rows = []
    for site, job_id in service.predictions.recent_jobs(_PREDICTIONS):
        job = service.queue.job(job_id)
        if job is not None and job.result is not None:
            rows += [_row(site, slide) for slide in job.result["slides"]]
    return rows


def _row(site: str, slide: Mapping[str, Any]) -> dict[str, Any]:
    probabilities = slide.get("probs") or ()
    others = {name: slide.get(name) for name in ("entropy", "vacuity", "ood")}
    return others | {
        "site": site,
        "scanner": slide.get("scanner") or "unknown",
        "status": slide.get("status") or "ok",
        "qc_verdict": slide.get("qc_verdict") or "",
        "call": slide.get("call") or "",
        "confidence": max(probabilities) if probabilities else None,
    }


def _with_bounded_labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with the rarer sites and scanners merged, without groups that are too small."""
    for name in ("site", "scanner"):
        usual = {value for value, _ in Counter(row[name] for row in rows).most_common(_MOST_VALUES)}
        rows = [row | {name: row[name] if row[name] in usual else OTHERS} for row in rows]
    sizes = Counter((row["site"], row["scanner"]) for row in rows)
    return [row for row in rows if sizes[row["site"], row["scanner"]] >= _LEAST_SLIDES]
