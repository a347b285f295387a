"""The demo in miniature: the same stages, too small to learn anything."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from crcjax import demo
from crcjax.demo import SIZES, DemoSize, demo_config, run_demo
from crcjax.errors import OutputError

MINIATURE = DemoSize({"train": 6, "val": 3, "test": 3}, (1100, 1100))


def _miniature(out: Path) -> tuple[dict, str]:
    """The metrics and what the terminal showed."""
    config = demo_config()
    config.data.regions_per_bag, config.data.batch_size = 2, 4
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.optimizer.warmup_steps = 2, 2, 1
    console = Console(file=io.StringIO(), width=200, force_terminal=True, soft_wrap=True, highlight=False)
    metrics = run_demo(out, 0, MINIATURE, config=config, console=console)
    return metrics, console.file.getvalue()


def test_a_demo_that_is_killed_resumes_leaves_a_report_and_a_second_one_repeats_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "_predict", killed)
        with pytest.raises(KeyboardInterrupt):
            _miniature(tmp_path)
    kept = [*tmp_path.glob("slides/*"), *tmp_path.glob("store/*/zarr.json"), *tmp_path.glob("run/checkpoints/*")]
    assert len(kept) > 36
    before = {path: path.stat().st_mtime_ns for path in kept}
    metrics, shown = _miniature(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert metrics["synthetic"]
    assert metrics["flow"]["cases evaluated"] == 3
    assert 0 <= json.loads((tmp_path / "metrics.json").read_text())["statistics"]["balanced_accuracy"]["value"] <= 1
    for stage in ("1/5 paint", "2/5 tile", "3/5 train", "4/5 predict", "5/5 validate"):
        assert stage in shown
    assert str(tmp_path / "report.html") in shown
    assert "no evidence about patients" in shown
    assert "SYNTHETIC SLIDES" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "heatmaps").glob("*.png"))) == 3
    again, _ = _miniature(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert json.dumps(again["statistics"]) == json.dumps(metrics["statistics"])


def test_the_small_demo_has_fewer_slides_pixels_and_steps() -> None:
    small, full = SIZES["small"], SIZES["full"]
    assert sum(small.cases.values()) < sum(full.cases.values())
    assert small.size_px < full.size_px
    assert demo_config("small").train.steps < demo_config("full").train.steps


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "afile").touch()
    for out in (tmp_path / "afile", tmp_path / "afile" / "demo"):
        with pytest.raises(OutputError, match="cannot be written"):
            run_demo(out, console=Console(file=io.StringIO()))
