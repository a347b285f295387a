"""The demo for three seeds, each with its own cohort and model: held-out balanced accuracy and attention on the truth.

python tools/demo_seeds.py OUT [SEED ...]
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from record import Row, record

from crcjax.demo import run_demo


def main(out: Path, seeds: list[int]) -> None:
    rows = []
    for seed in seeds:
        start = time.monotonic()
        metrics = run_demo(out / f"seed{seed}", seed)
        minutes = (time.monotonic() - start) / 60
        accuracy = metrics["statistics"]["balanced_accuracy"]
        cases = metrics["flow"]["cases evaluated"]
        interval = f"{accuracy['ci_low']:.3f} to {accuracy['ci_high']:.3f}, {cases} cases"
        attention = metrics["attention"]["immune and stromal"]
        rows += [
            Row(f"seed {seed}: held-out balanced accuracy ({interval})", accuracy["value"], ""),
            Row(f"seed {seed}: macro AUROC", metrics["statistics"]["macro AUROC"]["value"], ""),
            Row(
                f"seed {seed}: attention on the truth, AUROC ({attention['slides']} slides)",
                attention["mean AUROC"],
                "",
            ),
            Row(f"seed {seed}: the demo from nothing to the report", minutes, "min"),
        ]
    record("demo", "python tools/demo_seeds.py runs/seeds 0 1 2", rows, "Synthetic slides throughout.")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(seed) for seed in sys.argv[2:]] or [0, 1, 2])
