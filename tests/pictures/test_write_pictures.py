"""Contact sheets, overlays and case reports of a folder of predictions."""

import base64
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from crcjax.pictures.case_report import credible_interval, uncertainty_sentences
from crcjax.pictures.top_tiles import tile_picture, top_tiles
from crcjax.pictures.write_pictures import write_pictures
from crcjax.predict.engine import SlideSource
from crcjax.predict.evidence import attention_file, read_evidence
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.slides.wsi.slide import open_slide
from crcjax.validation.predictions_table import PredictionRow, write_predictions

CLASSES = ("canonical", "immune", "stromal")
BOXES = np.array([(0, 0, 0.5), (0.5, 0, 0.5), (0, 0.5, 0.5), (0.5, 0.5, 0.5)], np.float32)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two painted slides by id."""
    folder = tmp_path_factory.mktemp("slides")
    paint_cohort(folder, {"test": 2}, size_px=(800, 640), mpp=1.0)
    return {path.stem: path for path in sorted(folder.glob("**/*.svs"))}


@pytest.fixture
def predictions(slides: dict[str, Path], tmp_path: Path) -> Path:
    """A folder as crcjax predict writes it: two slides of one case, and a slide of another that was not evaluable."""
    rng = np.random.default_rng(0)
    rows = []
    for slide_id, path in slides.items():
        with open_slide(path) as slide:
            info = slide.info
        values = rng.normal(0, 0.1, (4, 4, 3)).astype(np.float32)
        values[1, 3, 2] = 2
        npz = attention_file(tmp_path, slide_id)
        npz.parent.mkdir(exist_ok=True)
        np.savez(
            npz,
            origin=np.array([(100, 100), (228, 100), (100, 228), (228, 228)], np.int32),
            region_px=128.0,
            slot_boxes=BOXES,
            mask=np.ones((4, 4), bool),
            mpp_xy=info.mpp,
            size=info.size,
            corner=info.corner,
            synthetic=True,
            method="gradient",
            maps=list(CLASSES),
            attribution_maps=values,
        )
        rows.append(
            PredictionRow(
                *(slide_id, "case/1 <A>", "ok"),
                call="stromal",
                probs=(0.1, 0.2, 0.7),
                alpha=(2.0, 4.0, 14.0),
                entropy=0.80,
                expected_entropy=0.7,
                mutual_information=0.1,
                vacuity=0.15,
                synthetic=True,
                qc_verdict="accept",
                qc_coverage=0.9,
                slide_sha256=info.content_hash,
                model="abc",
            )
        )
    rows.append(PredictionRow("gone", "case 2", "not_evaluable", reason="no_tissue: no tissue; check the file"))
    write_predictions(tmp_path / "predictions.csv", rows, CLASSES)
    return tmp_path


def test_every_slide_gets_its_files_and_every_case_a_page_that_needs_no_other_file(
    predictions: Path, slides: dict[str, Path]
) -> None:
    sources = {slide_id: SlideSource(path) for slide_id, path in slides.items()}
    outcomes = write_pictures(predictions, sources, tiles=3)
    assert [(outcome.slide_id, outcome.fault) for outcome in outcomes] == [(slide_id, "") for slide_id in slides]
    for outcome in outcomes:
        assert [path.name.split(".", 1)[1] for path in outcome.paths] == ["ome.tif", "geojson", "jpg"]
        assert all(path.stat().st_size > 1000 for path in outcome.paths)
    page = (predictions / "reports" / "case%2F1 %3CA%3E.html").read_text()
    assert "Case case/1 &lt;A&gt;" in page
    assert "Research use only" in page
    assert "SYNTHETIC SLIDE" in page
    for slide_id in slides:
        assert f"Slide {slide_id}" in page
    # The interval of the Dirichlet distribution stands beside the probability.
    assert "{:.2f} to {:.2f}".format(*credible_interval((2.0, 4.0, 14.0), 2)) in page
    sources_of_images = re.findall(r'src="([^"]{0,40})', page)
    assert len(sources_of_images) >= 2 * (4 + 3)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources_of_images)
    assert not re.search(r"https?://|<script|<link", page)
    picture = base64.b64decode(re.search(r'base64,([^"]+)"', page).group(1))
    assert picture[:2] == b"\xff\xd8"
    other = (predictions / "reports" / "case 2.html").read_text()
    assert "Not evaluable" in other
    assert "no_tissue: no tissue; check the file" in other
    assert "<img" not in other


def test_the_first_tile_is_the_planted_one_and_its_picture_shows_its_pixels(
    predictions: Path, slides: dict[str, Path]
) -> None:
    slide_id, path = next(iter(slides.items()))
    tiles = top_tiles(read_evidence(predictions, slide_id), 3)
    first = next(tile for tile in tiles if tile.map_name == "stromal")
    assert (first.number, first.corner.tolist(), first.side, first.value) == (1, [292, 164], 64.0, 2.0)
    with open_slide(path) as slide:
        np.testing.assert_array_equal(tile_picture(slide, first, 64), slide.read(292, 164, 64, 64))
    write_pictures(predictions, {slide_id: SlideSource(path)}, tiles=3)
    with Image.open(predictions / "sheets" / f"{slide_id}.jpg") as sheet:
        assert sheet.width == 3 * 232 + 8


def test_slides_without_their_file_or_with_another_get_no_pictures_and_the_others_go_on(
    predictions: Path, slides: dict[str, Path]
) -> None:
    (one, path), (other, _) = slides.items()
    outcomes = write_pictures(predictions, {other: SlideSource(path)})
    assert "its file is not among the slides" in outcomes[0].fault
    assert "is not the file that was predicted" in outcomes[1].fault
    assert not (predictions / "overlays").exists()
    page = (predictions / "reports" / "case%2F1 %3CA%3E.html").read_text()
    assert f"Slide {one}" in page
    assert "<img" not in page
    attention_file(predictions, one).write_bytes(b"damaged")
    outcomes = write_pictures(predictions, {one: SlideSource(path)})
    assert "is damaged, or of an earlier version of crcjax" in outcomes[0].fault


def test_uncertainty_is_said_in_words_that_fit_the_numbers() -> None:
    row = PredictionRow("s", "c", "ok", call="immune", probs=(0.02, 0.97, 0.01), entropy=0.15, mutual_information=0.01)
    assert uncertainty_sentences(row, CLASSES) == ["The model clearly prefers immune (0.97) to canonical (0.02)."]
    undecided = replace(
        row, probs=(0.35, 0.34, 0.31), entropy=1.097, mutual_information=0.9, vacuity=0.8, conformal_set=CLASSES
    )
    words = " ".join(uncertainty_sentences(undecided, CLASSES))
    assert "undecided" in words
    assert "little evidence" in words
    assert "has seen few slides like this one" in words
    assert "excludes none" in words
    assert "is empty" in " ".join(uncertainty_sentences(replace(row, conformal_set=()), CLASSES))
    assert uncertainty_sentences(PredictionRow("s", "c", "failed"), CLASSES) == []
    # A slide beyond a limit has probabilities, which are no result.
    assert uncertainty_sentences(replace(row, status="not_evaluable", call=""), CLASSES) == []


def test_a_credible_interval_is_that_of_samples_of_the_dirichlet_distribution() -> None:
    alpha = (2.0, 4.0, 14.0)
    samples = np.random.default_rng(0).dirichlet(alpha, 200_000)
    for index in range(3):
        low, high = np.quantile(samples[:, index], [0.025, 0.975])
        assert credible_interval(alpha, index) == pytest.approx((low, high), abs=0.003)
