"""A load test of a running service: uploads, new predictions, and many users who look at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import numpy as np

from crcjax.errors import InputError
from crcjax.serve.client import Client, PredictionFailedError, ServiceError


@dataclass(frozen=True)
class LoadRow:
    """One kind of request: how many were answered rightly, the seconds that all took, and the latencies of those (s)."""

    name: str
    requests: int
    errors: int
    per_s: float
    median_s: float
    p99_s: float


@dataclass(frozen=True)
class _Answer:
    name: str
    seconds: float
    is_right: bool


def load_test(
    connect: Callable[[], Client],
    slides: Sequence[Path],
    users: int,
    duration_s: float,
    on_stage: Callable[[str], None] = lambda text: None,
) -> list[LoadRow]:
    """Measures a service with the slides of a site.

    Uploads each slide, asks for its prediction and waits for it; then `users` users each make a request a second for
    `duration_s`: status, result and worklist in turn. A slide that the service has predicted before is answered at once.

    Args:
      connect: opens a client of an account that may add slides and ask for predictions.
      slides: slide files.
      users, duration_s: of the last stage.
      on_stage: receives what begins.

    Raises:
      InputError: there is no slide.
      ServiceError: the service does not answer, or refuses the account.
    """
    if not slides:
        raise InputError("SLIDES must name at least one slide file or a folder with slides; check the path")
    with connect() as client:
        client.request("GET", "/v1/me")
        on_stage(f"uploading {len(slides)} slides")
        uploads, ids, megabytes = [], [], 0.0
        begun = time.monotonic()
        for path in slides:
            answer, slide_id = _timed("upload", partial(_uploaded, client, path))
            uploads.append(answer)
            if slide_id is not None:
                ids.append(slide_id)
                megabytes += path.stat().st_size / 1e6
        upload_s = time.monotonic() - begun
        on_stage(f"predicting {len(ids)} slides")
        begun = time.monotonic()
        predictions = [client.predict([slide_id])["id"] for slide_id in ids]
        predicted = [_timed("prediction", partial(_finished, client, wanted)) for wanted in predictions]
        predicted_s = time.monotonic() - begun
    done = [wanted for wanted, (_, result) in zip(predictions, predicted, strict=True) if result is not None]
    # Each waited from the request on, not from the end of the one before.
    ends = np.cumsum([answer.seconds for answer, _ in predicted])
    waits = [_Answer("prediction", end, answer.is_right) for end, (answer, _) in zip(ends, predicted, strict=True)]
    on_stage(f"{users} users for {duration_s:g} s")
    with ThreadPoolExecutor(users) as threads:
        looks = threads.map(lambda number: _look(connect, done, number / users, duration_s), range(users))
        answers = [answer for of_user in looks for answer in of_user]
    rows = [_row(f"upload ({megabytes / upload_s:.0f} MB/s)", uploads, upload_s)]
    rows.append(_row(f"prediction ({3600 * len(done) / predicted_s:.0f} slides/h)", waits, predicted_s))
    for name in ("status", "result", "worklist"):
        rows.append(_row(name, [answer for answer in answers if answer.name == name], duration_s))
    return rows


def _timed(name: str, call: Callable[[], str]) -> tuple[_Answer, str | None]:
    begun, outcome = time.monotonic(), None
    with suppress(ServiceError, PredictionFailedError):
        outcome = call()
    return _Answer(name, time.monotonic() - begun, outcome is not None), outcome


def _uploaded(client: Client, path: Path) -> str:
    return client.upload(path, path.stem)["id"]


def _finished(client: Client, prediction_id: str) -> str:
    client.wait(prediction_id)
    return prediction_id


def _look(
    connect: Callable[[], Client], predictions: Sequence[str], delay_s: float, duration_s: float
) -> list[_Answer]:
    """One user: a request a second; a slow answer delays the next ones, which are then made up for."""
    answers: list[_Answer] = []
    begun = time.monotonic() + delay_s
    with connect() as client:
        while (due := begun + len(answers)) < begun + duration_s:
            time.sleep(max(0.0, due - time.monotonic()))
            turn, prediction = len(answers), predictions[len(answers) % len(predictions)] if predictions else ""
            name, path = (
                ("status", f"/v1/predictions/{prediction}"),
                ("result", f"/v1/predictions/{prediction}/result"),
                ("worklist", "/v1/predictions"),
            )[turn % 3 if predictions else 2]
            sent = time.monotonic()
            try:
                is_right = client.get_once(path).status_code == 200
            except httpx.TransportError:
                is_right = False
            answers.append(_Answer(name, time.monotonic() - sent, is_right))
    return answers


def _row(name: str, answers: Sequence[_Answer], seconds: float) -> LoadRow:
    right = [answer.seconds for answer in answers if answer.is_right]
    median_s, p99_s = np.percentile(right, [50, 99]) if right else (float("nan"),) * 2
    return LoadRow(
        name, len(right), len(answers) - len(right), len(right) / max(seconds, 1e-9), float(median_s), float(p99_s)
    )
