from pathlib import Path

import pytest

from crcjax.data.cohort import load_cohort
from crcjax.errors import InputError

CLASSES = ("canonical", "immune", "stromal")
HEADER = "slide_id,case_id,path,subtype,site,split,age\n"


def _write(folder: Path, text: str) -> Path:
    path = folder / "cohort.csv"
    path.write_text(text)
    return path


def test_columns_are_typed_paths_resolved_and_extra_columns_kept(tmp_path: Path) -> None:
    cohort = load_cohort(_write(tmp_path, HEADER + "a,A,x/a.svs,immune,leeds,train,61\nb,B,,,,,\n"), CLASSES)
    first, second = cohort.rows
    assert first.path == tmp_path / "x/a.svs"
    assert (first.subtype, first.site, first.split, first.extra) == ("immune", "leeds", "train", {"age": "61"})
    assert (second.path, second.subtype, second.split) == (None, None, None)
    assert cohort.cases == ("A", "B")
    assert [row.slide_id for row in cohort.split("train").rows] == ["a"]


def test_a_slides_mpp_is_a_number_or_empty(tmp_path: Path) -> None:
    rows = load_cohort(_write(tmp_path, "slide_id,case_id,mpp\na,A,0.25\nb,B,\n"), None).rows
    assert [row.mpp for row in rows] == [0.25, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'slide_id'"),
        (HEADER, "no rows"),
        ("slide,case_id\na,A\n", "no column 'slide_id'; rename 'slide'"),
        ("slide_id,case_id,case_id\na,A,A\n", "'case_id' twice"),
        (HEADER + "a,A,,immun,,,\n", "line 2: subtype 'immun' .* did you mean 'immune'"),
        (HEADER + "a,A,,,,training,\n", "line 2: split 'training'"),
        (HEADER + "a,A,,,,,\na,B,,,,,\n", "line 3: slide_id 'a' is on line 2 too"),
        (HEADER + "a,A,,,,train,\nb,A,,,,test,\n", "line 3: case 'A' has the split 'test', but 'train' on line 2"),
        (HEADER + "a,A,,immune,,,\nb,A,,stromal,,,\n", "line 3: case 'A' has the subtype 'stromal'"),
        (HEADER + "a,,,,,,\n", "line 2: case_id is empty"),
        (HEADER + "a,A\n", "line 2: has another number of fields"),
        ('slide_id,case_id,mpp\na,A,0.5\nb,B,"0,5"\n', "line 3: mpp '0,5' is not a number from 0.05 to 20"),
        ("slide_id,case_id,mpp\na,A,250\n", "line 2: mpp '250' is not a number from 0.05 to 20"),
        ("slide_id,case_id,mpp\na,A,nan\n", "line 2: mpp 'nan' is not"),
        (HEADER + "a/b,A,,,,,\n", "line 2: slide_id 'a/b' has a slash"),
    ],
)
def test_a_wrong_table_is_one_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_cohort(_write(tmp_path, text), CLASSES)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        load_cohort(tmp_path / "none.csv", CLASSES)
