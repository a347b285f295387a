import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcjax.errors import InputError
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import PredictionRow, columns, read_partial, write_predictions

CLASSES = ("a", "b")
ROWS = [
    PredictionRow(
        *("s1", "c1", "ok"),
        **{"model": "m", "call": "b", "probs": (1 / 3, 2 / 3), "entropy": 0.6365, "expected_entropy": 0.5},
        **{"alpha": (4 / 3, 8 / 3), "seconds": {"total": 1.5, "encode": 1.25}, "slide_sha256": "ab", "bundle_id": "cd"},
        **{"site": "north", "scanner": "GT450", "target": "a", "pipeline_id": "ef"},
        **{"mutual_information": 0.1365, "conformal_set": (), "calibration": "x", "regions": 7, "synthetic": True},
    ),
    PredictionRow(
        *("s2", "c2", "not_evaluable"),
        **{"reason": 'the file "x", is\nempty', "model": "m", "split": "val"},
        **{"qc_verdict": "refused", "qc_coverage": 0.0, "qc_reasons": 'the file "x", is\nempty'},
    ),
]


@given(share=st.floats(0, 1), sets=st.sampled_from([None, (), ("a",), ("a", "b")]), fold=st.sampled_from(["", "3"]))
def test_a_row_written_and_read_is_the_same_to_the_last_bit_of_its_probabilities(share, sets, fold) -> None:
    row = PredictionRow("s", "c", "ok", call="a", probs=(share, 1 - share), conformal_set=sets, fold=fold)
    read = PredictionRow.from_csv(row.to_csv(CLASSES), CLASSES)
    assert read.entropy == pytest.approx(-sum(p * math.log(p) for p in row.probs if p > 0))
    assert replace(read, entropy=None) == row


def test_the_columns_are_those_that_all_readers_of_the_table_expect_and_a_few_more() -> None:
    assert columns(CLASSES)[:31] == [
        *("slide_id", "case_id", "site", "scanner", "target", "call", "p_a", "p_b", "alpha_a", "alpha_b"),
        *(
            "vacuity",
            "mutual_information",
            "conformal_set",
            "status",
            "reason",
            "qc_verdict",
            "qc_coverage",
            "qc_reasons",
        ),
        *("seconds_total", "seconds_plan", "seconds_stain", "seconds_read", "seconds_encode", "seconds_pool"),
        *("seconds_pictures", "slide_sha256", "bundle_id", "pipeline_id", "split", "synthetic", "model"),
    ]


def test_a_table_cut_off_anywhere_gives_its_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path, ROWS, CLASSES)
    assert load_predictions(path).rows == ROWS
    written = path.read_bytes()
    ends = {written.index(b"s2,c2"): 1, len(written): 2}
    for length in range(len(written) + 1):
        path.write_bytes(written[:length])
        rows = read_partial(path, CLASSES)
        whole = max((count for end, count in ends.items() if length >= end), default=0)
        assert list(rows.values()) == ROWS[:whole], length
    assert read_partial(path, ("other", "classes")) == {}
    assert read_partial(tmp_path / "absent.csv", CLASSES) == {}


def test_a_damaged_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "predictions.csv"
    write_predictions(path, ROWS, CLASSES)
    path.write_text(path.read_text().replace("0.3333333333333333", "0.9"))
    assert list(read_partial(path, CLASSES)) == ["s2"]
    with pytest.raises(InputError, match=r"line 2: .* are no probabilities that sum to 1"):
        load_predictions(path)
