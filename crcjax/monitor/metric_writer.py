"""Writes a run's metrics as TensorBoard event files and JSON lines, without TensorFlow."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from crcjax.errors import writing


class MetricWriter:
    """Writes scalars to RUN/tensorboard and RUN/metrics.jsonl; a context manager.

    Metrics of steps after `start`, which a killed run wrote after its last checkpoint, are removed: the resumed run writes
    them again. With `writes` False nothing is written: only process 0 of a run writes. Raises OutputError if the disk is
    full or writing is not permitted.
    """

    def __init__(self, run: Path, start: int = 0, writes: bool = True):
        self._run, self._writes = run, writes
        if not writes:
            return
        path = run / "metrics.jsonl"
        with self._output():
            run.mkdir(parents=True, exist_ok=True)
            previous_lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            path.write_text(
                "".join(line for line in previous_lines if line.endswith("\n") and json.loads(line)["step"] <= start)
            )
            self._lines = open(path, "a", buffering=1)  # noqa: SIM115 - closed in __exit__
            self._events = EventFileWriter(str(run / "tensorboard"))
            if previous_lines:
                # TensorBoard discards the events that it has of this step and later ones.
                restart = SessionLog(status=SessionLog.START)
                self._events.add_event(Event(step=start + 1, wall_time=time.time(), session_log=restart))

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._writes:
            return
        with self._output():
            self._lines.close()
            self._events.close()

    def write(
        self, step: int, scalars: Mapping[str, float], tensorboard_only: Mapping[str, float] | None = None
    ) -> None:
        """Scalars of one step, named like `train/loss`; those of `tensorboard_only` are not written to metrics.jsonl."""
        if not self._writes:
            return
        of_events = {**scalars, **(tensorboard_only or {})}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in of_events.items()]
        with self._output():
            self._lines.write(json.dumps({"step": step, **scalars}) + "\n")
            self._events.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=values)))
            self._events.flush()

    def _output(self) -> AbstractContextManager[None]:
        return writing(self._run, "choose another --workdir")
