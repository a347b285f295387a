"""Copies of DICOM slides: no attribute that is not on the list, no label, new UIDs, and the same frames."""

import struct
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import openslide
import pydicom
import pytest
import simplejpeg
from pydicom import Dataset, Sequence
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import UID, JPEGBaseline8Bit, generate_uid

from crcjax.errors import InputError, SlideError
from crcjax.slides.deidentify.deidentify import deidentify_slide, report_path

SECRET = "S-2019-04711 Doe"
SIDE = 256
# One of every type of text, and where specimen, container and label are named (assurance of issue: trap by trap).
IDENTIFIERS = {
    **{"PatientName": "Doe^Jane", "PatientID": SECRET, "PatientBirthDate": "19570411", "AccessionNumber": SECRET},
    **{"StudyDate": "20190411", "StudyTime": "102030", "AcquisitionDateTime": "20190411102030", "StudyID": SECRET},
    **{"InstitutionName": SECRET, "OperatorsName": "Doe^John", "ReferringPhysicianName": "Doe^Jim"},
    **{"DeviceSerialNumber": SECRET, "StationName": "S-04711", "Manufacturer": SECRET, "SoftwareVersions": SECRET},
    **{"ContainerIdentifier": SECRET, "BarcodeValue": SECRET, "LabelText": SECRET, "ImageComments": SECRET},
    **{"SeriesDescription": SECRET, "PatientComments": SECRET, "ContentDate": "20190411", "ContentTime": "102030"},
}


def _dataset(kind: str, picture: np.ndarray, series: dict[str, str], number: int, um_per_px: float) -> Dataset:
    height, width = picture.shape[:2]
    data = Dataset()
    data.ImageType = ["DERIVED", "PRIMARY", kind, "NONE" if number == 0 else "RESAMPLED"]
    data.SOPClassUID, data.SOPInstanceUID, data.Modality = UID("1.2.840.10008.5.1.4.1.1.77.1.6"), generate_uid(), "SM"
    for name, value in (series | IDENTIFIERS).items():
        setattr(data, name, value)
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "YBR_FULL_422", 0
    data.Rows = data.Columns = SIDE
    data.BitsAllocated = data.BitsStored = 8
    data.HighBit, data.PixelRepresentation, data.InstanceNumber = 7, 0, number
    data.TotalPixelMatrixColumns, data.TotalPixelMatrixRows = width, height
    data.BurnedInAnnotation = "YES" if kind in ("LABEL", "OVERVIEW") else "NO"
    data.SpecimenLabelInImage = data.BurnedInAnnotation
    data.DimensionOrganizationType = "TILED_FULL"
    measures, group, path, specimen = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [um_per_px / 1000, um_per_px / 1000]
    group.PixelMeasuresSequence = Sequence([measures])
    data.SharedFunctionalGroupsSequence = Sequence([group])
    path.OpticalPathIdentifier, path.OpticalPathDescription, path.ObjectiveLensPower = SECRET[:16], SECRET, 20
    data.OpticalPathSequence = Sequence([path])
    specimen.SpecimenIdentifier, specimen.SpecimenUID = SECRET, generate_uid()
    data.SpecimenDescriptionSequence = Sequence([specimen])
    block = data.private_block(0x11, "Doe Scanner", create=True)
    block.add_new(1, "LO", SECRET)
    block.add_new(2, "OB", SECRET.encode())
    frames = [
        simplejpeg.encode_jpeg(np.ascontiguousarray(_padded(picture[y : y + SIDE, x : x + SIDE])), 90, "RGB", "422")
        for y in range(0, height, SIDE)
        for x in range(0, width, SIDE)
    ]
    data.NumberOfFrames = len(frames)
    data.PixelData = encapsulate(frames)
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    return data


def _padded(tile: np.ndarray) -> np.ndarray:
    return np.pad(tile, ((0, SIDE - tile.shape[0]), (0, SIDE - tile.shape[1]), (0, 0)), mode="edge")


