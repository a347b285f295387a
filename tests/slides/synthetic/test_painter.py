"""Painted slides: real files with known truth, the same from the same seed, and not solved by colour."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from crcjax.errors import InputError, OutputError
from crcjax.slides.synthetic.artefacts import SYNTHETIC_ARTEFACTS
from crcjax.slides.synthetic.painter import SITES, SlideSpec, _scene, paint_block, paint_cohort, paint_slide
from crcjax.slides.synthetic.patterns import PATTERNS
from crcjax.slides.synthetic.tissue_map import CARRIER, MAP_UM, SUBTYPES, Tissue, architecture
from crcjax.slides.synthetic.truth import load_truth, truth_path

SPEC = SlideSpec("immune", seed=3, site=SITES[1], size_px=(2500, 1300))


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_slide(tmp_path_factory.mktemp("painted") / "a.svs", SPEC)


def _at_pixels(mask: np.ndarray, shape: tuple[int, int], mpp: float) -> np.ndarray:
    """A map at level-0 px."""
    rows, columns = (
        np.minimum((np.arange(side) * mpp / MAP_UM).astype(int), limit - 1)
        for side, limit in zip(shape, mask.shape, strict=True)
    )
    return mask[np.ix_(rows, columns)]


def _grown(mask: np.ndarray, by: int) -> np.ndarray:
    padded = np.pad(mask, by)
    shifts = [(y, x) for y in range(-by, by + 1) for x in range(-by, by + 1)]
    return np.any([np.roll(padded, shift, (0, 1)) for shift in shifts], axis=0)[by:-by, by:-by]


def test_openslide_reads_an_aperio_slide_with_mpp_and_objective_power(painted: Path) -> None:
    with openslide.OpenSlide(painted) as slide:
        assert slide.properties["openslide.vendor"] == "aperio"
        assert float(slide.properties["openslide.mpp-x"]) == float(slide.properties["openslide.mpp-y"]) == 0.5
        assert slide.properties["openslide.objective-power"] == "20"
        assert "synthetic" in slide.properties["openslide.comment"]
        assert slide.level_dimensions == ((2500, 1300), (625, 325))
        level_0 = np.asarray(slide.read_region((0, 0), 0, (2500, 1300)))[..., :3]
        shrunk = np.asarray(slide.read_region((0, 0), 1, (625, 325)))[..., :3]
    pixels = paint_block(SPEC, 0, 0, 2500, 1300)
    assert np.abs(level_0.astype(float) - pixels).mean() < 4  # JPEG
    assert np.abs(level_0.reshape(325, 4, 625, 4, 3).mean((1, 3)) - shrunk).mean() < 4


def test_the_same_spec_gives_the_same_bytes_with_any_number_of_workers(painted: Path, tmp_path: Path) -> None:
    again = paint_slide(tmp_path / "b.svs", SPEC, workers=2)
    assert again.read_bytes() == painted.read_bytes()
    assert truth_path(again).read_bytes() == truth_path(painted).read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    other = paint_slide(tmp_path / "c.svs", replace(SPEC, seed=4))
    assert other.read_bytes() != painted.read_bytes()


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_a_block_painted_alone_equals_the_crop_of_the_whole(subtype: str) -> None:
    spec = SlideSpec(subtype, seed=21, size_px=(3000, 2000), artefacts=SYNTHETIC_ARTEFACTS)
    whole = paint_block(spec, 0, 0, 3000, 2000)
    rng = np.random.default_rng(0)
    for _ in range(6):
        x, y = int(rng.integers(2400)), int(rng.integers(1500))
        np.testing.assert_array_equal(paint_block(spec, x, y, 600, 500), whole[y : y + 500, x : x + 600])


def test_far_from_the_origin_tissue_is_drawn_as_near_it() -> None:
    spec = SlideSpec("stromal", seed=5, size_px=(100_000, 60_000))
    x, y = 61_234, 31_235
    whole = paint_block(spec, x, y, 1100, 600)
    assert whole.std() > 10
    np.testing.assert_array_equal(paint_block(spec, x + 301, y + 77, 500, 400), whole[77:477, 301:801])


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_optical_density_lies_in_the_plane_of_the_truths_stains(site, tmp_path: Path) -> None:
    spec = SlideSpec("canonical", seed=8, site=site, size_px=(1536, 1024))
    truth = load_truth(truth_path(paint_slide(tmp_path / "a.svs", spec)))
    pixels = paint_block(spec, 0, 0, *spec.size_px).reshape(-1, 3)
    pixels = pixels[(pixels.min(1) > 40) & (pixels.max(1) < 200)]  # where rounding to a byte is small
    density = -np.log(pixels / np.array(truth.white))
    stains = np.array([truth.haematoxylin, truth.eosin])
    np.testing.assert_allclose(np.linalg.norm(stains, axis=1), 1)
    concentration, *_ = np.linalg.lstsq(stains.T, density.T)
    residual = np.linalg.norm(density - concentration.T @ stains, axis=1)
    assert np.median(residual) < 0.02 * np.median(np.linalg.norm(density, axis=1))
    assert np.quantile(concentration, 0.01) > -0.05


def test_the_truth_lies_where_the_tissue_is(painted: Path) -> None:
    truth = load_truth(truth_path(painted))
    assert (truth.subtype, truth.seed, truth.um_per_px, truth.white) == ("immune", 3, MAP_UM, SITES[1].white)
    assert truth.names[Tissue.LYMPHOID] == "lymphoid"
    pixels = paint_block(SPEC, 0, 0, *SPEC.size_px)
    stained = (pixels < np.array(truth.white) - 8).any(axis=2)
    inner = ~_grown(truth.kinds == Tissue.BACKGROUND, 2)  # borders are rough
    solid = inner & ~np.isin(truth.kinds, (Tissue.ADIPOSE, Tissue.MUCIN, Tissue.GLANDS, Tissue.CRIBRIFORM))
    outer = ~_grown(truth.kinds != Tissue.BACKGROUND, 7)  # the widest structure reaches 112 µm from its place
    assert stained[_at_pixels(solid, stained.shape, 0.5)].mean() > 0.97
    assert stained[_at_pixels(outer, stained.shape, 0.5)].mean() == 0
    assert not (truth.carriers & (truth.kinds != Tissue.LYMPHOID)).any()


@pytest.mark.parametrize("subtype", SUBTYPES)
def test_every_case_holds_every_tissue_and_most_of_its_own_signature(subtype: str) -> None:
    amounts = []
    for seed in range(40):
        kinds = architecture(subtype, seed, 1536.0, 1280.0)
        amounts.append([(kinds == kind).sum() / (kinds > 0).sum() for kind in Tissue if kind <= Tissue.ADIPOSE])
    amounts = np.array(amounts)
    assert (amounts > 0).all()
    for name, kind in CARRIER.items():
        low, high = (0.17, 0.41) if name == subtype else (0.0, 0.09)
        assert ((amounts[:, kind] > low) & (amounts[:, kind] < high)).all()


def test_slides_without_patterns_keep_the_text_and_the_kinds_that_they_had_before_patterns(painted: Path) -> None:
    truth = load_truth(truth_path(painted))
    assert truth.spec == str(SPEC) == repr(SPEC)
    assert "patterns" not in truth.spec
    assert truth.names[-1] == "adipose"
    assert truth.inked is None


@pytest.mark.parametrize("name", PATTERNS)
def test_a_pattern_takes_its_share_and_its_blocks_fit_each_other(name: str, tmp_path: Path) -> None:
    spec = SlideSpec("canonical", seed=12, size_px=(1200, 1000), mpp=1.0, patterns=(name,))
    truth = load_truth(truth_path(paint_slide(tmp_path / "a.svs", spec)))
    default = load_truth(truth_path(paint_slide(tmp_path / "b.svs", replace(spec, patterns=()))))
    assert truth.spec != default.spec
    here = truth.kinds == truth.names.index(name)
    assert 0.1 < here.sum() / (truth.kinds > 0).sum() < 0.7
    np.testing.assert_array_equal(truth.kinds[~here], default.kinds[~here])
    np.testing.assert_array_equal(truth.carriers, default.carriers)
    pixels = paint_block(spec, 0, 0, 1200, 1000)
    for x, y in ((301, 277), (611, 155), (455, 498)):
        np.testing.assert_array_equal(paint_block(spec, x, y, 400, 300), pixels[y : y + 300, x : x + 400])


def test_ink_lies_on_the_margin_and_absorbs_light_there_alone(tmp_path: Path) -> None:
    spec = SlideSpec("canonical", seed=3, size_px=(1200, 1000), mpp=1.0, patterns=("inked_margin",))
    truth = load_truth(truth_path(paint_slide(tmp_path / "a.svs", spec)))
    assert truth.inked is not None
    assert 0 < (truth.inked & (truth.kinds > 0)).sum() < 0.3 * (truth.kinds > 0).sum()
    assert not (truth.inked & ~_grown(truth.kinds == Tissue.BACKGROUND, 4)).any()
    inked, clean = (paint_block(replace(spec, patterns=names), 0, 0, 1200, 1000) for names in (spec.patterns, ()))
    changed = (inked != clean).any(axis=2)
    assert not changed[~_at_pixels(_grown(truth.inked, 1), changed.shape, 1.0)].any()
    assert inked[changed].mean() < clean[changed].mean() - 20


def test_tinted_glass_is_tinted_where_it_was_scanned_and_white_elsewhere() -> None:
    spec = SlideSpec("canonical", seed=6, size_px=(1600, 1280), mpp=4.0, patterns=("tinted_glass",))
    picture, clean = (paint_block(replace(spec, patterns=names), 0, 0, 1600, 1280) for names in (spec.patterns, ()))
    glass = (clean == spec.site.white).all(axis=2)
    filled = (picture == 255).all(axis=2)
    assert 0.01 < filled.mean() < 0.6
    assert glass[filled].all()
    tinted = np.median(picture[glass & ~filled], axis=0) / spec.site.white
    assert 0.9 < tinted.min() < tinted.max() - 0.02


@pytest.mark.parametrize("name", SYNTHETIC_ARTEFACTS)
def test_an_artefact_changes_pixels_only_within_its_mask(name: str, tmp_path: Path) -> None:
    spec = SlideSpec("stromal", seed=9, size_px=(1536, 1024), mpp=1.0, artefacts=(name,))
    truth = load_truth(truth_path(paint_slide(tmp_path / "a.svs", spec)))
    assert set(truth.artefacts) == {name}
    clean = paint_block(replace(spec, artefacts=()), 0, 0, *spec.size_px)
    changed = (paint_block(spec, 0, 0, *spec.size_px) != clean).any(axis=2)
    mask = truth.artefacts[name]
    assert 0 < mask.mean() < 0.5
    assert not changed[~_at_pixels(_grown(mask, 1), changed.shape, 1.0)].any()
    tissue = _at_pixels(mask & (truth.kinds > 0), changed.shape, 1.0)
    assert changed[tissue].mean() > 0.5


@pytest.mark.parametrize("name", SYNTHETIC_ARTEFACTS[4:])
def test_an_artefact_neither_moves_nor_changes_those_before_it(name: str) -> None:
    spec = SlideSpec("immune", seed=14, size_px=(1024, 768), mpp=1.0, artefacts=("pen", "fold"))
    before, scene = paint_block(spec, 0, 0, *spec.size_px), _scene(spec)
    with_it = replace(spec, artefacts=(*spec.artefacts, name))
    after, changed = paint_block(with_it, 0, 0, *spec.size_px), _scene(with_it).artefacts[name] > 0
    for other in spec.artefacts:
        np.testing.assert_array_equal(_scene(with_it).artefacts[other], scene.artefacts[other])
    outside = ~_at_pixels(_grown(changed, 1), after.shape[:2], 1.0)
    assert 0.3 < outside.mean() < 1
    np.testing.assert_array_equal(after[outside], before[outside])


@pytest.mark.parametrize(("name", "times"), [("fold", 2.0), ("pale", 0.25), ("dense", 3.0)])
def test_thin_and_thick_tissue_absorbs_as_many_times_as_much_light(name: str, times: float) -> None:
    site = replace(SITES[0], blur_um=0.01)
    spec = SlideSpec("stromal", seed=9, site=site, size_px=(1024, 768), mpp=1.0, artefacts=(name,))
    corrupted, clean = (
        paint_block(replace(spec, artefacts=names), 0, 0, *spec.size_px).astype(float) for names in ((name,), ())
    )
    solid = (clean.min(axis=2) > 120) & (clean.max(axis=2) < 235)  # where rounding to a byte is small
    inner = solid & ~_at_pixels(_grown(_scene(spec).artefacts[name] < 1, 1), solid.shape, 1.0)
    ratio = np.log(corrupted[inner] / site.white).sum(axis=1) / np.log(clean[inner] / site.white).sum(axis=1)
    assert inner.sum() > 500
    assert np.median(ratio) == pytest.approx(times, rel=0.03)


def test_blood_is_red_orange_and_dust_is_dark_and_grey_on_tissue_and_on_glass() -> None:
    spec = SlideSpec("canonical", seed=4, size_px=(1024, 768), mpp=1.0)
    for name in ("blood", "dust"):
        corrupted = replace(spec, artefacts=(name,))
        pixels, truth = paint_block(corrupted, 0, 0, *spec.size_px), _scene(corrupted)
        inner = _at_pixels(truth.artefacts[name] == 1, pixels.shape[:2], 1.0)
        for tissue in (True, False):
            here = pixels[inner & (_at_pixels(truth.ground.kinds > 0, inner.shape, 1.0) == tissue)]
            assert len(here) > 500
            if name == "blood":
                red, green, blue = np.median(here, axis=0)
                assert red > 150 > 120 > max(green, blue)
            else:
                specks = here[here.max(axis=1) < 90]
                assert 0.2 < len(specks) / len(here) < 0.8
                assert np.ptp(np.median(specks, axis=0)) < 40


def test_a_cohort_is_balanced_and_painted_again_only_where_its_specification_changed(tmp_path: Path) -> None:
    options = {"seed": 1, "size_px": (384, 256), "mpp": 2.0, "workers": 2}
    table = paint_cohort(tmp_path, {"train": 12, "test": 12}, **options)
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["slide_id", "case_id", "path", "subtype", "site", "scanner", "split"]
    for split, each in (("train", 1), ("test", 1)):
        pairs = [(row["site"], row["subtype"]) for row in rows if row["split"] == split]
        assert sorted(pairs) == sorted([(site.name, subtype) for site in SITES for subtype in SUBTYPES] * each)
    assert len({row["case_id"] for row in rows}) == 24
    slides = [tmp_path / row["path"] for row in rows]
    for row, slide in zip(rows, slides, strict=True):
        assert load_truth(truth_path(slide)).subtype == row["subtype"]
    before = {slide: (slide.stat().st_mtime_ns, slide.read_bytes()) for slide in slides}
    truth_path(slides[0]).unlink()
    paint_cohort(tmp_path, {"train": 12, "test": 12}, **options)
    after = {slide: (slide.stat().st_mtime_ns, slide.read_bytes()) for slide in slides}
    assert [slide for slide in slides if after[slide][0] != before[slide][0]] == [slides[0]]
    assert after[slides[0]][1] == before[slides[0]][1]
    paint_cohort(tmp_path, {"train": 12, "test": 12}, **options | {"seed": 2})
    assert all(slide.read_bytes() != before[slide][1] for slide in slides)


def test_an_unknown_subtype_or_artefact_is_refused_and_a_full_disk_named(tmp_path: Path, small_disk: Path) -> None:
    with pytest.raises(InputError, match="know"):
        paint_slide(tmp_path / "a.svs", SlideSpec("metabolic", seed=0))
    with pytest.raises(InputError, match="know"):
        paint_slide(tmp_path / "a.svs", SlideSpec("immune", seed=0, artefacts=("coffee",)))
    with pytest.raises(InputError, match=r"patterns must be among .*villous.* got \('tubes',\)"):
        paint_slide(tmp_path / "a.svs", SlideSpec("immune", seed=0, patterns=("tubes",)))
    with pytest.raises(InputError, match="no truth"):
        load_truth(tmp_path / "a.truth.npz")
    truncated = tmp_path / "b.truth.npz"
    truncated.write_bytes(b"PK\x03\x04 and no more")
    with pytest.raises(InputError, match="no truth"):
        load_truth(truncated)
    (small_disk / "filler").write_bytes(bytes(4_000_000))
    with pytest.raises(OutputError, match=r"a\.svs.*free space"):
        paint_slide(small_disk / "a.svs", SlideSpec("immune", seed=0))
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


@pytest.mark.slow
def test_mean_colour_and_tissue_area_do_not_tell_the_subtype() -> None:
    features, labels = [], []
    for i in range(96):
        site, label = SITES[i // 3 % len(SITES)], i % len(SUBTYPES)
        spec = SlideSpec(SUBTYPES[label], seed=1000 + i, site=site, size_px=(1024, 896), mpp=1.0)
        pixels = paint_block(spec, 0, 0, *spec.size_px)
        tissue = (pixels < np.array(site.white) - 8).any(axis=2)
        features.append([*pixels[tissue].mean(axis=0), tissue.mean()])
        labels.append(label)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=100, max_iter=1000))
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    predicted = cross_val_predict(classifier, np.array(features), labels, cv=folds)
    assert balanced_accuracy_score(labels, predicted) < 0.6
