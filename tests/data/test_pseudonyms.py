"""Pseudonyms match ids only with the key, and stores and outputs do not identify a person."""

import csv
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crcjax.data.cohort import load_cohort
from crcjax.data.pseudonyms import load_key, pseudonym, write_pseudonymous
from crcjax.errors import InputError, OutputError
from crcjax.slides.store.tile_store import open_store, tiled_slides
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

KEY = b"0123456789abcdef0123456789abcdef"
CASE, SLIDE = "Doe-Jane-1957", "S19-04711-A1"


def _key_file(path: Path, content: bytes = KEY, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def _cohort(folder: Path, rows: list[str], columns: str = "slide_id,case_id,path,subtype,site,split,born") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cohort.csv").write_text("\n".join([columns, *rows]) + "\n")
    return folder / "cohort.csv"


def test_a_pseudonym_is_the_hmac_of_rfc_4231_cut_to_80_bits() -> None:
    text = "Test Using Larger Than Block-Size Key - Hash Key First"  # section 4.7
    assert pseudonym(b"\xaa" * 131, text) == "p60e431591ee0b67f0d8a"


def test_equal_keys_and_ids_alone_give_equal_pseudonyms() -> None:
    ids = [f"S19-{number:05d}" for number in range(2000)]
    actual = [pseudonym(KEY, name) for name in ids]
    assert actual == [pseudonym(KEY, name) for name in ids]
    assert len({*actual, *(pseudonym(KEY[::-1], name) for name in ids)}) == 4000


def test_the_lines_end_of_a_key_file_is_no_part_of_the_key(tmp_path: Path) -> None:
    assert load_key(_key_file(tmp_path / "a", KEY + b"\r\n")) == load_key(_key_file(tmp_path / "b")) == KEY


def test_a_key_that_all_can_read_is_short_or_missing_is_refused(tmp_path: Path) -> None:
    for mode in (0o604, 0o602, 0o644):
        with pytest.raises(InputError, match="every user can read the key; chmod 600"):
            load_key(_key_file(tmp_path / "open", mode=mode))
    with pytest.raises(InputError, match="31 bytes can be guessed; make one of 32"):
        load_key(_key_file(tmp_path / "short", KEY[:31] + b"\n"))
    with pytest.raises(InputError, match="cannot be read"):
        load_key(tmp_path / "absent")


def test_a_pseudonymous_cohort_keeps_what_training_needs_and_leaves_paths_and_further_columns(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path, [f"{SLIDE},{CASE},/x/{SLIDE}.svs,immune,north,train,1957", "b,c,,,south,,1960"])
    assert write_pseudonymous(cohort, KEY, tmp_path / "new.csv") == 2
    written = load_cohort(tmp_path / "new.csv", None).rows
    assert [row.case_id for row in written] == [pseudonym(KEY, CASE), pseudonym(KEY, "c")]
    assert [(row.label, row.site, row.split) for row in written] == [
        ("immune", "north", "train"),
        (None, "south", None),
    ]
    assert all(row.path is None and not row.extra for row in written)
    assert not any(word in (tmp_path / "new.csv").read_text() for word in (CASE, SLIDE, "1957", "/x/"))


def test_further_columns_are_kept_only_by_name(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path, [f"{SLIDE},{CASE},,immune,north,train,1957"])
    write_pseudonymous(cohort, KEY, tmp_path / "new.csv", ["born"])
    assert load_cohort(tmp_path / "new.csv", None).rows[0].extra == {"born": "1957"}
    with pytest.raises(InputError, match="--keep age: has no such column; its further columns are: born"):
        write_pseudonymous(cohort, KEY, tmp_path / "other.csv", ["age"])
    with pytest.raises(InputError, match="--keep Path: paths identify, and are never kept"):
        write_pseudonymous(cohort, KEY, tmp_path / "other.csv", ["Path"])
    plain = _cohort(tmp_path / "plain", ["a,A,,0.25"], "slide_id,case_id,path,MPP")
    with pytest.raises(InputError, match="--keep age: has no such column; its further columns are: none"):
        write_pseudonymous(plain, KEY, tmp_path / "other.csv", ["age"])
    write_pseudonymous(plain, KEY, tmp_path / "other.csv", ["mpp", "site"])
    assert load_cohort(tmp_path / "other.csv", None).rows[0].mpp == 0.25


def test_the_column_of_the_labels_keeps_its_name(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path, ["a,A,MSS,immune"], "slide_id,case_id,msi,subtype")
    write_pseudonymous(cohort, KEY, tmp_path / "new.csv", ["subtype"], "msi")
    (row,) = load_cohort(tmp_path / "new.csv", None, "msi").rows
    assert (row.label, row.extra) == ("MSS", {"subtype": "immune"})


def test_a_cohort_is_not_overwritten_and_an_absent_folder_is_named(tmp_path: Path) -> None:
    cohort = _cohort(tmp_path, [f"{SLIDE},{CASE},,immune,north,train,1957"])
    with pytest.raises(InputError, match="not overwritten"):
        write_pseudonymous(cohort, KEY, cohort)
    with pytest.raises(OutputError, match="cannot be written"):
        write_pseudonymous(cohort, KEY, tmp_path / "absent" / "new.csv")


def test_a_store_tiled_with_a_key_and_all_that_is_printed_name_no_slide_case_or_path(tmp_path: Path) -> None:
    folder = tmp_path / "patient-Doe"
    paint_slide(folder / f"{SLIDE}.svs", SlideSpec("immune", 3, size_px=(800, 640), mpp=1.0))
    data = (folder / f"{SLIDE}.svs").read_bytes()
    (folder / "S19-damaged.svs").write_bytes(data[: len(data) // 2])
    rows = [f"{SLIDE},{CASE},{SLIDE}.svs,immune,north,train,1957"]
    rows += [f"{name},{CASE},{name}.svs,immune,north,train,1957" for name in ("S19-damaged", "S19-absent")]
    cohort, key = _cohort(folder, rows), _key_file(tmp_path / "key")
    command = [sys.executable, "-m", "crcjax.cli", "tile", "--cohort", str(cohort), "--mag", "10x", "--tile-px", "64"]
    command += ["--out", str(tmp_path / "store"), "--pseudonym-key", str(key)]
    for tiled in (True, False):  # the second time it is there already
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1, done.stderr
        for name in ("S19-damaged", "S19-absent"):
            assert f": {pseudonym(KEY, name)}: " in done.stderr, tiled
        output = (done.stdout + done.stderr).encode()
        contents = [path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file()]
        names = "\n".join(str(path.relative_to(tmp_path)) for path in (tmp_path / "store").rglob("*")).encode()
        for word in (SLIDE, CASE, "patient-Doe", "S19-damaged", "S19-absent"):
            assert not any(word.encode() in content for content in [output, names, *contents]), (
                word,
                output.decode()[-900:],
            )
    assert tiled_slides(tmp_path / "store") == [pseudonym(KEY, SLIDE)]
    store = open_store(tmp_path / "store", pseudonym(KEY, SLIDE))
    shutil.rmtree(folder)
    assert store.info.path == ""
    assert store.read_pixels([0]).any()


def test_a_library_that_names_a_file_of_the_slide_is_not_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "John_Doe_H12345"
    folder.mkdir()
    slide, key = folder / "John_Doe_H12345.vms", _key_file(tmp_path / "key")
    (folder / "John_Doe_H12345.jpg").touch()
    index = {"NoLayers": 1, "NoJpegColumns": 1, "NoJpegRows": 1, "ImageFile": "John_Doe_H12345.jpg"}
    index |= {"MapFile": "Jim_Doe_map.jpg", "MacroImage": "John_Doe_H12345.jpg"}
    lines = [f"{name}={value}" for name, value in index.items()]
    slide.write_text("\n".join(["[Virtual Microscope Specimen]", *lines]))
    command = [sys.executable, "-m", "crcjax.cli", "tile", str(slide), "--out", str(tmp_path / "store"), "--mpp", "0.5"]
    outputs = []
    for options in ([], ["--pseudonym-key", str(key)]):
        done = subprocess.run([*command, *options], capture_output=True, text=True)
        assert done.returncode == 1
        outputs.append(done.stderr + (tmp_path / "store" / "manifest.jsonl").read_text())
        shutil.rmtree(tmp_path / "store")
    assert "Jim_Doe_map.jpg" in outputs[0]
    assert not any(word in outputs[1] for word in ("John", "Jim", "Doe", "12345"))


def test_a_store_without_pixels_cannot_hide_its_paths(tmp_path: Path) -> None:
    key = _key_file(tmp_path / "key")
    command = [sys.executable, "-m", "crcjax.cli", "tile", str(tmp_path), "--out", str(tmp_path / "store")]
    done = subprocess.run([*command, "--no-pixels", "--pseudonym-key", str(key)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "keep the pixels" in done.stderr


def test_the_command_writes_the_cohort_that_fits_the_store(tmp_path: Path) -> None:
    cohort, key = _cohort(tmp_path, [f"{SLIDE},{CASE},,immune,north,train,1957"]), _key_file(tmp_path / "key")
    command = [sys.executable, "-m", "crcjax.cli", "pseudonyms", str(cohort), "--pseudonym-key", str(key)]
    subprocess.run([*command, "--out", str(tmp_path / "new.csv")], check=True)
    with open(tmp_path / "new.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["slide_id"] == pseudonym(KEY, SLIDE)
