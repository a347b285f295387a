"""The time of a prediction from the slide file to the table, heatmap and attention file, and its stages."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
from record import Row, peak_memory_mib, record

from crcjax.data.cohort import load_cohort
from crcjax.demo import SIZE_PX, demo_config
from crcjax.predict.predict_slides import PredictJob, predict_slides
from crcjax.predict.predictor import Predictor
from crcjax.slides.preprocess.tile_slides import TileJob, tile_slides
from crcjax.slides.synthetic.painter import SlideSpec, paint_cohort, paint_slide
from crcjax.slides.tiling.plan import TilingParams
from crcjax.slides.wsi.slide import open_slide
from crcjax.train.loop import train

LARGE_PX = (12288, 8192)
STAND_IN_SLIDES, STAND_IN_S = 50, 0.4


def main() -> None:
    config = demo_config()
    config.train.steps, config.optimizer.warmup_steps = 2, 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = paint_cohort(folder, {"train": 9, "val": 3}, size_px=SIZE_PX)
        cohort = load_cohort(table, config.data.classes)
        tiles = [TileJob(row.slide_id, row.path) for row in cohort.rows if row.path]
        tile_slides(tiles, folder / "store", TilingParams(("10x",)))
        config.data.store, config.data.cohort = str(folder / "store"), str(table)
        train(config, folder / "run")
        large = paint_slide(folder / "large.svs", SlideSpec("immune", 0, size_px=LARGE_PX))
        predictor = Predictor(folder / "run")
        small = [PredictJob(job.slide_id, job.slide_id, job.path) for job in tiles]
        # The first call compiles.
        predict_slides(predictor, small[:1], folder / "first")
        start = time.monotonic()
        predict_slides(predictor, small[1:], folder / "small")
        seconds = (time.monotonic() - start) / len(small[1:])
        rows = [Row(f"{SIZE_PX[0]} x {SIZE_PX[1]} px, total", seconds, "s/slide")]
        predict_slides(predictor, [PredictJob("large", "large", large)], folder / "first")
        start = time.monotonic()
        predict_slides(predictor, [PredictJob("large", "large", large)], folder / "large")
        whole = time.monotonic() - start
        name = f"{LARGE_PX[0]} x {LARGE_PX[1]} px"
        rows.append(Row(f"{name}, total", whole, "s/slide"))
        with open_slide(large) as slide:
            prediction = predictor.predict(slide, threads=2)
        stages = {
            "plan": "opening, thumbnail, tissue segmentation",
            "read": "decoding, overlapped with encoding",
            "encode": "encoding after the last decoded tile",
            "pool": "pooling",
        }
        rows += [
            Row(f"{name}, {label}", prediction.seconds[stage], "s", prediction.seconds[stage] / whole, "total")
            for stage, label in stages.items()
        ]
        pictures = whole - sum(prediction.seconds.values())
        rows.append(Row(f"{name}, heatmap, attention and table", pictures, "s", pictures / whole, "total"))
        rows += stand_in_rows(predictor, folder)
    rows.append(Row("peak memory", peak_memory_mib(), "MiB"))
    about = (
        "Time of a prediction, from the slide file to the table, heatmap and attention file.\n\n"
        "Synthetic slides at 0.5 µm per pixel; the demo's model at 10x, compiled before; two threads decode."
    )
    record("predict", "python tools/bench_predict.py", rows, about)


def stand_in_rows(predictor: Predictor, folder: Path) -> list[Row]:
    """How long an encoder that uses no CPU waits for tiles of a cohort, the time between slides included.

    The encoder's model is replaced by a pause of fixed length, longer than the decoding of a chunk's tiles.
    """
    table = paint_cohort(folder / "stand-in", {"test": STAND_IN_SLIDES}, size_px=SIZE_PX)
    jobs = [PredictJob(row.slide_id, row.slide_id, Path(str(row.path))) for row in load_cohort(table, None).rows]
    start = time.monotonic()
    predict_slides(predictor, jobs, folder / "real encoder")
    real = time.monotonic() - start
    forward = predictor.members[0].forward
    busy: list[tuple[float, float]] = []
    features = np.zeros((forward.chunk, predictor.tiling.slots, predictor.members[0].feature_size), np.float32)

    class Pause:
        """Features that are there when the device, which does one thing after the other, has had its time."""

        def __init__(self) -> None:
            begin = max(time.monotonic(), busy[-1][1] if busy else 0.0)
            busy.append((begin, begin + STAND_IN_S))
            self.ready = begin + STAND_IN_S

        def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
            time.sleep(max(0.0, self.ready - time.monotonic()))
            return features

    forward._encode = lambda *_inputs: Pause()  # type: ignore[method-assign,assignment]
    predict_slides(predictor, jobs, folder / "stand-in encoder")
    elapsed = busy[-1][1] - busy[0][0]
    idle = round(elapsed - STAND_IN_S * len(busy), 3)
    name = f"{STAND_IN_SLIDES} slides of {SIZE_PX[0]} x {SIZE_PX[1]} px"
    return [
        Row(f"{name}, model of the demo", 3600 * len(jobs) / real, "slides/h"),
        Row(f"{name}, encoder of {1e3 * STAND_IN_S:.0f} ms a chunk", elapsed, "s"),
        Row(f"{name}, that encoder without work", idle, "s", idle / elapsed, "total"),
    ]


if __name__ == "__main__":
    main()
