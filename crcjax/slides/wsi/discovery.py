"""Finds the slides on a disk and the files that belong to each."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from crcjax.errors import InputError, SlideError

SUFFIXES = {".svs", ".tif", ".tiff", ".ndpi", ".vms", ".vmu", ".scn", ".mrxs", ".svslide", ".bif", ".czi"}
_DICOM = ".dcm"
_LONGEST_ID = 200  # bytes: files named after a slide add up to 25, and file systems allow 255
_HASHED_BYTES = 1 << 20
_SHORTEST_NAME = 3  # letters: shorter ones name nobody and are ordinary words
_INDEX_BYTES = 1 << 20  # of a Hamamatsu or MIRAX index, pages of text
# The lines of an index that name a required file. Of several focal planes only the first is read.
_PARTS = {
    ".mrxs": r"INDEXFILE|FILE_\d+",
    ".vms": r"MapFile|MacroImage|ImageFile(\(0\)|\((0,)?\d+,\d+\))?",
    ".vmu": r"MapFile|MacroImage|ImageFile",
}


def find_slides(paths: Sequence[str | Path]) -> list[Path]:
    """Lists the slides of files and folders: the given files, whether they exist or not, and every slide below a folder.

    A folder with the DICOM files of one series and no other slide is one slide. Otherwise a series is named by its first
    file. Raises InputError for a folder without slides.
    """
    slides: list[Path] = []
    for path in (Path(path).expanduser() for path in paths):
        path_slides = _slides_below(path, set()) if os.path.isdir(path) else [path]
        if not path_slides:
            raise InputError(f"{path}: no slides below this folder; crcjax doctor lists the formats")
        slides += path_slides
    return list(dict.fromkeys(slides))


def _slides_below(folder: Path, visited: set[str]) -> list[Path]:
    # A link to a folder above, or to one that was searched already, adds nothing.
    if (place := os.path.realpath(folder)) in visited:
        return []
    visited.add(place)
    try:
        entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    except OSError:
        # Opening the folder later reports why it cannot be read. Its slides are not left out silently.
        return [folder]
    # A broken link counts as a slide: opening it reports the fault.
    slides = [entry for entry in entries if entry.suffix.lower() in SUFFIXES and not os.path.isdir(entry)]
    # The data folder beside a MIRAX file belongs to it.
    mirax = {file.stem for file in slides if file.suffix.lower() == ".mrxs"}
    if series := _dicom_series(folder):
        unnamed = series.pop("", [])
        if slides or len(series) > 1:
            slides = sorted([*slides, *(files[0] for files in series.values()), *unnamed])
        else:
            slides = [folder]
    for entry in entries:
        if os.path.isdir(entry) and entry.name not in mirax:
            slides += _slides_below(entry, visited)
    return slides


def slide_id_of(path: str | Path) -> str:
    """The file's name without its suffix; for a DICOM folder the folder's name."""
    path = Path(path)
    return path.name if os.path.isdir(path) else path.stem


def slide_id_fault(slide_id: str) -> str:
    """Why a slide id cannot name the slide's files, and what to do; empty if it can."""
    fault = ""
    if not slide_id or slide_id.startswith("."):
        fault = "is empty or begins with a dot"
    elif bad := sorted({letter for letter in slide_id if letter in "/\\" or not letter.isprintable()}):
        fault = f"holds {bad[0]!r}"
    elif len(os.fsencode(slide_id)) > _LONGEST_ID:
        fault = f"is {len(os.fsencode(slide_id))} bytes long, more than {_LONGEST_ID}"
    shown = slide_id if len(slide_id) <= 40 else f"{slide_id[:40]}…"
    return (
        fault
        and f"the slide id {shown!r} cannot name a file: it {fault}; rename the file, or give it another slide_id in a cohort"
    )


def first_file(path: Path) -> Path:
    """Returns the file by which a slide is opened. Raises SlideError: `missing`, `corrupt`, `unsupported`."""
    try:
        os.stat(path)
        if os.path.isdir(path):
            os.listdir(path)
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        remedy = "check its permissions" if isinstance(error, PermissionError) else "check the path"
        raise SlideError(path, "missing", reason, remedy) from error
    if not path.is_dir():
        _check_readable(path, path)
        if lacking := _lacking_files(path):
            more = f" and {len(lacking) - 1} more of its files" if len(lacking) > 1 else ""
            raise SlideError(path, "missing", f"lacks {lacking[0]}{more}", "copy all files of the slide")
        return path
    series = _dicom_series(path)
    if not series:
        raise SlideError(path, "unsupported", "a folder without .dcm files is no slide", "name a slide file")
    damaged = series.pop("", [])
    for file in damaged:
        _check_readable(path, file)
    if len(series) > 1:
        reason = f"a folder of {len(series)} DICOM series, each a slide"
        raise SlideError(path, "unsupported", reason, "name a file of one, or give each a folder of its own")
    if series and damaged:
        reason = f"{damaged[0].name} in it is damaged, or no DICOM file"
        raise SlideError(path, "corrupt", reason, "copy the folder again, or take the file out of it")
    file = (next(iter(series.values())) if series else damaged)[0]
    _check_readable(path, file)
    return file


def _check_readable(path: Path, file: Path) -> None:
    try:
        with open(file, "rb") as opened:
            if not opened.read(1):
                raise SlideError(path, "corrupt", "the file is empty", "copy it again")
    except OSError as error:
        remedy = "check its permissions" if isinstance(error, PermissionError) else "check the disk that holds it"
        raise SlideError(path, "missing", f"cannot be read ({error.strerror})", remedy) from error


