import contextlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crcjax.errors import OutputError
from crcjax.monitor.metric_writer import MetricWriter


def _lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_scalars_reach_the_lines_and_tensorboard_alike(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        writer.write(1, {"train/loss": 0.5, "train/accuracy": 0.25})
        writer.write(2, {"train/loss": 0.125})
    assert _lines(tmp_path) == [
        {"step": 1, "train/loss": 0.5, "train/accuracy": 0.25},
        {"step": 2, "train/loss": 0.125},
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 0.5), (2, 0.125)]


def test_a_resumed_run_replaces_what_a_killed_one_wrote_beyond_its_checkpoint(tmp_path: Path) -> None:
    with MetricWriter(tmp_path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(step, {"loss": float(step)})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')  # the kill came within a line
    with MetricWriter(tmp_path, start=2) as writer:
        writer.write(3, {"loss": 30.0})
    assert _lines(tmp_path) == [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 30.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's writer thread
def test_a_full_disk_is_one_error_that_names_the_run(small_disk: Path) -> None:
    def write_until_full() -> None:
        with MetricWriter(small_disk / "run") as writer:
            with open(small_disk / "rest", "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            for step in range(10_000):
                writer.write(step, {"loss": math.pi})

    with pytest.raises(OutputError, match=r"run: cannot be written .*free space"):
        write_until_full()


def test_tensorflow_is_not_loaded() -> None:
    code = "import sys, crcjax.monitor.metric_writer; sys.exit('tensorflow' in sys.modules or 'jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