def _write(folder: Path, picture: np.ndarray, change: Callable[[Dataset], None] = lambda data: None) -> Path:
    """A slide of two levels, a label and an overview image; `change` alters level 0."""
    folder.mkdir()
    series = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    small = cv2.resize(picture, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    images = [("VOLUME", picture, 0.5), ("VOLUME", small, 1.0), ("LABEL", small, 8.0), ("OVERVIEW", small, 8.0)]
    for number, (kind, pixels, um_per_px) in enumerate(images):
        data = _dataset(kind, pixels, series, number, um_per_px)
        if number == 0:
            change(data)
        data.save_as(folder / f"{SECRET} {number}.dcm", enforce_file_format=True)
    return folder


@pytest.fixture(scope="module")
def picture(tissue_picture: Callable[..., np.ndarray]) -> np.ndarray:
    return tissue_picture(900, 700)


@pytest.fixture(scope="module")
def labelled(picture: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("dicom") / SECRET, picture)


def _frames(path: Path) -> list[bytes]:
    data = pydicom.dcmread(path)
    return list(generate_frames(data.PixelData, number_of_frames=data.NumberOfFrames))


def _open(folder: Path) -> openslide.OpenSlide:
    return openslide.OpenSlide(min(folder.iterdir()))


def test_no_identifier_label_or_overview_is_in_the_copy_and_its_name(labelled: Path, tmp_path: Path) -> None:
    deidentify_slide(labelled, tmp_path / "copy")
    files = sorted((tmp_path / "copy").iterdir())
    assert [file.name for file in files] == ["000.dcm", "001.dcm"]
    contents = [*(file.read_bytes() for file in files), report_path(tmp_path / "copy").read_bytes()]
    for word in (*IDENTIFIERS.values(), "Doe", "-04711", "20190411", "19570411"):
        assert not any(word.encode() in content for content in contents), word
    with _open(labelled) as original, _open(tmp_path / "copy") as copy:
        assert set(original.associated_images) == {"label", "macro"}
        assert not copy.associated_images


def test_pixels_frames_levels_mpp_and_power_are_the_same(labelled: Path, tmp_path: Path) -> None:
    report = deidentify_slide(labelled, tmp_path / "copy")
    for number in (0, 1):
        assert _frames(tmp_path / "copy" / f"00{number}.dcm") == _frames(labelled / f"{SECRET} {number}.dcm")
    with _open(labelled) as original, _open(tmp_path / "copy") as copy:
        assert copy.level_dimensions == original.level_dimensions
        for name in ("openslide.mpp-x", "openslide.mpp-y", "openslide.objective-power"):
            assert copy.properties[name] == original.properties[name]
        for level, size in enumerate(original.level_dimensions):
            assert copy.read_region((0, 0), level, size) == original.read_region((0, 0), level, size)
    assert (report.format, report.mpp, report.objective_power) == ("dicom", ("0.5", "0.5"), "20")


def test_a_concatenation_of_several_files_is_copied_with_the_same_pixels(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slide"
    folder.mkdir()
    names = sorted(path.name for path in labelled.iterdir())
    for name in names[1:]:
        (folder / name).write_bytes((labelled / name).read_bytes())
    original = pydicom.dcmread(labelled / names[0])
    frames, source, whole = _frames(labelled / names[0]), original.SOPInstanceUID, generate_uid()
    for number, (first, last) in enumerate(((0, 5), (5, len(frames))), 1):
        original.PixelData, original.NumberOfFrames = encapsulate(frames[first:last]), last - first
        original.SOPInstanceUID = original.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        original.ConcatenationUID, original.SOPInstanceUIDOfConcatenationSource = whole, source
        original.InConcatenationNumber, original.InConcatenationTotalNumber = number, 2
        original.ConcatenationFrameOffsetNumber = first
        original.save_as(folder / f"0-{number}.dcm")
    report = deidentify_slide(folder, tmp_path / "copy")
    assert (report.levels, report.size) == (2, (900, 700))
    with _open(labelled) as one, _open(tmp_path / "copy") as two:
        size = one.dimensions
        assert one.read_region((0, 0), 0, size).tobytes() == two.read_region((0, 0), 0, size).tobytes()
    for path in (tmp_path / "copy").iterdir():
        written = path.read_bytes()
        assert not any(uid.encode() in written for uid in (source, whole))


def test_files_whose_suffix_is_in_capitals_are_files_of_the_slide(labelled: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slide"
    folder.mkdir()
    for path in labelled.iterdir():
        (folder / path.with_suffix(".DCM").name).write_bytes(path.read_bytes())
    assert deidentify_slide(folder, tmp_path / "copy").levels == 2


def test_uids_are_new_ones_and_equal_where_they_were_equal(labelled: Path, tmp_path: Path) -> None:
    deidentify_slide(labelled, tmp_path / "copy")
    before, after = (
        [pydicom.dcmread(file, stop_before_pixels=True) for file in sorted(folder.iterdir())[:2]]
        for folder in (labelled, tmp_path / "copy")
    )
    for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"):
        assert after[0][name].value == after[1][name].value != before[0][name].value
    assert after[0].SOPInstanceUID != after[1].SOPInstanceUID
    assert {data.SOPInstanceUID for data in before}.isdisjoint(data.SOPInstanceUID for data in after)
    assert after[0].file_meta.MediaStorageSOPInstanceUID == after[0].SOPInstanceUID
    assert (after[0].PatientIdentityRemoved, after[0].PatientName, after[0].PatientID) == ("YES", "", "")


def test_the_report_names_every_attribute_that_was_left_out(labelled: Path, tmp_path: Path) -> None:
    removed = deidentify_slide(labelled, tmp_path / "copy").removed
    for name in (*IDENTIFIERS, "SpecimenDescriptionSequence", "OpticalPathSequence: OpticalPathDescription"):
        assert f"{name} (2 times)" in removed
    for words in ("label image", "overview image", "UIDs, replaced by new ones"):
        assert words in removed


def test_the_original_is_untouched_and_nothing_is_overwritten(labelled: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in labelled.iterdir()}
    deidentify_slide(labelled, tmp_path / "copy")
    assert {file: file.read_bytes() for file in labelled.iterdir()} == before
    with pytest.raises(InputError, match="not overwritten"):
        deidentify_slide(labelled, tmp_path / "copy")


def _set(**values: object) -> Callable[[Dataset], None]:
    def change(data: Dataset) -> None:
        for name, value in values.items():
            setattr(data, name, value)

    return change


def _commented(data: Dataset) -> None:
    frames = list(generate_frames(data.PixelData, number_of_frames=data.NumberOfFrames))
    comment = SECRET.encode()
    frames[3] = frames[3][:2] + struct.pack(">BBH", 0xFF, 0xFE, len(comment) + 2) + comment + frames[3][2:]
    data.PixelData = encapsulate(frames)


def _long_table(data: Dataset) -> None:
    table = data.PixelData[8 : 8 + struct.unpack_from("<I", data.PixelData, 4)[0]]
    rest = data.PixelData[8 + len(table) :]
    data.PixelData = b"\xfe\xff\x00\xe0" + struct.pack("<I", len(table) + 16) + table + SECRET.encode() + rest


REFUSED = {
    "the label in the picture": (_set(BurnedInAnnotation="YES"), "says that its picture shows the label"),
    "a comment in a frame": (_commented, "a frame of file 0 carries a comment"),
    "another series": (_set(SeriesInstanceUID=generate_uid()), "holds 2 series"),
    "a word of its own": (_set(ImageType=["DERIVED", "PRIMARY", "VOLUME", "DOE"]), "ImageType that is not known"),
}


@pytest.mark.filterwarnings("ignore:Invalid value")
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_copied_safely_is_refused_and_leaves_nothing(
    case: str, picture: np.ndarray, tmp_path: Path
) -> None:
    change, words = REFUSED[case]
    original = _write(tmp_path / "original", picture, change)
    with pytest.raises(SlideError, match=words) as caught:
        deidentify_slide(original, tmp_path / "out" / "copy")
    assert caught.value.status == "unsupported"
    assert not list((tmp_path / "out").iterdir())


def test_a_single_file_of_a_slide_is_refused(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="name the slide's folder"):
        deidentify_slide(min(labelled.iterdir()), tmp_path / "copy")


def _wrong_table(data: Dataset) -> None:
    data.PixelData = data.PixelData[:8] + b"\x55" + data.PixelData[9:]


@pytest.mark.parametrize("change", [_long_table, _wrong_table])
def test_an_offset_table_that_does_not_fit_is_named_before_openslide_crashes_on_it(
    change: Callable[[Dataset], None], picture: np.ndarray, tmp_path: Path
) -> None:
    original = _write(tmp_path / "original", picture, change)
    with pytest.raises(SlideError, match="the offset table of file 0 does not fit its frames"):
        deidentify_slide(original, tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


@pytest.mark.parametrize("part", [0.02, 0.5, 0.99])
def test_a_file_that_is_cut_off_is_named(part: float, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    for number, file in enumerate(sorted(labelled.iterdir())):
        data = file.read_bytes()
        (tmp_path / "cut" / file.name).write_bytes(data[: int(part * len(data))] if number == 0 else data)
    with pytest.raises(SlideError) as caught:
        deidentify_slide(tmp_path / "cut", tmp_path / "copy")
    assert caught.value.status in ("corrupt", "unsupported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut"]


def test_any_damage_of_the_attributes_gives_a_named_error_or_a_right_copy(labelled: Path, tmp_path: Path) -> None:
    rng, endings = np.random.default_rng(0), set()
    (tmp_path / "damaged").mkdir()
    for file in labelled.iterdir():
        (tmp_path / "damaged" / file.name).write_bytes(file.read_bytes())
    first = min((tmp_path / "damaged").iterdir())
    data = first.read_bytes()
    header = data.index(b"\xe0\x7f\x10\x00")
    for number in range(120):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(128, header + 12)] = rng.integers(256)
        first.write_bytes(damaged)
        copy = tmp_path / f"copy{number}"
        try:
            deidentify_slide(tmp_path / "damaged", copy)
            contents = b"".join(file.read_bytes() for file in copy.iterdir())
            assert b"Doe" not in contents
            assert b"-04711" not in contents  # without its hyphen, it may stand in a new UID by chance
            endings.add("copied")
        except SlideError as error:
            endings.add(error.status)
            assert not copy.exists()
    assert endings == {"copied", "corrupt", "unsupported"}


@pytest.mark.real_data
def test_real_dicom_slides_are_copied_without_their_names(real_data: Path, tmp_path: Path) -> None:
    for name, words in {
        "dicom_cmu-1-small-region": (b"20210720", b"133842", b"2425734838"),
        "dicom_tcga-prad_penmarks": (b"TCGA", b"AAJU", b"2021-01-07", b"59057645086623"),
    }.items():
        original, copy = real_data / "slides" / name, tmp_path / name
        deidentify_slide(original, copy)
        assert any(word in file.read_bytes() for word in words for file in original.iterdir())
        for file in copy.iterdir():
            assert not any(word in file.read_bytes() for word in words)
        with _open(original) as one, _open(copy) as two:
            assert one.level_dimensions == two.level_dimensions
            for level, size in enumerate(one.level_dimensions):
                assert one.read_region((0, 0), level, size) == two.read_region((0, 0), level, size)
