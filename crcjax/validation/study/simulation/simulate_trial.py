"""Writes a simulated trial: the tables, a plan with every section switched on, and the truth that was put in."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path

import numpy as np

from crcjax.errors import InputError, writing
from crcjax.validation.predictions_table import columns, table_text
from crcjax.validation.study.simulation.expected import expected_values
from crcjax.validation.study.simulation.tables import simulate_tables
from crcjax.validation.study.simulation.truth import CLASSES, Truth
from crcjax.validation.whole_files import write_whole

PATIENTS = 147
PLAN = "plan.toml"
_FEWEST = 100


def simulate_trial(out: Path, seed: int = 0, patients: int = PATIENTS, truth: Truth | None = None) -> Path:
    """Writes OUT/plan.toml, the tables that it names, and truth.json; returns the plan's path.

    Args:
      out: the folder.
      seed: of the trial; the same seed gives the same bytes.
      patients: patients who reach the analysis.
      truth: the model; by default `Truth()`.

    Raises:
      InputError: there are too few patients for the scanner study and the readers.
      OutputError: the folder cannot be written.
    """
    if patients < _FEWEST:
        raise InputError(f"--patients must be at least {_FEWEST}, got {patients}")
    truth = truth or Truth()
    tables = simulate_tables(truth, patients, np.random.default_rng([seed, 34]))
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    facts = {"synthetic": True, "seed": seed, "parameters": asdict(truth), "expected": expected_values(truth)}
    texts = {
        "cohort.csv": table_text(tables.cohort),
        "readers.csv": table_text(tables.readers),
        "training.csv": table_text(tables.training),
        "truth.json": json.dumps(facts, indent=1) + "\n",
        PLAN: resources.files("crcjax.validation.study").joinpath("simulation/plan.toml").read_text(),
    }
    for name in ("predictions", "without_normalisation", "comparator", "calibration"):
        rows = [row.to_csv(CLASSES) for row in getattr(tables, name)]
        texts[f"{name}.csv"] = table_text(rows, columns(CLASSES))
    with writing(out / "embeddings.npz"):
        np.savez(
            out / "embeddings.npz",
            slide_id=np.array(list(tables.embeddings)),
            embedding=np.array(list(tables.embeddings.values()), np.float32),
        )
    write_whole({out / name: text for name, text in texts.items()})
    return out / PLAN
