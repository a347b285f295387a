"""A worker's engine serves case after case: nothing is compiled for a case, and an interrupted one disturbs no other."""

import threading
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from crcjax.data.cohort import load_cohort
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.runs.bundle_export import export_bundle
from crcjax.serve.worker import WorkerSettings, bundle_predictor
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

pytestmark = pytest.mark.system


class _Interruption(BaseException):
    pass


def _engine_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith(("decode", "encoder"))}


def test_cases_of_any_size_share_one_engine_and_compile_nothing(
    run: Path, painted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = export_bundle([run], tmp_path / "bundle").path
    before = _engine_threads()
    predict: Callable = bundle_predictor(WorkerSettings("w", str(tmp_path), str(bundle), threads=1))
    threads = _engine_threads()
    assert threads > before
    small = [Path(str(row.path)) for row in load_cohort(painted / "cohort.csv", None).rows[-2:]]
    # More regions than those of the slide by which the worker was prepared: its bag has another length.
    large = paint_slide(tmp_path / "large.svs", SlideSpec("stromal", 1, size_px=(1024, 1024), mpp=1.0))
    expected = {
        row.slide_id: row.probs
        for row in predict_slides(
            Predictor(run), [PredictJob(path.stem, path.stem, path) for path in (*small, large)], tmp_path / "expected"
        )
    }

    def result(name: str, *paths: Path, progress: Callable = lambda *_: None) -> list[dict]:
        slides = [{"content": path.stem, "path": str(path), "mpp": None, "site": ""} for path in paths]
        return predict({"slides": slides}, tmp_path / name, progress)["slides"]

    with jax.log_compiles(), caplog.at_level("WARNING", "jax"):
        for number, paths in enumerate(([small[0]], [large], small)):
            for path, row in zip(paths, result(f"case {number}", *paths), strict=True):
                np.testing.assert_allclose(row["probs"], expected[path.stem], rtol=0, atol=1e-6)
    assert not [text for text in caplog.messages if "XLA compilation" in text]
    assert _engine_threads() == threads

    def interrupt(fraction: float, _stage: str) -> None:
        if fraction > 0:
            raise _Interruption

    with pytest.raises(_Interruption):
        result("interrupted", *small, progress=interrupt)
    assert not _engine_threads() & threads
    (row,) = result("next", large)
    np.testing.assert_allclose(row["probs"], expected["large"], rtol=0, atol=1e-6)
