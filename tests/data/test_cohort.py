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
    assert (first.label, first.site, first.split, first.extra) == ("immune", "leeds", "train", {"age": "61"})
    assert (second.path, second.label, second.split) == (None, None, None)
    assert cohort.cases == ("A", "B")
    assert [row.slide_id for row in cohort.split("train").rows] == ["a"]


def test_a_slides_mpp_is_a_number_or_empty(tmp_path: Path) -> None:
    rows = load_cohort(_write(tmp_path, "slide_id,case_id,mpp\na,A,0.25\nb,B,\n"), None).rows
    assert [row.mpp for row in rows] == [0.25, None]


def test_labels_are_read_from_the_column_that_is_named(tmp_path: Path) -> None:
    table = _write(tmp_path, "slide_id,case_id,subtype,MSI Status\na,A,immune,MSI-H\nb,B,stromal,\n")
    cohort = load_cohort(table, None, "msi_status")
    assert [row.label for row in cohort.rows] == ["MSI-H", None]
    assert (cohort.classes, cohort.label) == (("MSI-H",), "msi_status")
    assert [row.extra for row in cohort.rows] == [{"subtype": "immune"}, {"subtype": "stromal"}]
    with pytest.raises(InputError, match=r"line 2: msi_status 'MSI-H' is none of MSI-L, MSS; did you mean 'MSI-L'"):
        load_cohort(table, ("MSI-L", "MSS"), "msi_status")
    with pytest.raises(InputError, match=r"config\.data\.label must be the column of the labels, got 'site'"):
        load_cohort(table, None, "site")
    doubled = _write(tmp_path, "slide_id,case_id,msi\na,A,MSS\nb,A,MSI-H\n")
    with pytest.raises(InputError, match="line 3: case 'A' has the msi 'MSI-H', but 'MSS' on line 2"):
        load_cohort(doubled, None, "msi")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column 'slide_id'"),
        (HEADER, "no rows"),
        ("slide,case_id\na,A\n", "no column 'slide_id'; rename 'slide'"),
        ("slide_id,case_id,case_id\na,A,A\n", "'case_id' twice"),
        (HEADER + "a,A,,immun,,,\n", "line 2: subtype 'immun' .* did you mean 'immune'"),
        (HEADER + "a,A,,,,training,\n", "line 2: split must be one of train, val, calibration, test, got 'training'"),
        ("slide_id,case_id,splt\na,A,test\n", "no column 'split'; rename 'splt'"),
        ("slide_id,case_id,Subtypes\na,A,immune\n", "no column 'subtype'; rename 'Subtypes'"),
        ("slide_id,case_id,split,Split\na,A,test,train\n", "the columns 'split' and 'Split', which are the same"),
        (HEADER + "a,A,,,,,\na,B,,,,,\n", "line 3: slide_id 'a' is on line 2 too"),
        (HEADER + "a,A,,,,train,\nb,A,,,,test,\n", "line 3: case 'A' has the split 'test', but 'train' on line 2"),
        (HEADER + "a,A,,immune,,,\nb,A,,stromal,,,\n", "line 3: case 'A' has the subtype 'stromal'"),
        (HEADER + "a,,,,,,\n", "line 2: case_id is empty"),
        (HEADER + "a,A\n", "line 2: has 2 fields, the header has 7"),
        ('slide_id,case_id,mpp\na,A,0.5\nb,B,"0,5 µm"\n', "line 3: mpp must be a number from 0.05 to 20.*got '0,5 µm'"),
        ("slide_id,case_id,mpp\na,A,250\n", "line 2: mpp must be a number from 0.05 to 20.*got '250'"),
        ("slide_id,case_id,mpp\na,A,inf\n", "line 2: mpp must be"),
        (HEADER + "NA,A,,,,,\n", "line 2: slide_id is empty"),
    ],
)
def test_an_invalid_table_is_one_error_that_names_the_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_cohort(_write(tmp_path, text), CLASSES)


@pytest.mark.parametrize(
    "header",
    [
        "Slide_ID,CASE_ID,Path,Subtype,Split,MPP",
        "slide id , case-id,PATH,subtype ,split, mpp",
        '"SlideID",CaseId,path,SUBTYPE,sPlit,Mpp',
    ],
)
def test_columns_are_used_whatever_their_case_and_blanks(tmp_path: Path, header: str) -> None:
    (row,) = load_cohort(_write(tmp_path, f"{header}\na,A,a.svs,immune,Test,0.25\n"), CLASSES).rows
    assert (row.slide_id, row.case_id, row.path) == ("a", "A", tmp_path / "a.svs")
    assert (row.label, row.split, row.mpp, row.extra) == ("immune", "test", 0.25, {})


_PLAIN = "slide_id,case_id,subtype,mpp,ward\na,A,immune,0.25,Süd\nb,B,,,\n"


@pytest.mark.parametrize(
    "data",
    [
        _PLAIN.encode(),
        _PLAIN.encode("utf-8-sig"),
        _PLAIN.encode("utf-16"),
        b"\xfe\xff" + _PLAIN.encode("utf-16-be"),
        _PLAIN.replace("\n", "\r\n").encode(),
        _PLAIN.replace("\n", "\r").encode(),
        _PLAIN.replace(",", ";").replace("0.25", "0,25").encode(),
        ("sep=;\r\n" + _PLAIN.replace(",", ";").replace("0.25", "0,25")).encode("utf-8-sig"),
        _PLAIN.replace(",", "\t").replace("0.25", '"0,25"').encode("utf-16"),
        (_PLAIN.replace("\n", ",,\n") + ",,,,,,\n\n ,,,,,,\n").encode(),
        _PLAIN.replace("b,B,,,", "b,B,NA,#N/A,NA").encode(),
        _PLAIN.replace("a,A", " a , A ").encode(),
    ],
)
def test_every_way_that_spreadsheets_write_a_table_gives_the_same_cohort(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "cohort.csv").write_bytes(data)
    first, second = load_cohort(tmp_path / "cohort.csv", None).rows
    assert (first.slide_id, first.case_id, first.label, first.mpp) == ("a", "A", "immune", 0.25)
    assert first.extra == {"ward": "Süd"}
    assert (second.slide_id, second.case_id, second.label, second.mpp) == ("b", "B", None, None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"PK\x03\x04rest", "is an Excel or LibreOffice workbook, not a CSV; save the sheet as 'CSV UTF-8'"),
        (_PLAIN.encode("latin-1"), "line 2: must be UTF-8 or UTF-16, got the byte 0xFC; save the table as 'CSV UTF-8'"),
        (_PLAIN.encode("utf-16-le"), "zero bytes|must be UTF-8"),
        (b'slide_id,case_id\n"a,A\n', "line 2: has 1 fields|line 3"),
    ],
)
def test_a_file_that_is_no_text_table_is_one_line_that_says_how_to_save_it(
    tmp_path: Path, data: bytes, message: str
) -> None:
    (tmp_path / "cohort.csv").write_bytes(data)
    with pytest.raises(InputError, match=message):
        load_cohort(tmp_path / "cohort.csv", None)


def test_a_missing_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv: cannot be read"):
        load_cohort(tmp_path / "none.csv", CLASSES)
