"""The demo: a synthetic cohort from slide files to the report. A killed demo resumes; finished work is not repeated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict
from rich.console import Console

from crcjax.config import get_config
from crcjax.data.cohort import Cohort, load_cohort
from crcjax.errors import CrcjaxError, writing
from crcjax.parallel.process_group import ProcessGroup
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.progress import progress_bar
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.slides.tiling.plan import TilingParams
from crcjax.train.loop import train
from crcjax.validation.report import validate

SIZE_PX = (3072, 2560)  # at 0.5 µm per pixel
# At 5x (2 µm per pixel) a tile covers the same 256 µm as one of 256 px at 10x, with a quarter of the pixels.
TILING = TilingParams(("5x",), tile_px=128)
DEFAULT_SIZE = "full"


@dataclass(frozen=True)
class DemoSize:
    """How large a demo is: slides of each split, their size in pixels, and training steps."""

    cases: dict[str, int] = field(default_factory=lambda: {"train": 120, "val": 24, "test": 36})
    size_px: tuple[int, int] = SIZE_PX
    steps: int = 300
    eval_every: int = 50


SIZES = {
    "full": DemoSize(),
    "small": DemoSize({"train": 36, "val": 9, "test": 18}, (2048, 1792), steps=100),
}


def demo_config(size: str = DEFAULT_SIZE) -> ConfigDict:
    """The demo's config: the default config, made small enough for two CPU cores."""
    config = get_config()
    config.data.regions_per_bag = 12
    config.data.batch_size = 8
    config.data.region_buckets = (64,)
    config.optimizer.learning_rate = 2e-3
    config.train.steps = SIZES[size].steps
    config.train.eval_every = SIZES[size].eval_every
    return config


def run_demo(
    out: Path,
    seed: int = 0,
    size: str | DemoSize = DEFAULT_SIZE,
    *,
    config: ConfigDict | None = None,
    console: Console | None = None,
) -> dict:
    """Runs the demo in a folder, or what is missing of it.

    Args:
      out: the folder; it may hold an interrupted demo of the same seed and size.
      seed: decides the synthetic cohort and the model's initial parameters.
      size: a name of `SIZES`, or sizes of your own.
      config: in place of `demo_config`.
      console: where progress is shown; by default standard error.

    Returns:
      The content of metrics.json.

    Raises:
      CrcjaxError: a slide cannot be tiled, the folder cannot be written, or it holds a demo of another size.
    """
    config = config or demo_config(size if isinstance(size, str) else DEFAULT_SIZE)
    size = SIZES[size] if isinstance(size, str) else size
    console = console or Console(stderr=True, highlight=False, soft_wrap=True)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    table = _paint(out, seed, size, console)
    cohort = load_cohort(table, config.data.classes)
    _tile(cohort, out / "store", console)
    config.seed = seed
    config.data.store, config.data.cohort = str(out / "store"), str(table)
    _train(config, out / "run", console)
    _predict(cohort.split("test"), out, console)
    with _stage(console, "5/5 validate", 1) as advance:
        metrics = validate(out / "predictions.csv", table, out, truth=out / "slides", seed=seed)
        advance()
    accuracy = metrics["statistics"]["balanced_accuracy"]
    warnings = "".join(f"; {warning}" for warning in accuracy["warnings"])
    attention = metrics["attention"]["all subtypes"]["mean AUROC"]
    attention_text = "not determined" if attention is None or attention != attention else f"{attention:.3f}"
    console.print(
        f"Balanced accuracy on {metrics['flow']['cases evaluated']} held-out cases: {accuracy['value']:.3f} "
        f"(95 % interval {accuracy['ci_low']:.3f} to {accuracy['ci_high']:.3f}{warnings}). AUROC of the attention for the "
        f"tissue that shows the subtype: {attention_text}. The slides are synthetic: this is no evidence about patients.",
        markup=False,
    )
    console.print(
        f"Report: {out / 'report.html'}  Metrics: {out / 'metrics.json'}  Heatmaps: {out / 'heatmaps'}", markup=False
    )
    return metrics


def _paint(out: Path, seed: int, size: DemoSize, console: Console) -> Path:
    with _stage(console, "1/5 paint", sum(size.cases.values())) as advance:
        return paint_cohort(out, size.cases, seed=seed, size_px=size.size_px, on_slide=advance)


def _tile(cohort: Cohort, store: Path, console: Console) -> None:
    jobs = [TileJob(row.slide_id, row.path) for row in cohort.rows if row.path]
    with _stage(console, "2/5 tile", len(jobs)) as advance:
        outcomes = tile_slides(jobs, store, TILING, on_outcome=lambda outcome: advance())
    failed = [outcome for outcome in outcomes if not outcome.succeeded]
    if failed:
        raise CrcjaxError(f"{failed[0].path}: {failed[0].reason}")


def _train(config: ConfigDict, run: Path, console: Console) -> None:
    steps = config.train.steps
    with _stage(console, "3/5 train", steps) as advance:
        train(config, run, _WatchedGroup(advance))


def _predict(test: Cohort, out: Path, console: Console) -> None:
    jobs = [PredictJob(row.slide_id, row.case_id, row.path) for row in test.rows if row.path]
    with _stage(console, "4/5 predict", len(jobs)) as advance:
        predict_slides(Predictor(out / "run"), jobs, out, on_row=lambda row: advance())


class _WatchedGroup(ProcessGroup):
    """A single process that shows its finished training steps."""

    def __init__(self, show: Callable[[int], None]):
        super().__init__()
        self._show = show

    def report_progress(self, step: int, phase: str) -> None:
        super().report_progress(step, phase)
        self._show(max(step - 1, 0))


@contextmanager
def _stage(console: Console, name: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar. Yields a function that counts one more item, or sets the count."""
    with progress_bar(console) as bar:
        task = bar.add_task(name, total=total)

        def advance(completed: int | None = None) -> None:
            bar.update(task, completed=bar.tasks[0].completed + 1 if completed is None else completed)

        yield advance
        bar.update(task, completed=total)
