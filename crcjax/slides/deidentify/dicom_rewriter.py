"""Rewrites a DICOM slide from allow-listed attributes and its compressed frames, which are copied byte for byte."""

from __future__ import annotations

import hashlib
import io
import os
import struct
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import pydicom
from pydicom import DataElement, Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import generate_fragments, itemize_fragment, parse_basic_offsets
from pydicom.errors import InvalidDicomError
from pydicom.uid import UID, generate_uid

from crcjax.slides.deidentify.embedded_metadata import JPEG, JPEG2000, embedded_metadata, stripped_profile
from crcjax.slides.deidentify.tiff_rewriter import UnsafeError

# The allow-list (attributes of PS3.3 A.32.8): numbers that decoding and placing the frames needs.
_NUMBERS = {
    *("SamplesPerPixel", "PlanarConfiguration", "NumberOfFrames", "Rows", "Columns", "BitsAllocated", "BitsStored"),
    *("HighBit", "PixelRepresentation", "LossyImageCompressionRatio", "InstanceNumber", "RepresentativeFrameNumber"),
    *(
        "ImagedVolumeWidth",
        "ImagedVolumeHeight",
        "ImagedVolumeDepth",
        "TotalPixelMatrixColumns",
        "TotalPixelMatrixRows",
    ),
    *("TotalPixelMatrixFocalPlanes", "NumberOfOpticalPaths", "ImageOrientationSlide", "PixelSpacing", "SliceThickness"),
    *("XOffsetInSlideCoordinateSystem", "YOffsetInSlideCoordinateSystem", "ZOffsetInSlideCoordinateSystem"),
    *("ColumnPositionInTotalImagePixelMatrix", "RowPositionInTotalImagePixelMatrix", "DimensionIndexValues"),
    *("DimensionIndexPointer", "FunctionalGroupPointer", "ObjectiveLensPower", "ObjectiveLensNumericalAperture"),
    # A concatenation is an image whose frames are divided among several files.
    *("InConcatenationNumber", "InConcatenationTotalNumber", "ConcatenationFrameOffsetNumber"),
}
_CODES = {
    *("ImageType", "FrameType", "Modality", "PhotometricInterpretation", "DimensionOrganizationType"),
    *("LossyImageCompression", "LossyImageCompressionMethod", "BurnedInAnnotation", "SpecimenLabelInImage"),
}
_CODE_VALUES = {
    *("ORIGINAL", "DERIVED", "PRIMARY", "VOLUME", "NONE", "RESAMPLED", "SM", "TILED_FULL", "TILED_SPARSE", "00", "01"),
    *("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "ISO_10918_1", "ISO_15444_1", "NO"),
}
_UIDS = {
    *("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "DimensionOrganizationUID"),
    *("ConcatenationUID", "SOPInstanceUIDOfConcatenationSource"),
}
_SEQUENCES = {
    *("TotalPixelMatrixOriginSequence", "DimensionOrganizationSequence", "DimensionIndexSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelMeasuresSequence"),
    *("PlanePositionSlideSequence", "FrameContentSequence", "WholeSlideMicroscopyImageFrameTypeSequence"),
    "OpticalPathSequence",
}
_NUMBER_TYPES = {"US", "UL", "SS", "SL", "FL", "FD", "IS", "DS", "AT"}
# Attributes of type 2: readers may require them, but they may be empty.
_EMPTY = (
    *("PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"),
    *("AccessionNumber", "ReferringPhysicianName"),
)
_SLIDE_CLASS = "1.2.840.10008.5.1.4.1.1.77.1.6"
_STANDARD = "1.2.840.10008."  # prefix of the UIDs that the standard defines
_COMPRESSIONS = {
    "1.2.840.10008.1.2.4.50": JPEG,
    "1.2.840.10008.1.2.4.90": JPEG2000[0],
    "1.2.840.10008.1.2.4.91": JPEG2000[0],
}
_PIXEL_DATA, _END = b"\xe0\x7f\x10\x00", b"\xfe\xff\xdd\xe0" + bytes(4)
_UNDEFINED = 0xFFFFFFFF
_SHORTEST = 4  # bytes: shorter texts occur by chance in a few kilobytes of attributes


@dataclass(frozen=True)
class Instance:
    """One file of the copy: the bytes before its pixels, and the place of the pixels in the original (`path`, `pixels_at`)."""

    path: Path
    header: bytes
    pixels_at: int
    frames: int
    compression: int


@dataclass(frozen=True)
class Series:
    """The copy of a DICOM slide; `removed` names what is left out, `removed_texts` are the texts of that."""

    instances: list[Instance]
    copied_attributes: tuple[str, ...]
    removed: tuple[str, ...]
    removed_texts: set[bytes]


@dataclass
class _Ledger:
    """Collects, over the files of a series, new UIDs by old ones, counts of copied and removed attributes, and texts."""

    uids: dict[str, str] = field(default_factory=dict)
    copied: Counter[str] = field(default_factory=Counter)
    removed: Counter[str] = field(default_factory=Counter)
    removed_texts: set[bytes] = field(default_factory=set)


def plan_series(files: list[Path]) -> Series:
    """Plans the copy of all files of one series.

    Raises:
      UnsafeError: the series cannot be copied safely.
      ValueError: a file is damaged.
    """
    ledger, series, instances = _Ledger(), set(), []
    with pydicom.config.disable_value_validation(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd values are not copied, or are numbers
        for number, path in enumerate(files):
            ledger.removed_texts |= {name.encode() for name in (path.stem, path.parent.name) if len(name) >= _SHORTEST}
            try:
                with open(path, "rb") as file:
                    original = pydicom.dcmread(file, stop_before_pixels=True)
                    instance = _plan_instance(number, path, original, file.tell(), ledger)
                series.add(original.SeriesInstanceUID)
            except (AttributeError, NotImplementedError, InvalidDicomError) as error:
                raise ValueError(f"file {number}: {error}") from error
            instances += [instance] if instance else []
    if len(series) > 1:
        raise UnsafeError(f"the folder holds {len(series)} series; a slide is one")
    written = b"\n".join(instance.header for instance in instances)
    # These may contain a short number by chance.
    for known in (*ledger.uids.values(), _SLIDE_CLASS, *_COMPRESSIONS):
        written = written.replace(known.encode(), b"")
    if leaked := [text for text in ledger.removed_texts if text in written]:
        raise UnsafeError(f"{len(leaked)} texts that are to be removed occur in its allowed attributes too")
    removals = [f"{name} ({count} times)" if count > 1 else name for name, count in ledger.removed.items()]
    return Series(instances, tuple(ledger.copied), (*removals, "UIDs, replaced by new ones"), ledger.removed_texts)


def _plan_instance(number: int, path: Path, original: Dataset, pixels_at: int, ledger: _Ledger) -> Instance | None:
    """Plans the copy of one file; None for a label, an overview, or any other image that is no level."""
    ledger.removed_texts |= set(_texts(original))
    kind = (*original.get("ImageType", ()), "", "", "")[2]
    if kind != "VOLUME":
        word = kind.lower() if kind in ("LABEL", "OVERVIEW", "THUMBNAIL") else "further"
        ledger.removed[f"{word} image"] += 1
        return None
    _check(original, number)
    syntax = original.file_meta.TransferSyntaxUID
    header = _header(_allowed(original, ledger), syntax)
    return Instance(path, header, pixels_at, int(original.get("NumberOfFrames") or 1), _COMPRESSIONS[syntax])


def _check(original: Dataset, number: int) -> None:
    if original.get("SOPClassUID") != _SLIDE_CLASS:
        raise UnsafeError(f"file {number} is not a whole-slide image")
    if original.file_meta.TransferSyntaxUID not in _COMPRESSIONS:
        raise UnsafeError(f"file {number} is compressed in a way that may hide something; JPEG and JPEG 2000 are known")
    for name in ("ImageType", "PhotometricInterpretation"):
        if name not in original or not _is_plain(original[name]):
            raise UnsafeError(f"file {number} has a {name} that is not known")
    for name in ("BurnedInAnnotation", "SpecimenLabelInImage"):
        if original.get(name, "NO") != "NO":
            raise UnsafeError(f"file {number} says that its picture shows the label ({name})")


def _allowed(original: Dataset, ledger: _Ledger, within: str = "") -> Dataset:
    """Copies the attributes of a data set that are on the list; equal UIDs are replaced by equal new ones."""
    copied = Dataset()
    for element in original:
        name, value = element.keyword, element.value
        if name in _SEQUENCES and element.VR == "SQ":
            setattr(copied, name, [_allowed(item, ledger, f"{within}{name}: ") for item in value])
        elif name in _UIDS and element.VR == "UI":
            setattr(copied, name, ledger.uids.setdefault(str(value), generate_uid(None)))
        elif name == "SOPClassUID":
            copied.SOPClassUID = _SLIDE_CLASS
        elif name == "ICCProfile":
            copied.ICCProfile = stripped_profile(value)
        elif _is_plain(element):
            copied.add(element)
        else:
            ledger.removed[f"{within}{name or 'private attribute'}"] += 1
            continue
        ledger.copied[name] += 1
    return copied


def _is_plain(element: DataElement) -> bool:
    """Whether an element is a number or a code of the lists above, which cannot identify anyone."""
    if element.keyword in _NUMBERS:
        return element.VR in _NUMBER_TYPES
    values = element.value if element.VM > 1 else [element.value]
    return element.keyword in _CODES and element.VR == "CS" and all(value in _CODE_VALUES for value in values)


def _texts(original: Dataset) -> Iterator[bytes]:
    """All texts of a file that could identify a person."""
    for element in original.iterall():
        if element.VR == "SQ" or element.VR in _NUMBER_TYPES or _is_plain(element) or element.keyword == "ICCProfile":
            continue
        values = element.value if element.VM > 1 else [element.value]
        for value in values:
            text = value if isinstance(value, bytes) else str(value).encode()
            if len(text) >= _SHORTEST and value not in _CODE_VALUES and not text.startswith(_STANDARD.encode()):
                yield text[:256]


def _header(copied: Dataset, syntax: str) -> bytes:
    for name in _EMPTY:
        setattr(copied, name, "")
    copied.ContainerIdentifier, copied.PatientIdentityRemoved = "none", "YES"
    copied.DeidentificationMethod = "allow-list"
    copied.file_meta = FileMetaDataset()
    copied.file_meta.TransferSyntaxUID = UID(syntax)
    header = io.BytesIO()
    copied.save_as(header, enforce_file_format=True)
    return header.getvalue()


def write_series(series: Series, folder: Path) -> str:
    """Writes the copy's files, named by number, and returns the hash of their frames.

    Raises:
      UnsafeError: a frame carries something beside pixels.
      ValueError: a frame is damaged.
    """
    digest = hashlib.sha256()
    folder.mkdir()
    for number, instance in enumerate(series.instances):
        with open(instance.path, "rb") as source, open(folder / f"{number:03d}.dcm", "xb") as out:
            source.seek(instance.pixels_at)
            table = _offset_table(source, digest)
            out.write(instance.header + _PIXEL_DATA + struct.pack("<2sHI", b"OB", 0, _UNDEFINED))
            out.write(itemize_fragment(_table_bytes(table)))
            frame_offsets, at = [], 0
            for frame in _frames(source, digest):
                if metadata := embedded_metadata(frame, instance.compression, 0):
                    raise UnsafeError(f"a frame of file {number} carries {metadata}, and frames are copied unchanged")
                frame_offsets.append(at)
                at += out.write(itemize_fragment(frame))
            if len(frame_offsets) != instance.frames:
                raise UnsafeError(f"file {number} has frames in several pieces")
            # A table may be empty. OpenSlide's reader crashes on a wrong one.
            if table and table != frame_offsets:
                raise ValueError(f"the offset table of file {number} does not fit its frames")
            out.write(_END)
            out.flush()
            os.fsync(out.fileno())
    return digest.hexdigest()


def frames_hash(folder: Path) -> str:
    """Reads the frames of a written copy and returns their hash."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.dcm")):
        with open(path, "rb") as file:
            pydicom.dcmread(file, stop_before_pixels=True)
            _offset_table(file, digest)
            for _ in _frames(file, digest):
                pass
            if file.read(1):
                return "bytes after the pixels"
    return digest.hexdigest()


def _offset_table(source: BinaryIO, digest: Any) -> list[int]:
    """Reads the basic offset table of encapsulated pixels (PS3.5 A.4) into the digest. Raises ValueError if it is damaged."""
    tag, kind, _, length = struct.unpack("<4s2sHI", source.read(12))
    if tag != _PIXEL_DATA or kind not in (b"OB", b"OW") or length != _UNDEFINED:
        raise ValueError("its pixels are not encapsulated frames")
    table = parse_basic_offsets(source)
    digest.update(struct.pack("<I", 4 * len(table)) + _table_bytes(table))
    return table


def _table_bytes(table: list[int]) -> bytes:
    return struct.pack(f"<{len(table)}I", *table)


def _frames(source: BinaryIO, digest: Any) -> Iterator[bytes]:
    """Yields the frames after the offset table and adds each to the digest. Raises ValueError if they are damaged or cut off."""
    try:
        for frame in generate_fragments(source):
            digest.update(struct.pack("<I", len(frame)) + frame)
            yield frame
    except MemoryError:
        raise ValueError("it states a frame of gigabytes") from None
    # pydicom reads to the end of a file that is cut off without an error.
    source.seek(-4, os.SEEK_CUR)
    if source.read(len(_END)) != _END:
        raise ValueError("it is cut off")
