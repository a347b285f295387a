"""crcjax-edge beside crcjax: sizes, start, speed, memory, and the classes that smaller weights change.

    python tools/bench_edge.py                    a painted cohort, and a model that was trained for two steps
    python tools/bench_edge.py --run OUT/RUN OUT/cohort.csv --slides "mosaics of real tissue"

The second predicts the slides of a cohort's CSV file by a trained run; OUT is that of tools/real_mosaics.py, for example.

The ways of prediction are processes of this machine's Python; those by ONNX Runtime are of the command of crcjax-edge.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from campaign_predict import MPP, SIZE_PX, trained_run
from packaging.requirements import Requirement
from record import record

from crcjax.data.cohort import load_cohort
from crcjax.predict.export_model import MARGIN, export_model, same_class
from crcjax.predict.graph_weights import WEIGHTS
from crcjax.predict.onnx_ensemble import open_onnx
from crcjax.predict.predictor import Predictor
from crcjax.slides.synthetic.painter import paint_cohort
from crcjax.validation.load_predictions import load_predictions

ROOT = Path(__file__).parents[1]
TIMES, BATCHES, POLL_S, PAINTED = 3, 5, 0.02, {"test": 6}
JAX = "crcjax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("cohort", type=Path, nargs="?")
    parser.add_argument("--slides", default="slides", help="what the slides of the cohort are")
    given = parser.parse_args()
    if bool(given.run) != bool(given.cohort):
        parser.error("give --run and a cohort, or neither")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = given.run or trained_run(folder)
        cohort = given.cohort or paint_cohort(folder / "slides", PAINTED, size_px=SIZE_PX, mpp=MPP)
        rows, slides, decided = measured(run, cohort, folder)
    model = "the model of a trained run" if given.run else "a model that was trained for two steps"
    kind = given.slides if given.run else "painted slides"
    about = (
        f"Prediction without JAX by crcjax-edge, with weights as float32, float16 and int8, compared with crcjax\n\n"
        f"{slides} {kind}, predicted by {model}. {decided} have a margin above {MARGIN} between the two largest probabilities.\n\n"
        f"* start: from the start of the command to the end of the first slide, median of {TIMES} processes. Of crcjax, the "
        "programs are compiled already.\n"
        f"* tiles/s: the encoder alone, in chunks of its own size, median of {BATCHES}.\n"
        "* difference: the largest of any probability of any slide from that of crcjax. classes changed: among the slides with "
        "a margin above the limit.\n"
        "* installed: all packages that the distribution requires, without extras."
    )
    command = "python tools/bench_edge.py"
    if given.run:
        command += f' --run OUT/{given.run.name} OUT/{given.cohort.name} --slides "{given.slides}"'
    record("edge", command, rows, about)


def measured(run: Path, cohort: Path, folder: Path) -> tuple[list[dict], int, int]:
    """The rows, the number of slides, and how many of them have a margin above MARGIN."""
    first_slide = next(row.path for row in load_cohort(cohort, None).rows if row.path)
    models: dict[str, tuple[list[str], Predictor, float | None]] = {
        JAX: (["-m", "crcjax.cli", "predict", "--run", str(run)], Predictor(run), None)
    }
    for weights in WEIGHTS:
        exported = folder / weights
        export_model([run], exported, ("onnx",), weights)
        size = sum(file.stat().st_size for file in exported.glob("*.onnx")) / 2**20
        command = ["-m", "crcjax.cli_edge", "predict", "--onnx", str(exported)]
        models[f"crcjax-edge, {weights}"] = command, Predictor(open_onnx(exported)), size
    installed = {
        JAX: installed_mib(ROOT / "pyproject.toml"),
        "crcjax-edge": installed_mib(ROOT / "launch" / "edge" / "pyproject.toml"),
    }
    rows, probs = [], {}
    for name, (command, predictor, size) in models.items():
        out = folder / "out"
        _, peak_mib = seconds_and_mib([*command, "--cohort", str(cohort), "--out", str(out)], out)
        probs[name] = np.array(
            [row.probs for row in load_predictions(out / "predictions.csv").rows if row.has_prediction]
        )
        start = statistics.median(
            seconds_and_mib([*command, str(first_slide), "--out", str(out)], out)[0] for _ in range(TIMES)
        )
        changed = [not same_class(*pair) for pair in zip(probs[JAX], probs[name], strict=True)]
        rows.append(
            {
                "way": name,
                "graphs, MiB": size,
                "installed, MiB": installed[name.partition(",")[0]],
                "start, s": start,
                "tiles/s": tiles_per_s(predictor),
                "peak memory, MiB": peak_mib,
                "difference": float(np.abs(probs[name] - probs[JAX]).max()),
                "classes changed": sum(changed),
            }
        )
    second, best = np.sort(probs[JAX], axis=1)[:, -2:].T
    return rows, len(best), int((best - second > MARGIN).sum())


def seconds_and_mib(command: Sequence[str], out: Path) -> tuple[float, float]:
    """The wall time and the peak memory of a command that writes to a new folder."""
    shutil.rmtree(out, ignore_errors=True)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.DEVNULL)
    peak_kib = 0
    # The kernel's account of an ended process, `ru_maxrss`, also counts the process that started it.
    while process.poll() is None:
        peak = Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[:1]
        peak_kib = max(peak_kib, *map(int, peak), 0)
        time.sleep(POLL_S)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: status {process.returncode}")
    return time.monotonic() - start, peak_kib / 1024


def tiles_per_s(predictor: Predictor) -> float:
    """The speed of the encoder with random tiles."""
    (member, *_), tiling = predictor.members, predictor.tiling
    shape = member.chunk, tiling.slots, tiling.tile_px, tiling.tile_px, 3
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    def seconds() -> float:
        start = time.monotonic()
        np.asarray(member.encode(pixels, [None], [member.chunk]))
        return time.monotonic() - start

    seconds()
    return member.chunk * tiling.slots / statistics.median(seconds() for _ in range(BATCHES))


def installed_mib(pyproject: Path) -> float:
    """The size of all packages that a distribution requires, as they are installed here."""
    waiting = tomllib.loads(pyproject.read_text())["project"]["dependencies"]
    sizes: dict[str, int] = {}
    while waiting:
        required = Requirement(waiting.pop())
        if required.name in sizes or (required.marker and not required.marker.evaluate({"extra": ""})):
            continue
        distribution = importlib.metadata.distribution(required.name)
        files = (Path(str(file.locate())) for file in distribution.files or ())
        sizes[required.name] = sum(file.stat().st_size for file in files if file.is_file())
        waiting += distribution.requires or []
    return sum(sizes.values()) / 2**20


if __name__ == "__main__":
    main()
