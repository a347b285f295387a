"""Small trials, written as the tables and the plan that a user would give."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

CLASSES = ("a", "b", "c")
PLAN = 'title = "A trial"\nversion = "1"\nclasses = ["a", "b", "c"]\nseed = 3\nresamples = 200\n[data]\n'


@pytest.fixture(scope="session")
def write_csv() -> Callable[[Path, list[dict]], Path]:
    """write_csv(path, rows): a table with all columns of the rows."""
    return _write_csv


def _write_csv(path: Path, rows: list[dict]) -> Path:
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        table.writeheader()
        table.writerows(rows)
    return path


@pytest.fixture
def small_trial(tmp_path: Path) -> Callable[..., Path]:
    """small_trial(plan="", predictions=…, cohort=…): a plan of 60 patients at two sites; functions change its rows."""

    def write(
        plan: str = "",
        predictions: Callable[[dict], dict | None] = lambda row: row,
        cohort: Callable[[dict], dict | None] = lambda row: row,
        data: str = "",
    ) -> Path:
        rng = np.random.default_rng(5)
        predicted, slides = [], []
        for number in range(60):
            label = number % 3
            probs = rng.dirichlet(np.eye(3)[label] * 3 + 0.6)
            ids = {"slide_id": f"s{number}", "case_id": f"c{number}"}
            predicted.append(ids | {f"p_{name}": repr(float(p)) for name, p in zip(CLASSES, probs, strict=True)})
            site = "north" if number % 4 else "south"
            slides.append(ids | {"subtype": CLASSES[label], "site": site, "scanner": "x", "age": str(50 + number % 30)})
        for name, rows, change in (("p.csv", predicted, predictions), ("c.csv", slides, cohort)):
            _write_csv(tmp_path / name, [row for row in map(change, rows) if row is not None])
        path = tmp_path / "plan.toml"
        path.write_text(f'{PLAN}predictions = "p.csv"\ncohort = "c.csv"\n{data}{plan}')
        return path

    return write
