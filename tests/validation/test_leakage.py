"""The leakage certificate finds every leak that is injected, and none in a clean study."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, zoom

from crcjax.errors import InputError
from crcjax.validation.leakage import LeakageCertificate, StudySlide, leakage_certificate, picture_hashes

ROLES = ("development",) * 30 + ("calibration",) * 10 + ("evaluation",) * 20


def _slides() -> list[StudySlide]:
    return [
        StudySlide(
            f"S{i}", f"P{i}", role, f"B{i}", f"{i:064x}", f"S{i}.svs", ("immune", "stromal")[i % 2], f"20{i + 10}-01-01"
        )
        for i, role in enumerate(ROLES)
    ]


def _pictures(seed: int, count: int) -> np.ndarray:
    """Smooth random pictures, as thumbnails of tissue are."""
    noise = np.random.default_rng(seed).normal(size=(count, 96, 128))
    return np.stack([200 + 400 * gaussian_filter(picture, 6) for picture in noise])


def _hashes(pictures: np.ndarray) -> np.ndarray:
    return np.stack([picture_hashes(picture) for picture in pictures])


@pytest.fixture(scope="module")
def data() -> dict:
    rng = np.random.default_rng(0)
    return {
        "embedding": rng.normal(size=(60, 32)) + 5,
        "picture_hash": _hashes(_pictures(1, 60)),
        "fitted_on": {"temperature": [f"P{i}" for i in range(30, 40)], "scaler": [f"P{i}" for i in range(30)]},
        "pretraining": "the encoder saw none of the sites",
    }


def _leaks(certificate: LeakageCertificate) -> dict[str, tuple[str, ...]]:
    return {check.name: check.examples for check in certificate.leaks}


def test_a_clean_study_has_ten_clear_checks(data) -> None:
    certificate = leakage_certificate(_slides(), **data)
    assert certificate.leaks == ()
    assert certificate.sentence == "10 of 10 checks found no leak"
    assert certificate.slides == certificate.patients == {"development": 30, "calibration": 10, "evaluation": 20}


def test_a_check_without_data_is_not_checked_and_never_clear() -> None:
    bare = [StudySlide(slide.slide_id, slide.case_id, slide.role) for slide in _slides()]
    verdicts = {check.name: check.verdict for check in leakage_certificate(bare).checks}
    assert {name for name, verdict in verdicts.items() if verdict == "clear"} == {
        "patients in two roles",
        "slides in two roles",
    }
    assert set(verdicts.values()) == {"clear", "not checked"}


@pytest.mark.parametrize(
    ("change", "name", "example"),
    [
        ({"slide_id": "S0"}, "slides in two roles", "S0: development and evaluation"),
        ({"block_id": "B0"}, "blocks or specimens in two roles", "B0: development and evaluation"),
        ({"sha256": f"{0:064x}"}, "identical files", "S0 (development) = S59 (evaluation)"),
        ({"file_name": "scan_Stromal_59.svs"}, "label in a name", "S59: stromal"),
        ({"date": "2011-05-01"}, "evaluation before development", "S59: 2011-05-01"),
    ],
)
def test_every_injected_leak_of_the_table_is_found_alone(data, change, name, example) -> None:
    slides = _slides()
    slides[59] = replace(slides[59], **change)
    assert _leaks(leakage_certificate(slides, **data)) == {name: (example,)}


def test_a_patient_in_two_roles_is_found(data) -> None:
    slides = _slides()
    slides[0] = replace(slides[0], case_id="P59")
    assert _leaks(leakage_certificate(slides, **data)) == {
        "patients in two roles": ("P59: development and evaluation",)
    }


def test_a_copy_in_the_same_role_under_another_name_is_found(data) -> None:
    slides = _slides()
    slides[59] = replace(slides[59], sha256=slides[58].sha256)
    assert "S58 (evaluation) = S59 (evaluation)" in _leaks(leakage_certificate(slides, **data))["identical files"]


def test_a_temperature_fitted_on_a_test_case_is_found(data) -> None:
    fitted_on = {**data["fitted_on"], "temperature": ["P30", "P59"]}
    leaks = _leaks(leakage_certificate(_slides(), **{**data, "fitted_on": fitted_on}))
    assert leaks == {"fitted on evaluation cases": ("temperature: P59",)}


def test_a_near_duplicate_is_found_by_its_embedding(data) -> None:
    embedding = data["embedding"].copy()
    embedding[59] = embedding[3] + 0.02 * np.random.default_rng(1).normal(size=32)
    leaks = _leaks(leakage_certificate(_slides(), **{**data, "embedding": embedding}))
    assert list(leaks) == ["near-duplicates by embedding"]
    assert leaks["near-duplicates by embedding"][0].startswith("S3 (development) and S59 (evaluation): 0.99")


@pytest.mark.parametrize("turns", range(4))
def test_a_slide_scanned_again_is_found_by_its_thumbnail_in_any_orientation(data, turns) -> None:
    again = _pictures(1, 60)[5]
    # Another size, brightness and contrast, with noise, as of another scanner.
    again = np.rot90(0.8 * zoom(again, 1.3, order=1) + 20, turns)
    again = again + np.random.default_rng(2).normal(scale=4, size=again.shape)
    for picture in (again, again.T):
        hashes = data["picture_hash"].copy()
        hashes[59] = picture_hashes(picture)
        leaks = _leaks(leakage_certificate(_slides(), **{**data, "picture_hash": hashes}))
        assert list(leaks) == ["near-duplicates by thumbnail"]
        assert leaks["near-duplicates by thumbnail"][0].startswith("S5 (development) and S59 (evaluation)")


@pytest.mark.real_data
def test_one_slide_as_svs_and_as_dicom_is_found_among_other_slides_by_its_thumbnail(real_data) -> None:
    from openslide import OpenSlide

    folder = real_data / "slides"
    files = (
        folder / "aperio_cmu-1-small-region.svs",
        folder / "aperio_tcga-cr-7395-01a-01-ts1_jp2k.svs",
        folder / "dicom_tcga-prad_penmarks" / "tcga_xk_aaju_ts1.dcm",
        real_data / "slides_crc" / "tiff_crc_polyp_part.tif",
        folder / "dicom_cmu-1-small-region" / "level-0-frames-0-30.dcm",
    )
    hashes = []
    for file in files:
        with OpenSlide(file) as slide:
            hashes.append(picture_hashes(np.asarray(slide.get_thumbnail((256, 256)).convert("L"), float)))
    slides = [StudySlide(f"S{i}", f"P{i}", "evaluation" if i > 2 else "development") for i in range(5)]
    certificate = leakage_certificate(slides, picture_hash=np.stack(hashes))
    (example,) = _leaks(certificate)["near-duplicates by thumbnail"]
    assert example.startswith("S0 (development) and S4 (evaluation)")


def test_slides_of_one_patient_are_no_near_duplicates_and_two_names_of_a_patient_are(data) -> None:
    embedding, slides = data["embedding"].copy(), _slides()
    embedding[59] = embedding[58]
    leaks = _leaks(leakage_certificate(slides, **{**data, "embedding": embedding}))
    assert leaks["near-duplicates by embedding"][0].startswith("S58 (evaluation) and S59 (evaluation)")
    slides[59] = replace(slides[59], case_id="P58")
    assert leakage_certificate(slides, **{**data, "embedding": embedding}).leaks == ()


def test_embeddings_that_are_all_alike_check_nothing(data) -> None:
    direction = np.random.default_rng(3).normal(size=32)
    alike = np.random.default_rng(4).normal(size=(60, 1)) * direction
    check = next(
        check
        for check in leakage_certificate(_slides(), **{**data, "embedding": alike}).checks
        if check.name == "near-duplicates by embedding"
    )
    assert check.verdict == "not checked"
    assert "do not tell slides apart" in check.remark


def test_the_order_of_slides_changes_no_verdict(data) -> None:
    slides = _slides()
    slides[59] = replace(slides[59], case_id="P0", sha256=slides[1].sha256)
    order = np.random.default_rng(5).permutation(60)
    moved = {**data, "embedding": data["embedding"][order], "picture_hash": data["picture_hash"][order]}
    first = leakage_certificate(slides, **data)
    second = leakage_certificate([slides[i] for i in order], **moved)
    assert [(c.name, c.verdict, c.findings, c.remark) for c in first.checks] == [
        (c.name, c.verdict, c.findings, c.remark) for c in second.checks
    ]


def test_unknown_roles_and_studies_without_evaluation_are_refused() -> None:
    with pytest.raises(InputError, match="needs slides with the role evaluation"):
        leakage_certificate(_slides()[:10])
