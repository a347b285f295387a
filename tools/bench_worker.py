"""Core-seconds per case in a worker of the service, and in the worker of earlier sources.

    python tools/bench_worker.py OUT [EARLIER]

EARLIER is a checkout of crcjax to compare with. OUT keeps the bundle and the slides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from campaign_predict import trained_run
from record import Row, record

from crcjax.runs.bundle_export import export_bundle
from crcjax.slides.synthetic.painter import SlideSpec, paint_slide

# The longer side of each case's slide, in px at 1 µm per pixel: the bags of the first and the third have other lengths.
SIDES_PX = (800, 820, 3000, 840, 860)
ROOT = Path(__file__).parents[1]
CASES = """
import json, sys, time
from pathlib import Path
start = time.process_time()
from crcjax.serve.worker import WorkerSettings, bundle_predictor
out, bundle, slides = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
predict = bundle_predictor(WorkerSettings("w", str(out), bundle))
seconds = [time.process_time() - start]
for number, slide in enumerate(slides):
    start = time.process_time()
    case = {"slides": [{"content": Path(slide).stem, "path": slide, "mpp": None, "site": ""}]}
    predict(case, out / str(number), lambda *_: None)
    seconds.append(time.process_time() - start)
print(json.dumps(seconds))
"""


def main(out: Path, earlier: Path | None) -> None:
    bundle = out / "bundle"
    if not bundle.exists():
        export_bundle([trained_run(out / "training")], bundle)
    slides = [
        paint_slide(out / f"{side}.svs", SlideSpec("immune", side, size_px=(side, 4 * side // 5), mpp=1.0))
        for side in SIDES_PX
    ]
    versions = {"before": earlier, "now": ROOT} if earlier else {"now": ROOT}
    times: dict[str, list[list[float]]] = {name: [] for name in versions}
    # In turns, so that both have the same machine. The first process of each compiles for the disk.
    for number in range(2):
        for name, sources in versions.items():
            environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
            environment |= {"PYTHONPATH": str(sources), "XDG_CACHE_HOME": str(out / f"cache-{name}")}
            command = [sys.executable, "-c", CASES, str(out / f"{name}-{number}"), str(bundle), *map(str, slides)]
            # Python looks for packages in the current folder first.
            done = subprocess.run(command, env=environment, cwd=out, check=True, stdout=subprocess.PIPE, text=True)
            times[name].append(json.loads(done.stdout.splitlines()[-1]))
    rows = []
    for number, kind in enumerate(("nothing on disk", "programs on disk")):
        for name in versions:
            first = times[next(iter(versions))][number]
            for stage, value, before in zip(_stages(), times[name][number], first, strict=True):
                ratio = (value / before, "before") if name == "now" and earlier else (None, "")
                rows.append(Row(f"{kind}, {name}: {stage}", value, "core-s", *ratio))
    about = (
        "Core-seconds per case in one worker process of the service, from the claimed case to its result.\n\n"
        "* Core-seconds, because other work on the machine hardly changes them.\n"
        f"* Cases of one slide with {', '.join(map(str, SIDES_PX))} px in their order; the demo's model at 10x. One process with"
        " nothing on disk, and one with compiled programs.\n"
        "* `before` is the worker without a synthetic case before it is ready, and with a new engine for every case."
    )
    record("worker", "python tools/bench_worker.py OUT EARLIER", rows, about)


def _stages() -> list[str]:
    names = {0: "first case", 2: "third case, of another length"}
    cases = [names.get(number, f"case {number + 1}") for number in range(len(SIDES_PX))]
    return ["start until the worker is ready", *cases]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None)
