"""The gauges of recent predictions, computed from a real queue and table of predictions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from crcjax.serve.model_metrics import ModelMetrics
from crcjax.serve.queue import Priority, QueueLimits
from crcjax.serve.service import Service
from crcjax.serve.slide_records import SlideRecord


@pytest.fixture
def predicted(open_state: Callable[..., Service]) -> Callable[..., Service]:
    """predicted(site, rows): the service in which a case with one slide for each of `rows` was predicted."""
    service = open_state(QueueLimits())
    number = 0

    def predict(site: str, rows: list[dict[str, Any]]) -> Service:
        nonlocal number
        slides = []
        for index in range(len(rows)):
            number += 1
            slides.append(
                SlideRecord(
                    *(f"s{number}", site, "dr.frost", f"case-{number - index}", "a.svs"),
                    *(Path("/a.svs"), 1, f"{number:064d}", None, 0.0),
                )
            )
        service.predictions.request("dr.frost", slides, Priority.ROUTINE, None)
        lease = service.queue.claim("w")
        service.queue.commit(lease, {"slides": [{"slide_id": f"s{index}", **row} for index, row in enumerate(rows)]})
        return service

    return predict


def _values(service: Service, metrics: ModelMetrics, registry: CollectorRegistry) -> dict[str, float]:
    metrics.update(service)
    lines = generate_latest(registry).decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_the_gauges_are_the_counts_and_means_of_recent_slides_by_site_and_scanner(predicted: Callable) -> None:
    immune = {"call": "immune", "probs": [0.2, 0.8], "status": "ok", "entropy": 0.5, "qc_verdict": "accept"}
    refused = {"call": "", "probs": [], "status": "not_evaluable", "entropy": None, "qc_verdict": "reject"}
    predicted("leeds", [{**immune, "scanner": "GT450"}] * 9 + [{**refused, "scanner": "GT450"}])
    service = predicted("york", [immune] * 10)
    registry = CollectorRegistry()
    values = _values(service, ModelMetrics(registry), registry)
    leeds, york = 'scanner="GT450",site="leeds"', 'scanner="unknown",site="york"'
    assert values[f'crcjax_recent_slides{{{leeds},status="ok"}}'] == 9
    assert values[f'crcjax_recent_slides{{{leeds},status="not_evaluable"}}'] == 1
    assert values[f'crcjax_recent_quality_slides{{qc="reject",{leeds}}}'] == 1
    assert values[f'crcjax_recent_predicted_slides{{class_="immune",{york}}}'] == 10
    assert values[f'crcjax_recent_mean{{of="confidence",{leeds}}}'] == pytest.approx(0.8)
    assert values[f'crcjax_recent_mean{{of="entropy",{york}}}'] == pytest.approx(0.5)
    assert not any("vacuity" in name or "frost" in name or "case-" in name for name in values)


def test_small_groups_are_not_shown_many_scanners_are_merged_and_series_that_went_are_zero(predicted: Callable) -> None:
    row = {"call": "immune", "probs": [1.0], "status": "ok"}
    registry = CollectorRegistry()
    metrics = ModelMetrics(registry, age_s=0.0)
    assert _values(predicted("leeds", [row] * 9), metrics, registry) == {}
    service = predicted("leeds", [row])
    name = 'crcjax_recent_slides{scanner="unknown",site="leeds",status="ok"}'
    assert _values(service, metrics, registry)[name] == 10
    for scanner in range(40):
        service = predicted("york", [{**row, "scanner": f"scanner {scanner:02}"}] * 3)
    values = _values(service, metrics, registry)
    assert values['crcjax_recent_slides{scanner="others",site="york",status="ok"}'] > 10
    assert len([name for name in values if name.startswith("crcjax_recent_slides")]) < 25
    for _ in range(200):
        service = predicted("york", [row])
    values = _values(service, metrics, registry)
    assert values[name] == 0
    assert values['crcjax_recent_slides{scanner="unknown",site="york",status="ok"}'] == 200
