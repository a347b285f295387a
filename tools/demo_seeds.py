"""The demo for three seeds, each with its own cohort and model: balanced accuracy, attention, and the time it takes.

    python tools/demo_seeds.py OUT [SEED ...]

OUT/seed-SEED/measured.json stores the measurement; a seed that has this file is not run again. CPU seconds count all
processes. On a busy machine they are more reliable than the wall clock.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import psutil
from record import Row, record

from crcjax.demo import run_demo


def cpu_seconds() -> float:
    """CPU time of this process and of all processes that it started, finished or not."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    # The first four are user, system, children_user and children_system.
    return sum(sum(process.cpu_times()[:4]) for process in processes)


def measured(folder: Path, seed: int) -> dict:
    """The metrics, minutes and CPU seconds of one seed."""
    path = folder / "measured.json"
    if not path.exists():
        start, cpu = time.monotonic(), cpu_seconds()
        metrics = run_demo(folder, seed)
        times = {"minutes": (time.monotonic() - start) / 60, "cpu_s": cpu_seconds() - cpu}
        path.write_text(json.dumps(metrics | times))
    return json.loads(path.read_text())


def main(out: Path, seeds: list[int], *, writes: bool) -> None:
    rows = []
    for seed in seeds:
        metrics = measured(out / f"seed-{seed}", seed)
        accuracy = metrics["statistics"]["balanced_accuracy"]
        cases = metrics["flow"]["cases evaluated"]
        interval = f"{accuracy['ci_low']:.3f} to {accuracy['ci_high']:.3f}, {cases} cases"
        attention = metrics["attention"]["all subtypes"]
        rows += [
            Row(f"seed {seed}: held-out balanced accuracy ({interval})", accuracy["value"], ""),
            Row(f"seed {seed}: macro AUROC", metrics["statistics"]["macro AUROC"]["value"], ""),
            Row(
                f"seed {seed}: attention against the ground truth, AUROC ({attention['slides']} slides)",
                attention["mean AUROC"],
                "",
            ),
            Row(f"seed {seed}: the whole demo, wall clock", metrics["minutes"], "min"),
            Row(f"seed {seed}: the whole demo, CPU time of all processes", metrics["cpu_s"], "s"),
        ]
    if writes:
        about = (
            "The whole demo for three seeds: accuracy on held-out cases, attention, and time.\n\n"
            "All slides are synthetic. Each seed has its own cohort and model."
        )
        record("demo", "python tools/demo_seeds.py runs/seeds 0 1 2", rows, about)


if __name__ == "__main__":
    chosen = [int(seed) for seed in sys.argv[2:]]
    main(Path(sys.argv[1]), chosen or [0, 1, 2], writes=len(chosen) != 1)
