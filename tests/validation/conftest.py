"""Survival data: the trial of Freireich et al. (1963), and the tables beside the repository."""

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from crcjax.validation.survival import FollowUp


@dataclass(frozen=True)
class Freireich:
    """Weeks of remission of 42 patients with leukaemia, and who was treated (6-mercaptopurine)."""

    follow_up: FollowUp
    is_treated: np.ndarray

    @property
    def placebo(self) -> FollowUp:
        return self.follow_up.of(~self.is_treated)

    @property
    def treated(self) -> FollowUp:
        return self.follow_up.of(self.is_treated)


@pytest.fixture(scope="session")
def freireich() -> Freireich:
    # Negative: still in remission.
    placebo = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
    treated = [6, 6, 6, 7, 10, 13, 16, 22, 23, -6, -9, -10, -11, -17, -19, -20, -25, -32, -32, -34, -35]
    weeks = np.array(placebo + treated)
    return Freireich(FollowUp(np.abs(weeks), weeks > 0), np.repeat([False, True], 21))


@pytest.fixture(scope="session")
def real_table(real_data: Path) -> Callable[[str], dict[str, np.ndarray]]:
    """real_table(NAME): the columns of stats/NAME.csv; numbers with NaN where a cell is empty, or texts."""

    def read(name: str) -> dict[str, np.ndarray]:
        with open(real_data / "stats" / f"{name}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        return {column: _column([row[column] for row in rows]) for column in rows[0]}

    return read


def _column(texts: list[str]) -> np.ndarray:
    try:
        return np.array([float(text) if text not in ("", "NA") else np.nan for text in texts])
    except ValueError:
        return np.array(texts)
