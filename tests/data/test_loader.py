from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from crcjax.data.bags import open_stores
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.data.loader import train_batches
from crcjax.errors import InputError
from crcjax.slides.store import open_store
from crcjax.train.mesh import device_mesh


def _cohort(painted: Path, config) -> Cohort:
    return load_cohort(painted / "cohort.csv", config.data.classes)


def test_batches_hold_the_stores_pixels_masks_and_labels(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config).split("train")
    bag = next(train_batches(cohort, small_config, device_mesh(), 0))
    assert bag.pixels.shape == (4, 4, 1, 64, 64, 3)
    stored = {row.slide_id: open_store(painted / "store", row.slide_id) for row in cohort.rows}
    for pixels, label in zip(np.asarray(bag.pixels), np.asarray(bag.label), strict=True):
        found = [
            row.subtype
            for row in cohort.rows
            for tile in stored[row.slide_id].read_pixels(range(len(stored[row.slide_id].mask)))
            if (tile == pixels[0]).all()
        ]
        assert found == [cohort.classes[label]]


def test_a_resumed_stream_goes_on_as_the_first_one_whatever_the_threads(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config).split("train")
    whole = [np.asarray(bag.pixels) for bag in train_batches(cohort, small_config, device_mesh(), 0)]
    small_config.data.read_threads, small_config.data.prefetch = 1, 1
    rest = [np.asarray(bag.pixels) for bag in train_batches(cohort, small_config, device_mesh(), 2)]
    assert len(whole) == 6
    assert all((a == b).all() for a, b in zip(whole[2:], rest, strict=True))


def test_slides_that_are_not_in_the_store_are_listed_with_the_remedy(painted: Path, small_config) -> None:
    cohort = _cohort(painted, small_config)
    absent = replace(cohort, rows=(*cohort.rows, replace(cohort.rows[0], slide_id="absent")))
    with pytest.raises(InputError, match=r"1 of 22 slides .*\(absent\); run crcjax tile"):
        open_stores(small_config.data.store, absent)
    with pytest.raises(InputError, match="no training slides"):
        next(train_batches(replace(cohort, rows=()), small_config, device_mesh(), 0))
