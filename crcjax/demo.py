"""The whole line on painted slides: paint, tile, train, predict, validate. Each stage does what is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ml_collections import ConfigDict

from crcjax.config import get_config
from crcjax.data.cohort import load_cohort
from crcjax.errors import CrcjaxError
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.slides.tiling.plan import TilingParams
from crcjax.train.loop import train
from crcjax.validation.report import validate

CASES = {"train": 72, "val": 18, "test": 36}
SIZE_PX = (3072, 2560)  # at 0.5 µm per pixel


def demo_config() -> ConfigDict:
    """The demo's differences from the default config: what two CPU cores do in a few minutes."""
    config = get_config()
    config.data.regions_per_bag = 12
    config.data.batch_size = 8
    config.data.region_buckets = (64,)
    config.train.steps = 400
    config.train.eval_every = 50
    return config


def run_demo(
    out: Path,
    seed: int = 0,
    say: Callable[[str], None] = print,
    *,
    cases: dict[str, int] = CASES,
    size_px: tuple[int, int] = SIZE_PX,
    config: ConfigDict | None = None,
) -> dict:
    """Runs the demo into a folder and returns its metrics; `seed` draws the cohort and the model."""
    say(f"1/5 painting {sum(cases.values())} synthetic slides of {len(cases)} splits")
    table = paint_cohort(out, cases, seed=seed, size_px=size_px)
    config = config or demo_config()
    cohort = load_cohort(table, config.data.classes)
    jobs = [TileJob(row.slide_id, row.path) for row in cohort.rows if row.path]
    say("2/5 tiling them at 10x")
    outcomes = tile_slides(jobs, out / "store", TilingParams(("10x",)))
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    if failed:
        raise CrcjaxError(f"{failed[0].path}: {failed[0].reason}")
    say(f"3/5 training on {len(cohort.split('train').cases)} cases")
    config.seed = seed
    config.data.store, config.data.cohort = str(out / "store"), str(table)
    train(config, out / "run")
    test = cohort.split("test").rows
    say(f"4/5 predicting {len(test)} held-out cases")
    predict = [PredictJob(row.slide_id, row.case_id, row.path) for row in test if row.path]
    predict_slides(Predictor(out / "run"), predict, out)
    say("5/5 validating")
    metrics = validate(out / "predictions.csv", table, out, truth=out / "slides", seed=seed)
    accuracy = metrics["statistics"]["balanced_accuracy"]
    attention = metrics["attention"]["immune and stromal"]["mean AUROC"]
    say(
        f"held-out balanced accuracy {accuracy['value']:.3f} ({accuracy['ci_low']:.3f} to {accuracy['ci_high']:.3f}), "
        f"attention on the truth {attention:.3f}: synthetic slides, no evidence about patients"
    )
    say(f"look at {out / 'report.html'} and {out / 'metrics.json'}; heatmaps are in {out / 'heatmaps'}")
    return metrics
