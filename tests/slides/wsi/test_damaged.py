"""Damaged slides by the hundred, most of them in make test-system: each ends in a named error, or in the tiles that its bytes say."""

import io
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import ImageCms

from crcjax.slides.jobs.worker_pool import JobLimits
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.synthetic.painter import SUBTYPES, SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.tiling.read import read_regions
from crcjax.slides.wsi.slide import open_slide

pytestmark = pytest.mark.multiprocess
LIMITS = JobLimits(timeout_s=20.0, memory_gib=4.0, attempts=1)
NAMED = {"corrupt", "unsupported", "mpp_missing", "too_coarse", "no_tissue"}
PAINTED = TilingParams(("10x",), tile_px=64)
REAL = TilingParams(("5x",), tile_px=128)
TAGS = (
    *("ImageWidth", "ImageLength", "TileWidth", "TileLength", "TileOffsets", "TileByteCounts", "BitsPerSample"),
    *("Compression", "PhotometricInterpretation", "SamplesPerPixel", "PlanarConfiguration", "ImageDescription"),
    *("JPEGTables", "XResolution", "YCbCrSubSampling", "NewSubfileType", "InterColorProfile"),
)
Damage = Callable[[bytearray, np.random.Generator], None]


def _flip(content: bytearray, rng: np.random.Generator) -> None:
    """1 to 64 bits, one in two cases all within the first or last 4 KiB, where most formats keep their directories."""
    span = range(len(content))
    if rng.random() < 0.5:
        span = span[:4096] if rng.random() < 0.5 else span[-4096:]
    for _ in range(2 ** int(rng.integers(0, 7))):
        content[span[int(rng.integers(len(span)))]] ^= 1 << int(rng.integers(8))


def _cut_off(content: bytearray, rng: np.random.Generator) -> None:
    del content[int(rng.integers(1, len(content))) :]


def _blank(content: bytearray, rng: np.random.Generator) -> None:
    """A lost block of a disk."""
    at, size = int(rng.integers(len(content))), 512 << int(rng.integers(0, 8))
    content[at : at + size] = bytes(len(content[at : at + size]))