def slide_files(path: Path) -> list[Path]:
    """Lists all files of a slide that exist.

    A DICOM slide has the files of its series, MIRAX those of its data folder, and .vms and .vmu (Hamamatsu) those that
    the index names.
    """
    if os.path.isdir(path):
        return dicom_files(path)
    suffix = path.suffix.lower()
    if not os.path.exists(path):
        return []
    if suffix == _DICOM:
        series = _dicom_series(path.parent)
        return next((files for uid, files in series.items() if uid and path in files), [path])
    if suffix == ".mrxs" and path.with_suffix("").is_dir():
        return [path, *sorted(file for file in path.with_suffix("").iterdir() if file.is_file())]
    if suffix in (".vms", ".vmu"):
        named = {name for _, name in _index_lines(path)}
        return [path, *(file for file in sorted(path.parent.iterdir()) if file.name in named and file != path)]
    return [path]


def bytes_of(path: Path) -> int:
    """The bytes of all files of a slide; 0 if it is missing or cannot be read."""
    try:
        return sum(file.stat().st_size for file in slide_files(path))
    except OSError:
        return 0


def _lacking_files(path: Path) -> list[str]:
    """Names the files that a slide needs and that do not exist."""
    suffix = path.suffix.lower()
    index, names = path, []
    if suffix == ".mrxs":
        index, names = path.with_suffix("") / "Slidedat.ini", ["Slidedat.ini"]
    if suffix in _PARTS and index.is_file():
        names += [name for key, name in _index_lines(index) if name and re.fullmatch(_PARTS[suffix], key)]
    folder = f"{path.stem}/" if index != path else ""
    return [folder + name for name in names if not os.path.isfile(f"{path.parent}/{folder}{name}")]


def _index_lines(index: Path) -> list[tuple[str, str]]:
    """Reads the (key, value) pairs of an index file, in all sections."""
    with open(index, "rb") as opened:
        lines = opened.read(_INDEX_BYTES).decode("utf-8", "replace").splitlines()
    pairs = [line.partition("=") for line in lines]
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def without_names(text: str, path: Path) -> str:
    """Removes from a library's message what may name a person: the slide's path and the names of its folders and files.

    The text after a path may be the name of another file and is removed too.
    """
    paths = {path, path.absolute(), path.resolve()}
    folders = {f"{parent}/" for known in paths for parent in known.parents} - {"./", "//"}
    for place in sorted([*map(str, paths), *folders], key=len, reverse=True):
        text = re.sub(rf"(?<!\w)['\"]?{re.escape(place)}.*?(\)?)$", r"…\1", text, flags=re.DOTALL)
    names = {part for known in paths for part in known.parts}
    with suppress(OSError):
        names |= {file.name for file in slide_files(path)} | {Path(name).name for name in _lacking_files(path)}
    names |= {Path(name).stem for name in names}
    for name in sorted(names, key=len, reverse=True):
        if len(name) >= _SHORTEST_NAME:
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "…", text, flags=re.IGNORECASE)
    return text


def content_hash(path: Path) -> str:
    """SHA-256 over size, first and last MiB and 16 blocks of 64 KiB between, of each of the slide's files; names do not count.

    It is fast for gigabytes. It does not detect a change of single bytes elsewhere; the store's checksums protect the tiles.
    """
    digest = hashlib.sha256()
    for file in slide_files(path):
        with open(file, "rb") as opened:
            _add_content(digest, opened, file.stat().st_size)
    return digest.hexdigest()


def content_hash_of(file: io.BufferedReader, size: int) -> str:
    """The `content_hash` of a slide of one file that is open for reading."""
    digest = hashlib.sha256()
    _add_content(digest, file, size)
    return digest.hexdigest()


def _add_content(digest: hashlib._Hash, file: io.BufferedReader, size: int) -> None:
    digest.update(size.to_bytes(8, "little"))
    file.seek(0)
    digest.update(file.read(_HASHED_BYTES))
    for i in range(16):
        file.seek(size * (i + 1) // 17)
        digest.update(file.read(1 << 16))
    file.seek(max(0, size - _HASHED_BYTES))
    digest.update(file.read(_HASHED_BYTES))


def dicom_files(folder: Path) -> list[Path]:
    """Lists the DICOM files of a folder, sorted. The suffix may be in capitals."""
    return sorted(
        entry
        for entry in folder.iterdir()
        if entry.suffix.lower() == _DICOM and not entry.name.startswith(".") and os.path.isfile(entry)
    )


def _dicom_series(folder: Path) -> dict[str, list[Path]]:
    """A folder's DICOM files by their SeriesInstanceUID; files that do not state it are under ""."""
    series: dict[str, list[Path]] = {}
    for file in dicom_files(folder):
        state = file.stat()
        series.setdefault(_series_of(file, state.st_size, state.st_mtime_ns), []).append(file)
    return series


# Each slide of a folder asks for all files of the folder.
@lru_cache(1 << 16)
def _series_of(file: Path, size: int, changed_ns: int) -> str:
    # Imported here: it takes a quarter of a second, and most slides are not DICOM.
    from pydicom import dcmread

    tag = 0x0020000E  # SeriesInstanceUID
    try:
        element = dcmread(file, stop_before_pixels=True, specific_tags=[tag]).get_item(tag)
    except Exception:  # pydicom raises errors of many types for damaged files; opening the file reports it
        return ""
    # The raw value: when pydicom converts it, it warns of values that are too long.
    value = element.value if element else b""
    return (value or b"").decode("latin-1").strip("\0 ") if isinstance(value, bytes | None) else str(value)
