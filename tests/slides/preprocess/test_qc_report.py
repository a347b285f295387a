import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from crcjax.errors import InputError
from crcjax.slides.preprocess.manifest import Outcome, append_outcome
from crcjax.slides.preprocess.qc_report import (
    contact_sheet,
    stain_degrees,
    stain_vectors,
    tile_counts,
    tiles_off,
    write_overview,
)
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.store.tile_store import open_store
from crcjax.slides.synthetic.painter import SITES, SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.tiling.quality_control import REASONS, StainLimits

PEN = (0, 114, 178)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Painted slides: `penned`, and `plain` and `plain <b>`, which are the same, and whose name is no HTML."""
    folder = tmp_path_factory.mktemp("overview")
    jobs = []
    for i, (name, artefacts) in enumerate({"penned": ("pen",), "plain": ()}.items()):
        path = paint_slide(folder / f"{i}.svs", SlideSpec("stromal", 500 + i, SITES[i], artefacts=artefacts))
        jobs.append(TileJob(name, path))
    jobs.append(TileJob("plain <b>", jobs[-1].path))
    outcomes = tile_slides(jobs, folder / "store", TilingParams(("10x", "20x")))
    assert {outcome.status for outcome in outcomes} == {"tiled"}
    return folder / "store"


def test_a_store_keeps_why_every_tile_was_rejected_and_a_small_picture(store: Path) -> None:
    slide = open_store(store, "penned")
    np.testing.assert_array_equal(slide.mask, slide.reason == REASONS.index("kept"))
    assert (slide.reason == REASONS.index("pen")).sum() > 0
    assert slide.attributes["verdict"]["faults"]["pen"] > 0
    picture, tissue = slide.thumbnail()
    assert picture.shape[:2] == tissue.shape
    assert max(tissue.shape) <= 1024
    assert 0.1 < tissue.mean() < 0.9


def test_keep_all_excludes_nothing_and_states_what_would_be_excluded(store: Path, tmp_path: Path) -> None:
    excluding = open_store(store, "penned")
    tile_slides(
        [TileJob("penned", Path(excluding.info.path))], tmp_path, TilingParams(("10x", "20x"), keep_all=True), workers=1
    )
    keeping = open_store(tmp_path, "penned")
    assert keeping.params.keep_all
    np.testing.assert_array_equal(keeping.reason, excluding.reason)
    assert keeping.mask[keeping.reason == REASONS.index("pen")].all()
    assert keeping.qc.coverage == 1.0
    assert keeping.attributes["verdict"]["faults"] == excluding.attributes["verdict"]["faults"]
    (region, *_), _ = np.nonzero(keeping.reason == REASONS.index("pen"))
    assert keeping.read_pixels([int(region)]).any()
    assert contact_sheet(keeping).shape == contact_sheet(excluding).shape


def test_stores_made_before_marking_open_with_the_limits_they_were_made_with(store: Path, tmp_path: Path) -> None:
    shutil.copytree(store, tmp_path / "store")
    file = tmp_path / "store" / "penned.zarr" / "zarr.json"
    group = json.loads(file.read_text())
    attributes = group["attributes"]
    del attributes["verdict"]["marked"], attributes["tiling"]["keep_all"]
    limits = {name: value for name, value in attributes["tiling"]["quality"].items() if not name.startswith("mark_")}
    attributes["tiling"]["quality"] = limits | {"max_pen": 0.1, "max_fold": 1.75}
    file.write_text(json.dumps(group))
    slide = open_store(tmp_path / "store", "penned")
    assert (slide.params.quality.max_pen, slide.params.quality.max_fold) == (0.1, 1.75)
    assert not slide.params.keep_all
    write_overview(tmp_path / "store")
    assert (tmp_path / "store" / "overview" / "penned.jpg").exists()


def test_a_contact_sheet_shows_pen_where_pen_is(store: Path) -> None:
    penned, plain = (contact_sheet(open_store(store, slide_id))[:-48] for slide_id in ("penned", "plain <b>"))
    assert (np.abs(penned.astype(int) - PEN).max(axis=-1) < 40).sum() > 1000
    assert (np.abs(plain.astype(int) - PEN).max(axis=-1) < 40).sum() < 20


def test_the_page_shows_every_slide_and_says_that_it_is_synthetic(store: Path) -> None:
    page = write_overview(store)
    text = page.read_text()
    assert "SYNTHETIC SLIDES" in text
    for slide_id in ("penned", "plain <b>"):
        assert (page.parent / f"{slide_id}.jpg").stat().st_size > 10_000
    assert 'id="penned"' in text
    assert "plain &lt;b&gt;" in text
    assert "<b>" not in text
    assert str(store.parent) not in text


def test_the_contact_sheet_counts_every_magnification(store: Path) -> None:
    slide = open_store(store, "penned")
    counts = tile_counts(slide)
    assert list(counts) == ["10x", "20x"]
    for magnification, reason in (("10x", slide.reason[:, :1]), ("20x", slide.reason[:, 1:])):
        for name in ("kept", "pen"):
            assert counts[magnification][name] == (reason == REASONS.index(name)).sum() > 0
        assert not {"glass", "absent"} & set(counts[magnification])
    panels, legends = np.split(contact_sheet(slide), [-48])
    for legend in np.split(legends, 2):
        assert (legend != 255).any()
    assert not np.array_equal(*np.split(legends, 2))
    assert len(panels) > 100


def test_the_page_links_the_mask_and_the_geojson_of_every_slide(store: Path) -> None:
    page = write_overview(store)
    links = re.findall(r'<a href="([^"#]+)"', page.read_text())
    wanted = [f"{name}.tissue.{suffix}" for name in ("penned", "plain", "plain <b>") for suffix in ("geojson", "png")]
    assert sorted(map(unquote, links)) == sorted(wanted)
    for name in wanted:
        assert (page.parent / name).stat().st_size > 100


def test_slides_that_tiling_refused_or_failed_to_tile_are_listed_with_status_coverage_and_reasons(
    store: Path, tmp_path: Path
) -> None:
    shutil.copytree(store, tmp_path / "store")
    for outcome in (
        Outcome("empty", "empty.svs", "no_tissue", "no stained tissue was found; look at the slide"),
        Outcome("slow", "slow.svs", "timeout", "took longer than 5 s"),
        Outcome("moved", "moved.svs", "tiled", "its tiles were deleted"),
        Outcome("plain", "plain.svs", "corrupt", "its newest file, but the tiles of the older one are in the store"),
    ):
        append_outcome(tmp_path / "store", outcome)
    places = {"penned": "north", "plain": "south", "empty": "south", "slow": "south", "moved": "south"}
    text = " ".join(write_overview(tmp_path / "store", places).read_text().split())
    assert "<tr><td>south</td>" + "".join(f'<td class="n">{n}</td>' for n in (1, 1, 0, 0, 1)) in text
    assert (
        '<td>empty</td><td>south</td> <td class="refused">refused</td><td>no_tissue: no stained tissue was found; look at '
        'the slide</td><td class="n">0</td> <td class="n">0 %</td>'
    ) in text
    assert '<td class="failed">failed</td><td>timeout: took longer than 5 s</td>' in text
    assert "Not in the store: moved" in text
    assert "its newest file" not in text
    assert 'id="empty"' not in text
    for name in ("penned", "plain", "plain <b>"):
        shutil.rmtree(tmp_path / "store" / f"{name}.zarr")
    assert "no stained tissue was found" in write_overview(tmp_path / "store").read_text()


def test_a_cohort_groups_by_place_and_names_what_is_absent(store: Path) -> None:
    text = write_overview(store, {"penned": "north, A", "lost": "south, B"}).read_text()
    assert "north, A" in text
    assert "Not in the store: lost" in text
    assert "plain" not in text


def test_a_stain_far_from_the_cohorts_asks_for_a_review(store: Path) -> None:
    near = [[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]]
    far = [[0.29, 0.70, 0.65], [0.07, 0.99, 0.11]]
    kept = {name: store / f"{name}.zarr" / "stain" / "macenko.json" for name in ("penned", "plain", "plain <b>")}
    stain_vectors(open_store(store, name) for name in kept)
    before = {name: path.read_text() for name, path in kept.items()}
    try:
        for name, vectors in {"penned": near, "plain": near, "plain <b>": far}.items():
            kept[name].write_text(json.dumps(json.loads(before[name]) | {"vectors": vectors}))
        degrees = stain_degrees(stain_vectors(open_store(store, name) for name in kept))
        assert degrees["penned"] == pytest.approx(0, abs=1e-3)
        assert degrees["plain <b>"] == pytest.approx(30, abs=1)
        text = write_overview(store).read_text()
        assert "degrees from the cohort&#39;s" in text
        assert "tiles of another colour" in text
        assert "15° the slide needs a review" in " ".join(text.split())
        text = write_overview(store, limits=StainLimits(35.0, 7.5)).read_text()
        assert "degrees from the cohort&#39;s" not in text
        assert "more than 7.5° from every mixture" in " ".join(text.split())
    finally:
        for name, path in kept.items():
            path.write_text(before[name])


def test_tiles_off_the_cohorts_stain_are_counted(store: Path) -> None:
    slide = open_store(store, "plain")
    assert tiles_off(slide, None) is None
    for stains, share in (((SITES[1].haematoxylin, SITES[1].eosin), 0), (((0.45, 0.60, 0.66), (0.35, 0.70, 0.62)), 1)):
        unit = np.array(stains) / np.linalg.norm(stains, axis=1, keepdims=True)
        assert tiles_off(slide, unit) == pytest.approx(share, abs=0.02)
    off = [tiles_off(slide, unit, StainLimits(max_tile_degrees=degrees)) for degrees in (0.0, 90.0)]
    assert off == [1, 0]


def test_an_empty_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the slides"):
        write_overview(tmp_path)


def test_one_damaged_slide_is_named_and_the_others_are_shown(store: Path, tmp_path: Path) -> None:
    for name in ("penned", "plain"):
        shutil.copytree(store / f"{name}.zarr", tmp_path / f"{name}.zarr")
    (tmp_path / "plain.zarr").rename(tmp_path / ("n" * 245 + ".zarr"))
    shutil.copytree(store / "plain.zarr", tmp_path / "broken.zarr")
    (tmp_path / "broken.zarr" / "zarr.json").write_text("{")
    faults: dict[str, str] = {}
    text = write_overview(tmp_path, on_fault=faults.__setitem__).read_text()
    assert set(faults) == {"broken", "n" * 245}
    assert "run crcjax tile again" in faults["broken"]
    assert "rename" in faults["n" * 245]
    assert 'id="penned"' in text
    assert "Not shown: broken" in text
    shutil.rmtree(tmp_path / "penned.zarr")
    with pytest.raises(InputError, match="none of its slides can be shown"):
        write_overview(tmp_path)
