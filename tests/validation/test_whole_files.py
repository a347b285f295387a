"""Files that are written whole or not at all."""

from pathlib import Path

import pytest

from crcjax.errors import OutputError
from crcjax.validation.whole_files import write_whole


def test_if_one_file_cannot_be_written_no_older_file_changes_and_nothing_partial_remains(tmp_path: Path) -> None:
    first, blocked = tmp_path / "new" / "metrics.json", tmp_path / "file" / "report.html"
    write_whole({first: "older\n"})
    blocked.parent.touch()
    with pytest.raises(OutputError, match=r"report\.html: cannot be written"):
        write_whole({first: "newer\n", blocked: "page"})
    assert first.read_text() == "older\n"
    assert {path.name for path in tmp_path.rglob("*")} == {"new", "metrics.json", "file"}


def test_a_reader_of_the_older_file_never_sees_half_of_the_newer_one(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    write_whole({path: "older"})
    with open(path) as older:
        write_whole({path: "µm\r\n"})
        assert older.read() == "older"
    assert path.read_bytes() == "µm\r\n".encode()
