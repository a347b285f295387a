import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from pydicom import Dataset, Sequence
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import UID, JPEGBaseline8Bit, generate_uid

from crcjax.errors import InputError, SlideError
from crcjax.slides.preprocess.tile_slides import TileJob
from crcjax.slides.wsi.discovery import content_hash, dicom_files, find_slides, slide_files, slide_id_of, without_names
from crcjax.slides.wsi.slide import open_slide

SIDE = 256


def _write_series(folder: Path, name: str, shade: int) -> list[Path]:
    """A DICOM slide of two levels, each a file of one frame."""
    folder.mkdir(parents=True, exist_ok=True)
    series = {key: generate_uid() for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    paths = []
    for level in range(2):
        data, measures, group, light = Dataset(), Dataset(), Dataset(), Dataset()
        data.ImageType = ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED" if level else "NONE"]
        data.SOPClassUID, data.SOPInstanceUID = UID("1.2.840.10008.5.1.4.1.1.77.1.6"), generate_uid()
        for key, value in series.items():
            setattr(data, key, value)
        data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "YBR_FULL_422", 0
        data.Rows = data.Columns = data.TotalPixelMatrixColumns = data.TotalPixelMatrixRows = SIDE >> level
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
        data.NumberOfFrames, data.InstanceNumber, data.DimensionOrganizationType = 1, level, "TILED_FULL"
        measures.PixelSpacing = [0.0005 * 2**level] * 2
        group.PixelMeasuresSequence = Sequence([measures])
        data.SharedFunctionalGroupsSequence = Sequence([group])
        light.OpticalPathIdentifier, light.ObjectiveLensPower = "1", 20
        data.OpticalPathSequence = Sequence([light])
        picture = np.full((SIDE >> level, SIDE >> level, 3), shade, np.uint8)
        data.PixelData = encapsulate([simplejpeg.encode_jpeg(picture, 90, "RGB", "422")])
        data.file_meta = FileMetaDataset()
        data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
        paths.append(folder / f"{name}{level}.dcm")
        data.save_as(paths[-1], enforce_file_format=True)
    return paths


def test_a_folder_of_one_dicom_series_is_one_slide_whatever_else_lies_there(tmp_path: Path) -> None:
    folder = tmp_path / "case"
    one = _write_series(folder, "a", 200)
    with open_slide(folder) as slide:
        alone = slide.info
    for name in ("README.txt", "DICOMDIR", ".hidden.dcm"):
        (folder / name).write_text("no slide")
    _write_series(folder / "below", "c", 100)
    assert find_slides([tmp_path]) == [folder, folder / "below"]
    assert slide_files(folder) == one
    with open_slide(folder) as slide:
        assert slide.info == alone
        assert slide.info.level_downsamples == (1.0, 2.0)


def test_several_dicom_series_of_a_folder_are_a_slide_each(tmp_path: Path) -> None:
    one, other = _write_series(tmp_path, "a", 200), _write_series(tmp_path, "b", 100)
    assert find_slides([tmp_path]) == [one[0], other[0]]
    shades, hashes = [], []
    for path in (*one, *other):
        with open_slide(path) as slide:
            shades.append(int(slide.read(0, 0, 8, 8).mean()))
            hashes.append(slide.info.content_hash)
            assert slide.info.size == (SIDE, SIDE)
    assert shades == [200, 200, 100, 100]
    assert hashes[0] == hashes[1] != hashes[2] == hashes[3]
    with pytest.raises(SlideError, match="2 DICOM series, each a slide; name a file of one, or") as caught:
        open_slide(tmp_path)
    assert (caught.value.status, caught.value.path) == ("unsupported", str(tmp_path))
    (tmp_path / "x.svs").touch()
    for path in other:
        path.unlink()
    assert find_slides([tmp_path]) == [one[0], tmp_path / "x.svs"]


def test_a_damaged_file_of_a_dicom_folder_is_named_not_left_out(tmp_path: Path) -> None:
    one = _write_series(tmp_path / "a", "a", 200)
    os.truncate(one[1], 200)
    assert find_slides([tmp_path]) == [tmp_path / "a"]
    with pytest.raises(SlideError, match=r"a1\.dcm in it is damaged, or no DICOM file; copy") as caught:
        open_slide(tmp_path / "a")
    assert caught.value.status == "corrupt"


def test_no_name_of_a_path_is_left_in_a_reason(tmp_path: Path) -> None:
    folder = tmp_path / "Doe^Jane 1957"
    paths = _write_series(folder, "S19-0471-", 200)
    for path, reason in [
        (folder / "H 1.vms", f"not a slide (Couldn't open {folder}/Jim Doe_map.jpg: No such file or directory)"),
        (folder / "H 1.vms", f"fault: [Errno 2] No such file: '{folder}/H 1.vms'"),
        (folder / "H 1.vms", "H 1_map.jpg and H 1.vms differ"),
        (folder, f"{paths[0].name} in it is damaged, or no DICOM file"),
        (folder, "the file/S19-0471-0.dcm is cut off"),
        (Path("Doe^Jane 1957/H 1.vms"), "Couldn't open Doe^Jane 1957/H 1_map.jpg"),
    ]:
        told = without_names(reason, path)
        assert not any(word in told for word in ("Doe", "1957", "H 1", "S19", "0471")), told
        assert len(told) > 5
    (folder / "H 1.vms").write_text(
        "[Virtual Microscope Specimen]\nMapFile=Jim Doe.jpg\nImageFile(1,0)=Jim Doe 2.jpg\n"
    )
    with pytest.raises(SlideError) as caught:
        open_slide(folder / "H 1.vms")
    assert caught.value.reason == "lacks Jim Doe.jpg and 1 more of its files"
    assert "Doe" not in without_names(caught.value.reason, folder / "H 1.vms")
    told = without_names("a TIFF that is damaged at (0, 0) of level 0", tmp_path / "a" / "level.svs")
    assert told == "a TIFF that is damaged at (0, 0) of … 0"


@pytest.mark.real_data
def test_a_real_dicom_folder_with_a_foreign_file_is_the_slide_that_it_was(real_data: Path, tmp_path: Path) -> None:
    original = real_data / "slides" / "dicom_cmu-1-small-region"
    folder = Path(shutil.copytree(original, tmp_path / "slide"))
    folder.chmod(0o755)
    (folder / "README.txt").touch()
    assert find_slides([tmp_path]) == [folder]
    with open_slide(folder) as slide, open_slide(original) as whole:
        assert slide.info.content_hash == whole.info.content_hash


@pytest.mark.parametrize("name", ["/etc/passwd", "x" * 300 + ".jpg", "a\0.jpg"])
def test_an_index_that_names_what_cannot_be_a_file_is_one_clear_error(name: str, tmp_path: Path) -> None:
    index = "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\nImageFile=a.vms\nMapFile="
    (tmp_path / "a.vms").write_text(index + name)
    with pytest.raises(SlideError, match="lacks ") as caught:
        open_slide(tmp_path / "a.vms")
    assert caught.value.status == "missing"


def test_slides_are_found_in_folders_and_dicom_folders_count_as_one(tmp_path: Path) -> None:
    for name in (
        "b/x.svs",
        "b/deep/y.NDPI",
        "b/notes.txt",
        "b/.hidden.svs",
        "d/1.dcm",
        "d/2.dcm",
        "m/z.mrxs",
        "m/z/Slide.tif",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = find_slides([tmp_path, tmp_path / "b" / "x.svs", tmp_path / "absent.svs"])
    names = ["b/x.svs", "b/deep/y.NDPI", "d", "m/z.mrxs", "absent.svs"]
    assert found == [tmp_path / name for name in names]
    assert [slide_id_of(path) for path in found] == ["x", "y", "d", "z", "absent"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no slides below"):
        find_slides([tmp_path / "empty"])


def test_the_content_hash_follows_the_content_not_the_name(small_slide: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(small_slide, tmp_path / "other name.svs"))
    before = content_hash(small_slide)
    assert content_hash(copy) == before
    with open(copy, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    assert content_hash(copy) != before


@pytest.mark.parametrize("slide", ["s.mrxs", "s.vms", "s.vmu"])
def test_all_files_of_a_slide_count_in_its_size_and_its_hash(slide: str, tmp_path: Path) -> None:
    path = tmp_path / slide
    path.write_text(
        "[Virtual Microscope Specimen]\r\nImageFile=s.jpg\r\nImageFile(1,0)= s_1.jpg\r\nMapFile=gone.jpg\r\n"
    )
    data = ["s/Slidedat.ini", "s/Data0000.dat"] if slide == "s.mrxs" else ["s.jpg", "s_1.jpg"]
    for name in data:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(1000))
    (tmp_path / "other.jpg").write_bytes(bytes(1000))
    assert sorted(slide_files(path)) == sorted([path, *(tmp_path / name for name in data)])
    assert TileJob("s", path).size_bytes == path.stat().st_size + 2000
    for name in data:
        before = content_hash(path)
        (tmp_path / name).write_bytes(bytes(999) + b"1")
        assert content_hash(path) != before
    assert TileJob("s", tmp_path / "absent.vms").size_bytes == 0


def test_links_unreadable_and_hidden_entries_neither_stop_a_search_nor_hide_slides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("a/deep", "closed", ".hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "s.svs").touch()
    (tmp_path / "a" / "deep" / "up").symlink_to(tmp_path)
    (tmp_path / "a" / "again").symlink_to(tmp_path / "a" / "deep")
    (tmp_path / "gone.svs").symlink_to(tmp_path / "nowhere.svs")
    (tmp_path / "UPPER.SVS").touch()
    whole = Path.iterdir

    def iterdir(path: Path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return whole(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    found = find_slides([tmp_path])
    names = ["UPPER.SVS", "gone.svs", "a/again/s.svs", "closed"]
    assert found == [tmp_path / name for name in names]
    monkeypatch.setattr(os, "listdir", lambda path: next(iterdir(Path(path))))
    for name, reason in {"gone.svs": "no such file; check the path", "closed": r"cannot be read \(Permission"}.items():
        with pytest.raises(SlideError, match=reason):
            open_slide(tmp_path / name)
    with pytest.raises(SlideError, match="File name too long"):
        open_slide(find_slides(["x" * 300])[0])


def test_dicom_suffixes_may_be_in_capitals(tmp_path: Path) -> None:
    for path in _write_series(tmp_path / "case", "a", 200):
        path.rename(path.with_suffix(".DCM"))
    assert find_slides([tmp_path]) == [tmp_path / "case"]
    assert len(dicom_files(tmp_path / "case")) == 2
