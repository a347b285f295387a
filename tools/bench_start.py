"""The time from the start of `crcjax predict` to the prediction of one small slide, with and without compiled programs on disk."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from campaign_predict import MPP, SIZE_PX, trained_run
from record import Row, record

from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

TIMES = 3


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = trained_run(folder)
        slide = paint_slide(folder / "slide.svs", SlideSpec("immune", 0, size_px=SIZE_PX, mpp=MPP))
        # The tool's user may have a folder of compiled programs; the command gets one of its own.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
        environment["XDG_CACHE_HOME"] = str(folder / "cache")

        def seconds(*command: str) -> float:
            start = time.monotonic()
            subprocess.run([sys.executable, *command], env=environment, check=True, stderr=subprocess.DEVNULL)
            return time.monotonic() - start

        def prediction() -> float:
            out = folder / "out"
            shutil.rmtree(out, ignore_errors=True)
            return seconds("-m", "crcjax.cli", "predict", "--run", str(run), str(slide), "--out", str(out))

        imports = statistics.median(seconds("-c", "import crcjax.predict.predict_slides") for _ in range(TIMES))
        cold_times, warm_times = [], []
        for _ in range(TIMES):
            shutil.rmtree(folder / "cache", ignore_errors=True)
            cold_times.append(prediction())
            warm_times.append(prediction())
        stored = sum(path.stat().st_size for path in (folder / "cache").rglob("*") if path.is_file())
    cold, warm = statistics.median(cold_times), statistics.median(warm_times)
    rows = [
        Row("nothing compiled before", cold, "s"),
        Row("compiled programs on disk", warm, "s", warm / cold, "nothing compiled before"),
        Row("of these, Python and imports", imports, "s", imports / warm, "compiled programs on disk"),
        Row("size of the compiled programs", stored / 2**20, "MiB"),
    ]
    about = (
        "Time from the start of crcjax predict to the end of one small slide, with and without compiled programs on disk.\n\n"
        f"The demo's model at 10x; a synthetic slide of {SIZE_PX[0]} x {SIZE_PX[1]} px. Medians of {TIMES} processes."
    )
    record("start", "python tools/bench_start.py", rows, about)


if __name__ == "__main__":
    main()
