"""Messages of crcjax.errors: one line with the reason and a remedy that fits it."""

import errno
import os
from pathlib import Path

import pytest

from crcjax.errors import BusyError, InputError, OutputError, SlideError, exit_status, writing
from crcjax.slides.store.zarr_arrays import UnreadableError


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "free space or choose another --out"),
        (errno.EACCES, "ask for permission to write there or choose another --out"),
        (errno.ENOTDIR, "choose another --out"),
        (errno.EROFS, "choose another --out"),
        (errno.ENAMETOOLONG, "shorten the name or choose another --out"),
        (errno.EIO, "choose another --out"),
    ],
)
def test_a_failed_write_names_the_path_the_reason_and_its_remedy(code: int, remedy: str) -> None:
    with pytest.raises(OutputError) as caught, writing("out"):
        raise OSError(code, os.strerror(code), "out/some/file")
    assert str(caught.value) == f"out: cannot be written ({os.strerror(code)}); {remedy}"
    assert isinstance(caught.value.__cause__, OSError)


def test_a_path_below_a_file_is_not_called_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    below, reason = tmp_path / "file" / "x", r"\(Not a directory\); choose another folder$"
    with pytest.raises(OutputError, match=reason), writing(below, "choose another folder"):
        below.mkdir(parents=True)


def test_a_library_that_quotes_the_system_gets_the_same_remedy() -> None:
    words = 'Error writing "a/b": [No space left on device] [source locations=file.cc:1]\nmore'
    both = (OSError, ValueError)
    with pytest.raises(OutputError, match=r"\(No space left on device\); free space or"), writing("a", catch=both):
        raise ValueError(words)
    with pytest.raises(OutputError, match=r"a: cannot be written \(some reason\); choose"), writing("a", catch=both):
        raise ValueError("some reason [source locations=file.cc:1]\nmore")


def test_other_errors_pass_through() -> None:
    with pytest.raises(InputError, match="mine"), writing("a"):
        raise InputError("mine")
    with pytest.raises(ValueError, match="mine"), writing("a"):
        raise ValueError("mine")


@pytest.mark.parametrize(
    ("path", "reason", "shown"),
    [
        ("1", "has 0.51 µm per pixel at level 1", "has 0.51 µm per pixel at level 1"),
        ("a.svs", "cannot open a.svs.partial or 'a.svs'", "cannot open a.svs.partial or 'the file'"),
        ("a.svs", "data.svs differs from a.svs.", "data.svs differs from the file."),
        ("/d/x", "/d/x: bad; /d/x2 and /old/d/x are good", "the file: bad; /d/x2 and /old/d/x are good"),
        ("", "is gone", "is gone"),
    ],
)
def test_a_slide_error_replaces_whole_paths_alone(path: str, reason: str, shown: str) -> None:
    assert SlideError(path, "failed", reason, "look").reason == shown


def test_an_error_of_a_derived_class_has_the_exit_status_of_its_kind() -> None:
    assert exit_status(UnreadableError("the store is gone")) == 2
    assert exit_status(OutputError("full")) == 3
    assert exit_status(BusyError("held")) == 1