def _alter_a_tag(content: bytearray, rng: np.random.Generator) -> None:
    """One value of a TIFF tag, or its type, or the link to the next directory."""
    with tifffile.TiffFile(io.BytesIO(content)) as tiff:
        page = tiff.pages[int(rng.integers(len(tiff.pages)))]
        assert isinstance(page, tifffile.TiffPage)
        tag = page.tags.get(TAGS[int(rng.integers(len(TAGS)))])
        places = [page.offset] if tag is None else [tag.offset + 2, tag.offset + 4, tag.valueoffset]
        size = 4 if tag is None else len(tag.value) if isinstance(tag.value, bytes | str) else 4 * np.size(tag.value)
    at = places[int(rng.integers(len(places)))] + 4 * int(rng.integers(max(1, size // 4)))
    number = [0, 1, 7, 255, 65535, 2**31 - 1, 2**32 - 1, int(rng.integers(len(content)))][int(rng.integers(8))]
    width = 2 if tag is not None and rng.random() < 0.5 else 4
    content[at : at + width] = (number % 2 ** (8 * width)).to_bytes(width, "little")


def _alter_the_offset_table(content: bytearray, rng: np.random.Generator) -> None:
    """Of a DICOM file: an entry of the table before the frames, which OpenSlide 4.0.1 follows into foreign memory."""
    item = b"\xfe\xff\x00\xe0"
    table = content.index(item, content.index(b"\xe0\x7f\x10\x00O")) + 8
    size = int.from_bytes(content[table - 4 : table], "little")
    if size:
        at = table + 4 * int(rng.integers(size // 4))
        content[at : at + 4] = int(rng.integers(2**32)).to_bytes(4, "little")


def _damaged(slide: Path, folder: Path, damages: Sequence[Damage], count: int) -> list[TileJob]:
    """Copies, damaged by turns; of a folder of DICOM files one file is."""
    jobs = []
    for seed in range(count):
        rng, damage = np.random.default_rng(seed), damages[seed % len(damages)]
        path = folder / f"{seed}{damage.__name__}{slide.suffix}"
        files = [path]
        if slide.is_dir():
            files = sorted(Path(shutil.copytree(slide, path)).iterdir())
        else:
            shutil.copy(slide, path)
        file = files[int(rng.integers(len(files)))]
        file.chmod(0o644)
        content = bytearray(file.read_bytes())
        damage(content, rng)
        file.write_bytes(content)
        jobs.append(TileJob(path.stem, path, _mpp(slide)))
    return jobs


def _mpp(slide: Path) -> float | None:
    return 0.5 if "penmarks" in slide.name else None  # it does not say


def _tiles(store: Path, slide_id: str) -> Sequence[np.ndarray]:
    opened = open_store(store, slide_id)
    return opened.origin, opened.mask, opened.read_pixels(range(len(opened.origin)))


def _tiles_by_openslide(job: TileJob, params: TilingParams) -> Sequence[np.ndarray]:
    with open_slide(job.path, job.mpp) as slide:
        slide._jpeg = None
        plan = plan_tiles(slide, params)
        found = read_regions(slide, plan, 0, len(plan.origin))
    return plan.origin, found.mask, found.pixels


def _leaves_a_tile_out(path: Path) -> bool:
    """Whether a TIFF says that a tile was not recorded, which is white then."""
    with tifffile.TiffFile(path) as tiff:
        return any(0 in page.databytecounts for page in tiff.pages if isinstance(page, tifffile.TiffPage))


def _same(one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _check(slide: Path, folder: Path, damages: Sequence[Damage], count: int, params: TilingParams) -> Counter[str]:
    """Tiles damaged copies beside the whole slide, in one run; returns how many ended in which way.

    No code can tell damage within a JPEG stream that is a stream as before: JPEG has no checksum. What passes for tiles is
    what OpenSlide, too, reads from these bytes, and the store says by its content hash that they are others.
    """
    (folder / "damaged").mkdir()
    jobs, store = _damaged(slide, folder / "damaged", damages, count), folder / "store"
    whole = TileJob("whole", slide, _mpp(slide))
    outcomes = tile_slides([*jobs, whole], store, params, workers=2, pixels="lossless", limits=LIMITS)
    assert outcomes[-1].status == "tiled", outcomes[-1]
    intact, ends = _tiles(store, "whole"), Counter[str]()
    for job, outcome in zip(jobs, outcomes[:-1], strict=True):
        if outcome.status == "failed":
            assert "exit status -11" in outcome.reason, outcome  # a segmentation fault of OpenSlide's
            assert "offset_table" in job.slide_id, outcome
        elif outcome.status != "tiled":
            assert outcome.status in NAMED, outcome
            assert "fault of crcjax" not in outcome.reason, outcome
        ends[outcome.status] += 1
        if outcome.status == "tiled" and not _same(tiles := _tiles(store, job.slide_id), intact):
            ends["other tiles"] += 1
            if job.slide_id.endswith(("_cut_off", "_alter_a_tag", "_alter_the_offset_table")):
                assert "guessed from the objective" in outcome.reason or _leaves_a_tile_out(job.path), outcome
            assert outcome.content_hash != outcomes[-1].content_hash, outcome
            assert _same(tiles, _tiles_by_openslide(job, params)), outcome
    assert sum(ends.values()) - ends["other tiles"] == count
    return ends


@pytest.mark.parametrize("count", [100, pytest.param(400, marks=pytest.mark.slow)])
def test_damaged_tiff_slides_are_refused_or_read_as_they_are(count: int, tmp_path: Path) -> None:
    slide = paint_slide(tmp_path / "painted.tiff", SlideSpec(SUBTYPES[0], 3, size_px=(800, 640), mpp=1.0))
    ends = _check(slide, tmp_path, (_flip, _cut_off, _blank, _alter_a_tag), count, PAINTED)
    assert ends["corrupt"] > 0.75 * count
    assert ends["other tiles"] < 0.1 * count


@pytest.mark.parametrize("count", [100, pytest.param(200, marks=pytest.mark.slow)])
def test_damaged_ome_tiff_slides_are_refused_or_read_as_they_are(count: int, tmp_path: Path) -> None:
    painted = paint_slide(tmp_path / "painted.tiff", SlideSpec(SUBTYPES[0], 3, size_px=(800, 640), mpp=1.0))
    picture, slide = tifffile.imread(painted), tmp_path / "slide.ome.tiff"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    options = {"photometric": "rgb", "compression": "deflate", "tile": (128, 128), "iccprofile": profile}
    with tifffile.TiffWriter(slide, ome=True) as tiff:
        tiff.write(picture, subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0}, **options)
        tiff.write(picture[::2, ::2].copy(), subfiletype=1, **options)
    ends = _check(slide, tmp_path, (_flip, _cut_off, _blank, _alter_a_tag), count, PAINTED)
    assert ends["corrupt"] > 0.5 * count
    assert not ends["other tiles"]  # deflated tiles have a checksum


@pytest.mark.real_data
@pytest.mark.parametrize("count", [12, pytest.param(60, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("name", "damages"),
    [
        ("aperio_cmu-1-small-region.svs", (_flip, _cut_off, _blank, _alter_a_tag)),
        ("dicom_cmu-1-small-region", (_flip, _cut_off, _blank, _alter_the_offset_table)),
        ("dicom_tcga-prad_penmarks", (_flip, _cut_off, _blank, _alter_the_offset_table)),
    ],
)
def test_damaged_real_slides_are_refused_or_read_as_they_are(
    name: str, damages: Sequence[Damage], count: int, real_data: Path, tmp_path: Path
) -> None:
    ends = _check(real_data / "slides" / name, tmp_path, damages, count, REAL)
    assert ends["corrupt"] > count / 12
