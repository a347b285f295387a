"""The cost estimate counts tiles as the plan does, learns the rates of stages, and orders slides by their seconds."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.predict.engine import SlideSource
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.predict.slide_cost import (
    NOTHING,
    CostHistory,
    CostModel,
    MeasuredSlide,
    SlideSize,
    sizes_of_bags,
    slide_size,
)
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide
from crcjax.slides.tiling.plan import TilingParams, plan_tiles
from crcjax.slides.wsi.slide import open_slide

SIDES_PX = (512, 1024, 2048)


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Slides of different size, the smallest first."""
    folder = tmp_path_factory.mktemp("slides")
    return [
        paint_slide(folder / f"{side}.svs", SlideSpec("immune", side, size_px=(side, side), mpp=1.0))
        for side in SIDES_PX
    ]


@pytest.mark.parametrize(
    "params",
    [
        TilingParams(("10x",), tile_px=64),
        TilingParams(("5x", "10x"), tile_px=64),
        TilingParams(("2.5x",), tile_px=64),
    ],
)
def test_tiles_and_pixels_are_those_of_the_plan_to_a_tenth(params: TilingParams, slides: list[Path]) -> None:
    for path in slides[1:]:
        size = slide_size(path, None, None, params)
        with open_slide(path) as slide:
            plan = plan_tiles(slide, params)
        assert size.tiles == pytest.approx(plan.mask.size, rel=0.1)
        downsample = slide.info.level_downsamples[plan.scale.level]
        assert size.megapixels == pytest.approx(len(plan.origin) * (plan.region_px / downsample) ** 2 / 1e6, rel=0.1)
        assert 0 < size.megabytes <= path.stat().st_size / 1e6


def test_a_bag_has_the_size_of_its_slides_and_a_slide_that_cannot_be_read_has_none(
    slides: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.svs"
    broken.write_bytes(b"II*\0")
    params = TilingParams(("10x",), tile_px=64)
    bags = [[SlideSource(slides[0])], [SlideSource(slides[1])], [SlideSource(slides[0]), SlideSource(slides[1])]]
    first, second, both, unreadable = sizes_of_bags([*bags, [SlideSource(broken)]], params, 2)
    assert both == first + second
    assert both.slides == 2
    assert unreadable == NOTHING


def test_rates_are_recovered_from_slides_that_follow_them() -> None:
    rng = np.random.default_rng(0)
    sizes = [
        SlideSize(1, int(tiles), tiles * rng.uniform(0.05, 0.2), tiles / 50) for tiles in rng.integers(10, 9000, 40)
    ]
    seconds = [
        (0.2 + 0.01 * size.megapixels, 0.004 * size.tiles, 0.5 + 0.0001 * size.tiles + 0.002 * size.megabytes)
        for size in sizes
    ]
    model = CostModel([MeasuredSlide(*slide) for slide in zip(sizes[:20], seconds[:20], strict=True)])
    for size, of_stages in zip(sizes[20:], seconds[20:], strict=True):
        np.testing.assert_allclose(model.stages(size), of_stages, rtol=1e-4)
        assert model.seconds(size) == pytest.approx(sum(of_stages), rel=1e-4)
    read, encode, finish = np.sum(seconds, axis=0)
    assert model.seconds_of_command(sum(sizes, start=NOTHING)) == pytest.approx(max(read + encode, finish), rel=1e-4)


def test_a_history_is_kept_by_model_and_a_damaged_one_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    history = CostHistory("model", "attention", "threads", 2)
    slides = [MeasuredSlide(SlideSize(1, tiles, tiles / 4, 0.5), (1.0, 2.0, 0.25)) for tiles in range(1, 300)]
    history.add(slides[:2])
    history.add(slides[2:])
    assert history.measured() == slides
    history.add(slides)
    assert history.measured() == [*slides, *slides][-400:]
    assert CostHistory("model", "attention", "threads", 4).measured() == []
    (file,) = (tmp_path / "crcjax" / "seconds").iterdir()
    file.write_bytes(file.read_bytes()[:100])
    assert history.measured() == []
    history.add(slides[:1])
    assert history.measured() == slides[:1]
    # A cache that cannot be written is no error.
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    CostHistory("model", "attention", "threads", 2).add(slides)


def test_a_command_predicts_the_slides_with_most_tiles_first_and_the_next_one_states_its_seconds(
    run: Path,
    painted: Path,
    slides: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    crcjax: Callable[..., subprocess.CompletedProcess],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    predictor = Predictor(run)
    small = [Path(str(row.path)) for row in load_cohort(painted / "cohort.csv", None).rows[-3:]]
    # Bytes behind the end of the file: it is the largest file, and has the fewest tiles.
    padded = tmp_path / "padded.svs"
    padded.write_bytes(small[0].read_bytes() + bytes(2_000_000))
    paths = [padded, *small[1:], slides[2]]
    order: list[str] = []
    plans: list[tuple[SlideSize, float | None]] = []

    def predict(out: Path) -> float:
        start = time.monotonic()
        predict_slides(
            predictor,
            [PredictJob(path.stem, path.stem, path) for path in paths],
            out,
            threads=1,
            # A slide is begun when the one before it has ended.
            memory_bytes=1,
            on_plan=lambda *plan: plans.append(plan),
            on_row=lambda row: order.append(row.slide_id),
        )
        return time.monotonic() - start

    predict(tmp_path / "first")
    assert order[0] == slides[2].stem
    measured = CostHistory(predictor.model_id, "attention", "threads", 1).measured()
    assert len(measured) == 3
    assert all(min(slide.seconds) >= 0 < sum(slide.seconds) for slide in measured)
    elapsed = predict(tmp_path / "second")
    (size, unknown), (again, seconds) = plans
    assert size == again
    assert astuple(size)[0] == 4
    assert unknown is None
    assert seconds is not None
    # A loose bound: the machine may have other work.
    assert elapsed / 20 < seconds < elapsed * 20
    command = ("predict", small[1], "--run", run, "--region-share", 0.5)
    for threads, expected in ((1, r"about \d:\d\d:\d\d expected"), (3, "the time is unknown until this model")):
        done = crcjax(*command, "--out", tmp_path / str(threads), "--workers", threads)
        assert re.search(rf"1 slide with about \d+ tiles: {expected}", done.stderr), done.stderr


@pytest.mark.system
def test_the_estimate_orders_slides_by_the_seconds_that_they_take(
    run: Path, slides: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    predictor = Predictor(run)

    def cpu_seconds(path: Path) -> float:
        with open_slide(path) as slide:
            predictor.encode(slide, 1)
            start = time.process_time()
            for _ in range(3):
                predictor.encode(slide, 1)
        return time.process_time() - start

    seconds = [cpu_seconds(path) for path in slides]
    estimates = [CostModel().seconds(slide_size(path, None, None, predictor.tiling)) for path in slides]
    assert np.argsort(estimates).tolist() == np.argsort(seconds).tolist()
