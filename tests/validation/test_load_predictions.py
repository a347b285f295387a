import math
from pathlib import Path

import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError
from crcjax.validation.load_predictions import load_predictions
from crcjax.validation.predictions_table import PredictionRow, write_predictions

# A table of the version before the present columns.
EARLIER = """slide_id,case_id,subtype,p_a,p_b,entropy,expected_entropy,mutual_information,vacuity,set,calibration,regions,status,\
reason,qc_status,qc_coverage,qc_reasons,seconds,model,split,synthetic
s1,c1,b,0.25,0.75,0.5623,0.5000,0.0623,,none,x,7,ok,,review,0.8000,blurred,2.50,m,val,yes
s2,c2,,,,,,,,,,,corrupt,the file is empty,refused,0.0000,the file is empty,,m,,
s3,c3,,,,,,,,,,,not_tiled,is not in store,,,,,m,,
"""


def _table(folder: Path, text: str, name: str = "table.csv") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_plain_table_of_cases_and_probabilities_is_enough(tmp_path: Path) -> None:
    table = load_predictions(_table(tmp_path, "Case ID;p_a;p_b;age\nc1;0.25;0.75;60\nc2;NA;NA;61\n"))
    first, second = table.rows
    assert table.classes == ("a", "b")
    assert (first.slide_id, first.case_id, first.status, first.call, first.probs) == (
        "c1",
        "c1",
        "ok",
        "b",
        (0.25, 0.75),
    )
    assert first.entropy == pytest.approx(-0.25 * math.log(0.25) - 0.75 * math.log(0.75))
    assert (second.status, second.call, second.probs) == ("not_evaluable", "", ())
    assert "no probabilities" in second.reason


def test_a_table_of_an_earlier_version_reads_as_it_did(tmp_path: Path) -> None:
    first, second, third = load_predictions(_table(tmp_path, EARLIER)).rows
    assert (first.call, first.conformal_set, first.qc_verdict, first.seconds) == ("b", (), "review", {"total": 2.5})
    assert (first.entropy, first.model, first.regions, first.synthetic) == (0.5623, "m", 7, True)
    assert (second.status, second.reason) == ("not_evaluable", "corrupt: the file is empty")
    assert (third.status, third.reason) == ("failed", "not_tiled: is not in store")


@pytest.mark.parametrize(
    ("score", "values"), [("probability", [0.9, 0.5, 0.0]), ("logit", [math.log(9), 0.0, -math.inf])]
)
def test_one_number_per_case_gives_the_probabilities_of_two_classes(
    score: str, values: list[float], tmp_path: Path
) -> None:
    lines = [f"{i},{value},{i % 2}\n" for i, value in enumerate(values)]
    path = _table(tmp_path, "patient,value,truth\n" + "".join(lines))
    names = {"case_id": "patient", score: "value", "target": "truth"}
    table = load_predictions(path, ("0", "1"), names)
    np.testing.assert_allclose([row.probs[1] for row in table.rows], [0.9, 0.5, 0.0])
    assert [row.target for row in table.rows] == ["0", "1", "0"]
    with pytest.raises(InputError, match="has no column 'slide', which is named for slide_id; its columns are patient"):
        load_predictions(path, ("0", "1"), names | {"slide_id": "slide"})


def test_parquet_reads_like_csv(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        PredictionRow("s1", "c1", "ok", call="b", probs=(1 / 3, 2 / 3), entropy=0.6365, conformal_set=("a", "b")),
        PredictionRow("s2", "c2", "failed", reason="missing: no such file", synthetic=False),
    ]
    write_predictions(tmp_path / "table.csv", rows, ("a", "b"))
    content = {
        "slide_id": ["s1", "s2"],
        "case_id": ["c1", "c2"],
        "status": ["ok", "failed"],
        "reason": [None, "missing: no such file"],
        "p_a": [1 / 3, None],
        "p_b": [2 / 3, None],
        "entropy": [0.6365, None],
        "conformal_set": [["a", "b"], None],
        "synthetic": pyarrow.array([None, False]),
    }
    parquet.write_table(pyarrow.table(content), tmp_path / "table.parquet")
    by_csv, by_parquet = (load_predictions(tmp_path / f"table.{suffix}") for suffix in ("csv", "parquet"))
    assert by_csv.rows == by_parquet.rows == rows
    parquet.write_table(
        pyarrow.table({"slide_id": ["s1"], "case_id": ["c1"], "age": [61]}), tmp_path / "cohort.parquet"
    )
    (slide,) = load_cohort(tmp_path / "cohort.parquet", None).rows
    assert (slide.case_id, slide.extra["age"]) == ("c1", "61")
    with pytest.raises(InputError, match=r"broken\.parquet: cannot be read as Parquet"):
        load_predictions(_table(tmp_path, "PAR1", "broken.parquet"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("p_a,p_b\n0.5,0.5\n", r"has no column case_id; its columns are p_a, p_b: rename them"),
        ("case_id,p_a\nc1,1\n", r"has no column p_CLASS of each class"),
        ("case_id,p_a,p_b\nc1,0.5,0.6\n", r"line 2: \['0.5', '0.6'\] are no probabilities that sum to 1"),
        ("case_id,p_a,p_b\nc1,0.5,x\n", r"line 2: \['0.5', 'x'\] are no probabilities"),
        (
            "case_id,p_a,p_b,target\nc1,0.5,0.5,A\n",
            r"line 2: target must be one of a, b, got 'A'; correct it, or leave",
        ),
        ("case_id,p_a,p_b,call\nc1,0.5,0.5,c\n", r"line 2: call must be one of a, b, got 'c'"),
        ("case_id,p_a,p_b\nc1,0.5,0.5\nc1,0.5,0.5\n", r"line 3: slide c1 is in two rows; add a column slide_id"),
        ("slide_id,case_id,p_a,p_b\ns,c1,0.5,0.5\ns,c2,0.5,0.5\n", r"line 3: slide s is in two rows; keep one"),
        ("case_id,p_a,p_b\n,0.5,0.5\n", r"line 2: case_id is empty; fill it in"),
        (
            "case_id,p_a,p_b,vacuity\nc1,0.5,0.5,much\n",
            r"line 2: could not convert string to float: 'much'; correct it",
        ),
        ("case_id,p_a,p_b,targets\nc1,0.5,0.5,a\n", r"has no column 'target'; rename 'targets'"),
    ],
)
def test_a_wrong_table_is_refused_in_one_line_that_says_what_to_do(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"table\.csv(, |: ){message}"):
        load_predictions(_table(tmp_path, text))
