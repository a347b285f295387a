"""Writes predictions.csv row by row, and resumes it: a later start keeps the rows that are still valid."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO

from crcjax.errors import writing
from crcjax.predict.evidence import evidence_digest, remove_evidence, slides_with_evidence
from crcjax.slides.jobs.shards import shard_numbers
from crcjax.validation.predictions_table import PredictionRow, columns, read_partial, write_predictions

TABLE = "predictions.csv"


@dataclass
class PendingBag:
    """The slides of one bag before prediction, and the function that identifies the inputs of their prediction.

    `compute_digest` reads the slides' content and returns the `result_key` of all inputs, or an empty text, which matches no earlier
    prediction, if a slide cannot be read.
    """

    rows: list[PredictionRow]
    compute_digest: Callable[[], str]

    @cached_property
    def digest(self) -> str:
        """The digest, computed at its first use."""
        return self.compute_digest()


class Results:
    """OUT/predictions.csv while slides are predicted; a context manager that opens and closes the table.

    Entering it keeps the rows of an earlier run for each bag whose slides that run predicted from the same model, calibration,
    attribution and slide content. It removes all other rows, together with the evidence files of their slides, so that no
    file in OUT disagrees with the table. A killed run loses at most the bag that it was predicting.

    Args:
      out: the folder OUT.
      classes: the classes in the order of the probabilities.
      bags: all bags, in the order of the finished table.
      on_row: called with each row once it is written; on entering, with each kept row.
      shard: I/N, if other processes write the rows of other bags to the same folder: the table is
        OUT/predictions-I-of-N.csv then, and only evidence of these bags is removed.

    Attributes:
      rows: the written rows by slide id.
    """

    def __init__(
        self,
        out: Path,
        classes: Sequence[str],
        bags: Sequence[PendingBag],
        on_row: Callable[[PredictionRow], None] = lambda row: None,
        shard: str | None = None,
    ):
        self._out, self._classes, self._is_shard = out, classes, shard is not None
        self._path = out / (_shard_table(*shard_numbers(shard)) if shard else TABLE)
        self._bags, self._on_row = bags, on_row
        self.rows: dict[str, PredictionRow] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Results:
        with writing(self._out):
            self._out.mkdir(parents=True, exist_ok=True)
            earlier = read_partial(self._path, self._classes)
        # Outside of `writing`: the digests read the slides, whose errors are not those of OUT.
        for bag in self._bags:
            if self._is_finished(bag, earlier):
                for row in bag.rows:
                    self.rows[row.slide_id] = replace(
                        earlier[row.slide_id],
                        **{name: getattr(row, name) for name in ("case_id", "split", "site", "scanner", "target")},
                    )
        with writing(self._out):
            write_predictions(self._path, list(self.rows.values()), self._classes)
            if self._is_shard:
                (self._out / TABLE).unlink(missing_ok=True)
                # Slides of its earlier table may belong to another shard now.
                others = {row.slide_id for bag in self._bags for row in bag.rows}
            else:
                others = set(earlier) | slides_with_evidence(self._out)
            for slide_id in others - set(self.rows):
                remove_evidence(self._out, slide_id)
            self._file = open(self._path, "a", newline="", buffering=1)
        for row in list(self.rows.values()):
            self._on_row(row)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._file is not None
        with writing(self._out):
            self._file.close()
        if error is None:
            # Rows of repeated predictions are at the end of the table; this restores the order of the bags.
            in_order = [self.rows[row.slide_id] for bag in self._bags for row in bag.rows]
            if list(self.rows.values()) != in_order:
                write_predictions(self._path, in_order, self._classes)

    def has(self, bag: PendingBag) -> bool:
        """Whether the rows of a bag have been written."""
        return bag.rows[0].slide_id in self.rows

    def add(self, rows: Iterable[PredictionRow]) -> None:
        """Writes the rows of one bag. Raises OutputError."""
        assert self._file is not None
        table = csv.DictWriter(self._file, columns(self._classes), restval="")
        for row in rows:
            with writing(self._out):
                table.writerow(row.to_csv(self._classes))
            self.rows[row.slide_id] = row
            self._on_row(row)

    def _is_finished(self, bag: PendingBag, earlier: Mapping[str, PredictionRow]) -> bool:
        rows = [earlier.get(row.slide_id) for row in bag.rows]
        if not all(row and row.has_prediction and _predicted_by(row) == _predicted_by(bag.rows[0]) for row in rows):
            return False
        digests = {evidence_digest(self._out, row.slide_id) for row in bag.rows}
        return digests == {bag.digest} and bool(bag.digest)


def join_shards(out: Path, classes: Sequence[str], bags: Sequence[PendingBag], count: int) -> None:
    """Writes OUT/predictions.csv from the tables of all shards if these have all rows.

    A shard that has not begun again since its slides changed counts with its earlier rows, until it ends.

    Args:
      out: the folder.
      classes: the classes in the order of the probabilities.
      bags: the bags of all shards, in the order of the table.
      count: the number of shards.

    Raises:
      OutputError: the folder cannot be written.
    """
    with writing(out):
        tables = [read_partial(out / _shard_table(number, count), classes) for number in range(1, count + 1)]
    row_of = {slide_id: row for table in tables for slide_id, row in table.items()}
    wanted = [row for bag in bags for row in bag.rows]
    if all(row.slide_id in row_of and _predicted_by(row_of[row.slide_id]) == _predicted_by(row) for row in wanted):
        with writing(out):
            write_predictions(out / TABLE, [row_of[row.slide_id] for row in wanted], classes)
            for slide_id in slides_with_evidence(out) - {row.slide_id for row in wanted}:
                remove_evidence(out, slide_id)


def _shard_table(number: int, count: int) -> str:
    return f"predictions-{number}-of-{count}.csv"


def _predicted_by(row: PredictionRow) -> tuple[str, str, str]:
    return row.model, row.bundle_id, row.pipeline_id
