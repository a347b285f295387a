"""Vendors' formats, each by the smallest synthetic slide of it that OpenSlide opens: read, tiled, and refused."""

import io
import sqlite3
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import simplejpeg
import tifffile
from PIL import Image

from crcjax.errors import SlideError
from crcjax.slides.deidentify.deidentify import REFUSED, deidentify_slide
from crcjax.slides.jobs.worker_pool import JobLimits
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.wsi.discovery import content_hash, find_slides, slide_files, slide_id_of
from crcjax.slides.wsi.slide import open_slide

SIZE, SIDE, MPP, QUALITY = (1024, 768), 256, 0.5, 95
Picture = np.ndarray
Writer = Callable[[Path, Picture], Path]


def _smaller(picture: Picture, shrink: int) -> Picture:
    return cv2.resize(picture, None, fx=1 / shrink, fy=1 / shrink, interpolation=cv2.INTER_AREA)


def _squares(picture: Picture) -> list[tuple[int, int, Picture]]:
    """Column, row and pixels of a picture's tiles, white where it ends."""
    height, width = picture.shape[:2]
    padded = np.pad(picture, ((0, -height % SIDE), (0, -width % SIDE), (0, 0)), constant_values=255)
    return [
        (x, y, np.ascontiguousarray(padded[y * SIDE : (y + 1) * SIDE, x * SIDE : (x + 1) * SIDE]))
        for y in range(padded.shape[0] // SIDE)
        for x in range(padded.shape[1] // SIDE)
    ]


def _jpeg(picture: Picture, restart: int = 0) -> bytes:
    """With a restart marker after every `restart` blocks of 8 px."""
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=QUALITY, subsampling=0, restart_marker_blocks=restart)
    return stream.getvalue()


def _tiff(path: Path, pictures: list[Picture], pages: list[dict], bigtiff: bool = True) -> Path:
    options = {"tile": (SIDE, SIDE), "photometric": "rgb", "compression": "jpeg", "metadata": None, "software": False}
    with tifffile.TiffWriter(path, bigtiff=bigtiff) as tiff:
        for picture, page in zip(pictures, pages, strict=True):
            tiff.write(picture, compressionargs={"level": QUALITY}, **options | page)
    return path


def _ini(path: Path, sections: dict[str, dict]) -> None:
    text = (
        f"[{name}]\r\n" + "".join(f"{key}={value}\r\n" for key, value in sections[name].items()) for name in sections
    )
    path.write_text("".join(text), encoding="utf-8-sig" if path.name == "Slidedat.ini" else "utf-8")


def _mirax(path: Path, picture: Picture) -> Path:
    """Camera fields that overlap by 16 px, two levels and the fields' positions in a data file each; nothing was recorded
    in the two columns and rows before the tissue.
    """
    path, name, step = path.with_suffix(".mrxs"), "synthetic", SIDE - 16
    path.write_bytes(_jpeg(_smaller(picture, 8)))
    folder, across, down = path.with_suffix(""), *(2 + -(-(side - 16) // step) for side in SIZE)
    folder.mkdir()
    padded = np.pad(picture, ((2 * step, SIDE), (2 * step, SIDE), (0, 0)), constant_values=255)
    fields = {
        (x, y): np.ascontiguousarray(padded[y * step : y * step + SIDE, x * step : x * step + SIDE])
        for y in range(2, down)
        for x in range(2, across)
    }
    joined: dict[tuple[int, int], Picture] = {}
    for (x, y), field in fields.items():
        four = joined.setdefault((x - x % 2, y - y % 2), np.full_like(field, 255))
        four[y % 2 * SIDE // 2 :, x % 2 * SIDE // 2 :][: SIDE // 2, : SIDE // 2] = _smaller(field, 2)
    files, records = [b"", b""], [b"", b""]
    for i, images in enumerate((fields, joined)):
        for (x, y), image in images.items():
            stream = _jpeg(image)
            records[i] += struct.pack("<iiii", y * across + x, len(files[i]), len(stream), i)
            files[i] += stream
    files.append(b"".join(struct.pack("<bii", 1, x * step, y * step) for y in range(down) for x in range(across)))
    for i, content in enumerate(files):
        (folder / f"Data000{i}.dat").write_bytes(content)
    # Pointers to the two tables, the tables, then what they point to: a zero, a pointer, and there the records.
    pages = [struct.pack("<ii", len(part) // 16, 0) + part for part in records]
    pages.append(struct.pack("<iiiiiii", 1, 0, 0, 0, 0, len(files[2]), 2))
    start = len("01.02" + name)
    index, content = struct.pack("<ii", start + 8, start + 16), b""
    for page in pages:
        at = start + 20 + len(content)
        index, content = index + struct.pack("<i", at), content + struct.pack("<ii", 0, at + 8) + page
    (folder / "Index.dat").write_bytes(b"01.02" + name.encode() + index + content)
    level = {"OVERLAP_X": 16, "OVERLAP_Y": 16, "IMAGE_FORMAT": "JPEG", "IMAGE_FILL_COLOR_BGR": 0xFFFFFF}
    level |= {"DIGITIZER_WIDTH": SIDE, "DIGITIZER_HEIGHT": SIDE}
    level |= {"MICROMETER_PER_PIXEL_X": MPP, "MICROMETER_PER_PIXEL_Y": MPP}
    general = {"SLIDE_VERSION": "01.02", "SLIDE_ID": name, "IMAGENUMBER_X": across, "IMAGENUMBER_Y": down}
    levels = {"HIER_COUNT": 1, "HIER_0_NAME": "Slide zoom level", "HIER_0_COUNT": 2, "NONHIER_COUNT": 1}
    places = {"NONHIER_0_NAME": "VIMSLIDE_POSITION_BUFFER", "NONHIER_0_COUNT": 1, "NONHIER_0_VAL_0": "default"}
    sections = {
        "GENERAL": general | {"OBJECTIVE_MAGNIFICATION": 20},
        "HIERARCHICAL": {"INDEXFILE": "Index.dat"}
        | levels
        | places
        | {f"HIER_0_VAL_{i}_SECTION": f"L{i}" for i in (0, 1)},
        "DATAFILE": {"FILE_COUNT": 3} | {f"FILE_{i}": f"Data000{i}.dat" for i in range(3)},
    }
    _ini(folder / "Slidedat.ini", sections | {f"L{i}": level | {"IMAGE_CONCAT_FACTOR": i} for i in (0, 1)})
    return path


def _vms(path: Path, picture: Picture) -> Path:
    """Two JPEG files beside each other, and a map; neither the optimisation file nor another focal plane is needed."""
    path, stem = path.with_suffix(".vms"), f"{path.name} Präparat"
    half = SIZE[0] // 2
    files = {"ImageFile": f"{stem}.jpg", "ImageFile(1,0)": f"{stem}(1,0).jpg", "MapFile": f"{stem}_map.jpg"}
    files |= {"MacroImage": f"{stem}_macro.jpg"}
    small = _smaller(picture, 16)
    for key, part in zip(files, (picture[:, :half], picture[:, half:], small, small), strict=True):
        (path.parent / files[key]).write_bytes(_jpeg(part, 8))
    about = {"NoLayers": 1, "NoJpegColumns": 2, "NoJpegRows": 1, "SourceLens": 20}
    about |= {"PhysicalWidth": int(SIZE[0] * MPP * 1000), "PhysicalHeight": int(SIZE[1] * MPP * 1000)}
    unneeded = {"OptimisationFile": f"{stem}.opt", "ImageFile(1,0,0)": f"{stem}(1,0,0).jpg"}
    _ini(path, {"Virtual Microscope Specimen": about | files | unneeded})
    return path


def _vmu(path: Path, picture: Picture) -> Path:
    """Uncompressed, of 12 bits, in columns."""
    path = path.with_suffix(".vmu")
    files = {"ImageFile": f"{path.stem} part.ngr", "MapFile": f"{path.stem} part_map.ngr"}
    for name, part in zip(files.values(), (picture, _smaller(picture, 4)), strict=True):
        height, width = part.shape[:2]
        head = struct.pack("<4siii8xi", b"GN\0\0", width, height, 64, 28)
        columns = part.astype("<u2").reshape(height, width // 64, 64, 3).swapaxes(0, 1) << 4
        (path.parent / name).write_bytes(head + columns.tobytes())
    about = {"NoLayers": 1, "BitsPerPixel": 36, "PixelOrder": "RGB", "SourceLens": 20}
    about |= {"PhysicalWidth": int(SIZE[0] * MPP * 1000), "PhysicalHeight": int(SIZE[1] * MPP * 1000)}
    _ini(path, {"Uncompressed Virtual Microscope Specimen": about | files})
    return path


def _ndpi(path: Path, picture: Picture) -> Path:
    """A TIFF whose levels are a JPEG each, and whose links have 64 bits."""
    path = path.with_suffix(".ndpi")
    content = struct.pack("<2sHQ", b"II", 42, 0)
    link = 4
    for shrink in (1, 4):
        part = _smaller(picture, shrink)
        stream, resolution = _jpeg(part, 16), len(content)
        content += struct.pack("<II", round(1e4 / MPP / shrink), 1)
        height, width = part.shape[:2]
        values = [(256, 4, width), (257, 4, height), (259, 3, 7), (262, 3, 6), (273, 4, len(content)), (277, 3, 3)]
        values += [(278, 4, height), (279, 4, len(stream)), (282, 5, resolution), (283, 5, resolution), (296, 3, 3)]
        values += [(65420, 4, 1), (65421, 11, struct.unpack("<I", struct.pack("<f", 20 / shrink))[0]), (65424, 9, 0)]
        content += stream
        content = content[:link] + struct.pack("<Q", len(content)) + content[link + 8 :]
        entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in values)
        link = len(content) + 2 + len(entries)
        content += struct.pack("<H", len(values)) + entries + bytes(8)
    path.write_bytes(content)
    return path


def _leica(path: Path, picture: Picture) -> Path:
    """Of a scanned part within a wider slide; lengths are in nm."""
    nm = int(MPP * 1000)
    place = f'sizeX="{SIZE[0] * nm}" sizeY="{SIZE[1] * nm}" offsetX="{512 * nm}" offsetY="{128 * nm}"'
    levels = "".join(f'<dimension ifd="{i}" sizeX="{SIZE[0] >> 2 * i}" sizeY="{SIZE[1] >> 2 * i}"/>' for i in range(2))
    settings = "<objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>"
    settings += "<illuminationSource>brightfield</illuminationSource></illuminationSettings>"
    image = f"<image><view {place}/><pixels>{levels}</pixels><scanSettings>{settings}</scanSettings></image>"
    xml = '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
    xml += f'<collection sizeX="{2048 * nm}" sizeY="{1024 * nm}">{image}</collection></scn>'
    pages = [{"resolution": (1e4 / MPP / s, 1e4 / MPP / s), "resolutionunit": "CENTIMETER"} for s in (1, 4)]
    pages[0]["description"] = xml
    return _tiff(path.with_suffix(".scn"), [picture, _smaller(picture, 4)], pages)


def _philips(path: Path, picture: Picture) -> Path:
    def spacing(shrink: int) -> str:
        return f'<Attribute Name="DICOM_PIXEL_SPACING">"{MPP * shrink / 1000}" "{MPP * shrink / 1000}"</Attribute>'

    levels = "".join(f'<DataObject ObjectType="PixelDataRepresentation">{spacing(s)}</DataObject>' for s in (1, 4))
    levels = f'<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>{levels}</Array></Attribute>'
    image = f'<Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>{spacing(1)}{levels}'
    image = f'<Array><DataObject ObjectType="DPScannedImage">{image}</DataObject></Array>'
    xml = (
        f'<DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES">{image}</Attribute></DataObject>'
    )
    pages = [{"software": "Philips DP v1.0", "description": xml}, {"subfiletype": 1}]
    return _tiff(path.with_suffix(".tiff"), [picture, _smaller(picture, 4)], pages)


def _trestle(path: Path, picture: Picture) -> Path:
    about = "Objective Power=20;Background Color=FFFFFF;OverlapsXY= 0 0 0 0"
    pages = [{"software": "MedScan", "description": about, "resolution": (MPP, MPP), "resolutionunit": "NONE"}, {}]
    return _tiff(path.with_suffix(".tif"), [picture, _smaller(picture, 4)], pages, bigtiff=False)


def _ventana(path: Path, picture: Picture) -> Path:
    """Tiles are numbered from the bottom, every second row backwards; none overlap."""
    across, down = SIZE[0] // SIDE, SIZE[1] // SIDE
    sure = 'FlagJoined="1" Confidence="100" OverlapX="0" OverlapY="0"'
    joints = f'<TileJointInfo {sure} Direction="RIGHT" Tile1="1" Tile2="2"/>'
    joints += f'<TileJointInfo {sure} Direction="UP" Tile1="1" Tile2="{2 * across}"/>'
    area = f'AOIScanned="1" Width="{SIDE}" Height="{SIDE}" NumRows="{down}" NumCols="{across}" Pos-X="0" Pos-Y="0"'
    stitch = f"<SlideStitchInfo><ImageInfo {area}>{joints}</ImageInfo></SlideStitchInfo>"
    encoding = f'<EncodeInfo Ver="2">{stitch}<AoiOrigin><AOI0 OriginX="0" OriginY="0"/></AoiOrigin></EncodeInfo>'
    scan = f'<iScan Magnification="20" ScanRes="{MPP}" Z-layers="1"></iScan>'
    pages = [
        {"description": "Label Image"},
        {"description": "level=0 mag=20 quality=95"},
        {"description": "level=1 mag=5"},
    ]
    for page, xml in zip(pages, (scan, encoding), strict=False):
        page["extratags"] = [(700, 1, len(xml), xml.encode(), True)]
    return _tiff(path.with_suffix(".bif"), [_smaller(picture, 8), picture, _smaller(picture, 4)], pages)


def _sakura(path: Path, picture: Picture) -> Path:
    """A database with a grey JPEG for every colour of every tile."""
    path = path.with_suffix(".svslide")
    with sqlite3.connect(path) as database:
        for table in (
            "DataManagerSQLiteConfigXPO (TableName)",
            "pixels (id, data)",
            "SVSlideDataXPO (OID, SlideId, Date, Description, Creator, DiagnosisCode, Keywords)",
            "SVHRScanDataXPO (OID, ParentSlide, ScanId, ResolutionMmPerPix, NominalLensMagnification, FocussingMethod)",
        ):
            database.execute(f"CREATE TABLE {table}")
        database.execute("INSERT INTO DataManagerSQLiteConfigXPO VALUES ('pixels')")
        database.execute("INSERT INTO SVSlideDataXPO VALUES (1, '', '', '', '', '', '')")
        database.execute("INSERT INTO SVHRScanDataXPO VALUES (1, 1, '', ?, 20.0, '')", (MPP / 1000,))
        header = struct.pack("<III4xI", SIDE, *SIZE, 1)
        database.execute("INSERT INTO pixels VALUES ('++MagicBytes', 'SVGigaPixelImage'), ('Header', ?)", (header,))
        for shrink in (1, 4):
            for x, y, square in _squares(_smaller(picture, shrink)):
                for colour in range(3):
                    name = f"T;{x * SIDE * shrink}|{y * SIDE * shrink};{shrink};{colour};0"
                    grey = np.ascontiguousarray(square[..., colour : colour + 1])
                    stream = simplejpeg.encode_jpeg(grey, QUALITY, "GRAY")
                    database.execute("INSERT INTO pixels VALUES (?, ?)", (name, stream))
    database.close()
    return path


def _zeiss(path: Path, picture: Picture) -> Path:
    """Segments of a name, two sizes and content: tiles in zstd, their directory, the metadata."""
    path = path.with_suffix(".czi")

    def segment(name: bytes, content: bytes) -> bytes:
        return struct.pack("<16sqq", name, len(content), len(content)) + content

    content, entries = bytes(32 + 512), b""
    for shrink in (1, 4):
        for x, y, square in _squares(_smaller(picture, shrink)):
            height, width = (min(SIDE, side // shrink - at * SIDE) for side, at in zip(SIZE[::-1], (y, x), strict=True))
            pixels = imagecodecs.zstd_encode(np.ascontiguousarray(square[:height, :width, ::-1]).tobytes())
            entry = struct.pack("<2siqiibx4xi", b"DV", 3, len(content), 0, 5, 0 if shrink == 1 else 2, 2)
            for axis, at, side in ((b"X", x, width), (b"Y", y, height)):
                entry += struct.pack("<4siifi", axis, at * SIDE * shrink, side * shrink, 0.0, side)
            entries += entry
            block = (struct.pack("<iiq", 0, 0, len(pixels)) + entry).ljust(256, b"\0")
            content += segment(b"ZISRAWSUBBLOCK", block + pixels)
    places = [len(content)]
    content += segment(b"ZISRAWDIRECTORY", struct.pack("<i124x", len(entries) // 72) + entries)
    places.append(len(content))
    scaling = "".join(f'<Distance Id="{axis}"><Value>{MPP / 1e6}</Value></Distance>' for axis in "XY")
    image = f"<Image><SizeX>{SIZE[0]}</SizeX><SizeY>{SIZE[1]}</SizeY></Image>"
    xml = f"<Information>{image}</Information><Scaling><Items>{scaling}</Items></Scaling>"
    xml = f"<ImageDocument><Metadata>{xml}</Metadata></ImageDocument>"
    content += segment(b"ZISRAWMETADATA", struct.pack("<ii248x", len(xml), 0) + xml.encode())
    places.append(len(content))
    content += segment(b"ZISRAWATTDIR", bytes(256))
    head = struct.pack("<iiii16s16siqqiq", 1, 0, 0, 0, b"a", b"b", 0, places[0], places[1], 0, places[2])
    path.write_bytes(segment(b"ZISRAWFILE", head.ljust(512, b"\0")) + content[32 + 512 :])
    return path


# By name: the writer, OpenSlide's vendor, the levels' downsamples, and where the picture begins.
FORMATS: dict[str, tuple[Writer, str, tuple[int, ...], tuple[int, int]]] = {
    "mirax": (_mirax, "mirax", (1, 2), (480, 480)),
    "vms": (_vms, "hamamatsu", (1, 2, 4, 8, 16, 32, 64, 128), (0, 0)),
    "vmu": (_vmu, "hamamatsu", (1, 4), (0, 0)),
    "ndpi": (_ndpi, "hamamatsu", (1, 2, 4, 8, 16, 32), (0, 0)),
    "leica": (_leica, "leica", (1, 4), (512, 128)),
    "philips": (_philips, "philips", (1, 4), (0, 0)),
    "trestle": (_trestle, "trestle", (1, 4), (0, 0)),
    "ventana": (_ventana, "ventana", (1, 4), (0, 0)),
    "sakura": (_sakura, "sakura", (1, 4), (0, 0)),
    "zeiss": (_zeiss, "zeiss", (1, 4), (0, 0)),
}


@pytest.fixture(scope="module")
def picture(tissue_picture: Callable[..., Picture]) -> Picture:
    return cv2.GaussianBlur(tissue_picture(*SIZE), (0, 0), 1)


@pytest.fixture(scope="module")
def slides(picture: Picture, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A slide of every format, all in one folder."""
    folder = tmp_path_factory.mktemp("vendors")
    return {name: FORMATS[name][0](folder / name, picture) for name in FORMATS}


@pytest.mark.parametrize("name", FORMATS)
def test_a_slide_of_a_vendor_is_read_as_it_was_painted(name: str, slides: dict[str, Path], picture: Picture) -> None:
    _, vendor, downsamples, (left, top) = FORMATS[name]
    with open_slide(slides[name]) as slide:
        info = slide.info
        assert (info.vendor, info.level_downsamples, info.corner) == (vendor, downsamples, (left, top))
        assert info.mpp == pytest.approx((MPP, MPP))
        assert info.mpp_source == "vendor"
        assert info.content_hash == content_hash(slides[name])
        if not left:
            assert info.size == SIZE
        for level, downsample in enumerate(downsamples[:5]):
            painted = _smaller(picture, downsample) if downsample > 1 else picture
            height, width = painted.shape[:2]
            read = slide.read(left - 8 * downsample, top - 8 * downsample, width + 16, height + 16, level)
            assert (read[:7] == 255).all() or name == "mirax"
            differences = [
                np.abs(read[8 + y : 8 + y + height, 8 + x : 8 + x + width].astype(int) - painted).mean()
                for x, y in ((0, 0), (1, 0), (0, 1))
            ]
            assert differences[0] < 2, level
            assert min(differences[1:]) > 2 * differences[0], level  # one pixel aside it is not the same
            part = slide.read(left + 40 * downsample, top + 24 * downsample, width // 2, height // 2, level)
            np.testing.assert_array_equal(part, read[32:, 48:][: height // 2, : width // 2])


def test_slides_of_every_vendor_are_found_and_tiled(slides: dict[str, Path], picture: Picture, tmp_path: Path) -> None:
    folder = slides["mirax"].parent
    found = find_slides([folder])
    assert found == sorted(slides.values())
    jobs = [TileJob(slide_id_of(path), path) for path in found]
    outcomes = tile_slides(jobs, tmp_path / "store", TilingParams(("10x", "20x"), tile_px=128), pixels="lossless")
    assert [outcome.status for outcome in outcomes] == ["tiled"] * len(FORMATS), outcomes
    for name, (*_, corner) in FORMATS.items():
        store = open_store(tmp_path / "store", name)
        tiles, kept = store.read_pixels(range(len(store.origin))), 0
        for origin, mask, pixels in zip(store.origin, store.mask, tiles, strict=True):
            for slot in np.flatnonzero(mask[1:]).tolist():
                x, y = origin - corner + np.array((slot % 2, slot // 2)) * 128
                painted = picture[max(y, 0) : y + 128, max(x, 0) : x + 128]
                if painted.shape == (128, 128, 3):
                    assert np.abs(pixels[1 + slot].astype(int) - painted).mean() < 2, (name, x, y)
                    kept += 1
        assert kept >= 8, name


@pytest.mark.parametrize("name", FORMATS)
def test_a_change_of_any_file_changes_the_content_hash(name: str, picture: Picture, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path / name, picture)
    files = sorted(file for file in tmp_path.rglob("*") if file.is_file())
    assert sorted(slide_files(path)) == files
    hashes = [content_hash(path)]
    for file in files:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        hashes.append(content_hash(path))
    assert len(set(hashes)) == len(files) + 1


@pytest.mark.parametrize("name", ["mirax", "vms", "vmu"])
def test_a_file_that_a_slide_lacks_is_named(name: str, picture: Picture, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path / name, picture)
    files = sorted(set(slide_files(path)) - {path})
    assert len(files) == {"mirax": 5, "vms": 4, "vmu": 2}[name]
    for file in files:
        file.rename(tmp_path / "elsewhere")
        with pytest.raises(SlideError) as caught:
            open_slide(path)
        assert str(caught.value) == f"{path}: lacks {file.relative_to(tmp_path)}; copy all files of the slide"
        assert caught.value.status == "missing"
        (tmp_path / "elsewhere").rename(file)
    for file in files:
        file.unlink()
    with pytest.raises(
        SlideError,
        match=r"lacks mirax/Slidedat\.ini;" if name == "mirax" else f"and {len(files) - 1} more of its files",
    ):
        open_slide(path)


def _flip(content: bytearray, rng: np.random.Generator) -> None:
    for at in rng.integers(0, len(content), 16).tolist():
        content[at] ^= 1 << int(rng.integers(8))


def _blank(content: bytearray, rng: np.random.Generator) -> None:
    at, size = int(rng.integers(len(content))), 4096
    content[at : at + size] = bytes(len(content[at : at + size]))


def _cut_off(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(1, len(content))) :]


@pytest.mark.parametrize("name", FORMATS)
def test_a_slide_of_which_a_file_is_cut_off_is_refused(name: str, picture: Picture, tmp_path: Path) -> None:
    path = FORMATS[name][0](tmp_path / name, picture)
    for file in sorted(set(slide_files(path)) - {tmp_path / "mirax.mrxs"}):  # a picture that nothing needs
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 3])
        with pytest.raises(SlideError) as caught:
            _read_all(path)
        if file.suffix not in (".vms", ".vmu", ".svslide"):  # of these no sign is left of what they were
            assert caught.value.status in ("corrupt", "missing"), (file.name, caught.value)
        file.write_bytes(whole)


def _read_all(path: Path) -> None:
    with open_slide(path, mpp=MPP) as slide:
        for level in range(len(slide.info.level_downsamples)):
            slide.read(0, 0, *slide.info.size, level)


@pytest.mark.multiprocess
def test_damaged_slides_of_every_vendor_are_refused_or_read_as_they_are(picture: Picture, tmp_path: Path) -> None:
    jobs = []
    for name in FORMATS:
        for seed, damage in enumerate((None, _flip, _blank, _cut_off, _flip, _blank, _cut_off)):
            (tmp_path / f"{name}{seed}").mkdir()
            path = FORMATS[name][0](tmp_path / f"{name}{seed}" / name, picture)
            if damage:
                rng, files = np.random.default_rng(seed), slide_files(path)
                file = files[int(rng.integers(len(files)))]
                content = bytearray(file.read_bytes())
                damage(content, rng)
                file.write_bytes(content)
            jobs.append(TileJob(f"{name}{seed}", path))
    limits = JobLimits(timeout_s=20.0, memory_gib=4.0, attempts=1)
    outcomes = tile_slides(
        jobs, tmp_path / "store", TilingParams(("10x",), tile_px=128), workers=2, pixels="lossless", limits=limits
    )
    ended = {outcome.slide_id: outcome for outcome in outcomes}
    for slide_id, outcome in ended.items():
        whole = ended[slide_id[:-1] + "0"]
        assert whole.status == "tiled", whole
        assert outcome.status in {"tiled", "corrupt", "missing", "unsupported", "mpp_missing", "no_tissue"}, outcome
        if outcome.status == "tiled" and not _same_tiles(tmp_path / "store", slide_id, whole.slide_id):
            assert outcome.content_hash != whole.content_hash, outcome
    assert Counter(outcome.status for outcome in outcomes)["corrupt"] > 20


def _same_tiles(folder: Path, one: str, other: str) -> bool:
    stores = [open_store(folder, slide_id) for slide_id in (one, other)]
    if not all(np.array_equal(getattr(stores[0], name), getattr(stores[1], name)) for name in ("origin", "mask")):
        return False
    return np.array_equal(*(store.read_pixels(range(len(store.origin))) for store in stores))


@pytest.mark.parametrize("name", FORMATS)
def test_no_slide_of_these_vendors_is_copied_as_if_it_were_safe(
    name: str, slides: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(SlideError) as caught:
        deidentify_slide(slides[name], tmp_path / "copy")
    assert caught.value.status == "unsupported"
    assert REFUSED[FORMATS[name][1]] in caught.value.reason
    assert not any(tmp_path.iterdir())
