"""Samples of the processes of a run: what each measures of itself and its machine, and their files in the run directory.

RUN/monitor/process-I.json is the newest sample of a process. RUN/monitor/process-I.jsonl is its history, one sample in ten;
at 4 MiB it is renamed to process-I.earlier.jsonl, so that a process keeps at most 8 MiB.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from crcjax.monitor.gpu_sensors import GpuReading
from crcjax.monitor.host_sensors import HostReading
from crcjax.monitor.peer_echo import EchoAddress

FOLDER = "monitor"
_SAMPLES_OF_HISTORY = 10
_HISTORY_BYTES = 4 << 20


@dataclass(frozen=True)
class Sample:
    """What one process measured at one time.

    Attributes:
      run: the name of the run.
      process, process_count, host, pid: which process it is.
      time_s: when, in seconds since 1970 by the clock of its machine.
      interval_s: seconds since its sample before.
      step, phase, phase_s: where it stands, as in a heartbeat.
      ending: how it ended; empty while it runs.
      total_steps, total_step_s, total_reading_s: the steps since its start, their seconds, and those waiting for bags.
      step_s, reading_s: means of the steps that ended since the sample before; None if none did.
      probe_s: seconds that its slowest device takes for a fixed computation.
      late_s: by how much the sampler woke up later than it should: the process or its machine stood still.
      write_s: seconds that writing the sample before took.
      sampler_cpu_s: processor seconds that the sampler has used.
      device_peak_bytes: the largest memory that a device of this process has used; None if the backend does not say.
      device_estimate_bytes: the memory that the step needs by the compiler's account.
      host_reading, gpus: the machine.
      latency_s, clock_offset_s: to the other processes by their index, the newest measurement; None without an answer.
      echo: where it answers.
    """

    run: str
    process: int
    process_count: int
    host: str
    pid: int
    time_s: float
    interval_s: float
    step: int
    phase: str
    phase_s: float
    ending: str
    total_steps: int
    total_step_s: float
    total_reading_s: float
    step_s: float | None
    reading_s: float | None
    probe_s: float | None
    late_s: float
    write_s: float
    sampler_cpu_s: float
    device_peak_bytes: int | None
    device_estimate_bytes: int | None
    host_reading: HostReading
    gpus: tuple[GpuReading, ...] = ()
    latency_s: dict[int, float | None] = field(default_factory=dict)
    clock_offset_s: dict[int, float] = field(default_factory=dict)
    echo: EchoAddress | None = None


class SampleWriter:
    """Writes the samples of one process of a run."""

    def __init__(self, run: Path, process: int):
        self._newest = run / FOLDER / f"process-{process}.json"
        self._history = self._newest.with_suffix(".jsonl")
        self._count = 0

    def write(self, sample: Sample) -> None:
        """Replaces the newest sample; a disk that is full does not end the training, and the next sample tries again."""
        line = json.dumps(asdict(sample), separators=(",", ":")) + "\n"
        partial = self._newest.with_name(f".{self._newest.name}.partial")
        with suppress(OSError):
            self._newest.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(line)
            os.replace(partial, self._newest)
            if self._count % _SAMPLES_OF_HISTORY == 0 or sample.ending:
                self._append(line)
        self._count += 1

    def _append(self, line: str) -> None:
        with open(self._history, "a") as file:
            file.write(line)
            is_full = file.tell() > _HISTORY_BYTES
        if is_full:
            os.replace(self._history, self._history.with_name(f"{self._history.stem}.earlier.jsonl"))


def read_sample(run: str | Path, process: int) -> Sample | None:
    """The newest sample of a process; None without one."""
    return _read(Path(run) / FOLDER / f"process-{process}.json")


def read_samples(run: str | Path) -> list[Sample]:
    """The newest sample of each process of a run's last attempt, by index; empty if it has none."""
    read = map(_read, (Path(run) / FOLDER).glob("process-*.json"))
    samples = [sample for sample in read if sample is not None]
    if not samples:
        return []
    count = max(samples, key=lambda sample: sample.time_s).process_count
    return sorted((sample for sample in samples if sample.process < count), key=lambda sample: sample.process)


def read_history(run: str | Path, process: int) -> list[Sample]:
    """The history of a process, oldest first. Lines that a killed process did not finish are left out."""
    history = []
    for name in (f"process-{process}.earlier.jsonl", f"process-{process}.jsonl"):
        with suppress(FileNotFoundError):
            for line in (Path(run) / FOLDER / name).read_text().splitlines():
                with suppress(ValueError, TypeError, KeyError):
                    history.append(_parsed(json.loads(line)))
    return history


def _read(path: Path) -> Sample | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        return _parsed(json.loads(path.read_text()))
    return None


def _parsed(values: dict[str, Any]) -> Sample:
    values = _known(Sample, values)
    values["host_reading"] = HostReading(**_known(HostReading, values["host_reading"]))
    values["gpus"] = tuple(
        GpuReading(**_known(GpuReading, gpu) | {"throttle_reasons": _tuple(gpu.get("throttle_reasons"))})
        for gpu in values.get("gpus", ())
    )
    for name in ("latency_s", "clock_offset_s"):
        values[name] = {int(process): value for process, value in values.get(name, {}).items()}
    values["echo"] = EchoAddress(**values["echo"]) if values.get("echo") else None
    return Sample(**values)


def _known(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values that `kind` has; a newer version may have written more."""
    names = {entry.name for entry in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


def _tuple(values: list[str] | None) -> tuple[str, ...] | None:
    return None if values is None else tuple(values)
