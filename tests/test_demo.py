"""The demo in miniature: the same line, too small to learn anything."""

import json
from pathlib import Path

from crcjax.demo import demo_config, run_demo


def _miniature(out: Path, said: list[str]) -> dict:
    config = demo_config()
    config.data.regions_per_bag, config.data.batch_size = 2, 4
    config.model.width, config.model.features, config.model.attention = 8, 16, 8
    config.train.steps, config.train.eval_every, config.optimizer.warmup_steps = 2, 2, 1
    cases = {"train": 6, "val": 3, "test": 3}
    return run_demo(out, 0, said.append, cases=cases, size_px=(1100, 1100), config=config)


def test_the_demo_leaves_a_report_that_says_synthetic_and_a_second_one_repeats_nothing(tmp_path: Path) -> None:
    said: list[str] = []
    metrics = _miniature(tmp_path, said)
    assert metrics["synthetic"]
    assert metrics["flow"]["cases evaluated"] == 3
    assert str(tmp_path / "report.html") in said[-1]
    assert "no evidence about patients" in said[-2]
    assert "SYNTHETIC SLIDES" in (tmp_path / "report.html").read_text()
    assert len(list((tmp_path / "heatmaps").glob("*.png"))) == 3
    kept = [*tmp_path.glob("slides/*"), *tmp_path.glob("store/*/zarr.json"), *tmp_path.glob("run/checkpoints/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    again = _miniature(tmp_path, [])
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert json.dumps(again["statistics"]) == json.dumps(metrics["statistics"])
