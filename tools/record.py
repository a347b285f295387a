"""One form for every benchmark: a table on the terminal, and JSON from which docs/benchmarks.md is built."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "flax", "numpy", "tensorstore", "openslide-bin", "imagecodecs", "tifffile")


@dataclass(frozen=True)
class Row:
    """One measured figure; `ratio` is value over the value of `against`, measured in the same run."""

    measure: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""


def peak_memory_mib() -> float:
    """The largest resident memory so far of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def shared_memory_mib(processes: list[psutil.Process]) -> float:
    """The memory of processes together, what they share counted once, in MiB. Slow: some ms each."""
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def largest_worker_mib(processes: list[psutil.Process]) -> float:
    """The largest resident memory that one of the processes but the first ever had, in MiB: the kernel's own mark."""
    marks = [
        Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[:1] for process in processes
    ]
    return max((int(mark) / 1024 for found in marks[1:] for mark in found), default=0.0)


class PeakMemory:
    """The largest, `mib`, that a function found of this process and all below it while the block ran, `every_s` seconds."""

    def __init__(self, find: Callable[[list[psutil.Process]], float], every_s: float):
        self._find, self._every_s = find, every_s

    def __enter__(self) -> PeakMemory:
        self.mib = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        here = psutil.Process()
        while not self._stop.wait(self._every_s):
            with suppress(psutil.Error, OSError):  # one of them ended meanwhile
                self.mib = max(self.mib, self._find([here, *here.children(recursive=True)]))


def record(name: str, command: str, rows: list[Row] | list[dict], note: str = "") -> None:
    """Prints the rows, writes them to tools/results/NAME.json with machine, versions and date, and the page anew.

    On a GPU the name is NAME_gpu. Rows are figures (`Row`) or, where words belong in the table, dictionaries with the same keys each.
    """
    result = {
        "name": (name := _named(name)),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "note": note,
        "rows": [asdict(row) if isinstance(row, Row) else row for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS.parents[1] / "docs" / "benchmarks.md").write_text(page(_results()))
    Console().print(table([result]))


def earlier_rows(name: str) -> list[dict]:
    """The rows recorded last under a name: a benchmark that is run in pieces keeps those of its other pieces."""
    path = RESULTS / f"{_named(name)}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _named(name: str) -> str:
    return f"{name}_gpu" if _gpu() else name


def _gpu() -> str:
    """What GPU JAX uses, if any."""
    import jax  # not above: the worker processes of benchmarks import this file, and would hold JAX too

    return "" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def _results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def table(results: list[dict]) -> Table:
    """The rows of results that share their columns as one table."""
    shown = Table("benchmark", *results[0]["rows"][0])
    for result in results:
        for row in result["rows"]:
            shown.add_row(result["name"], *map(_cell, row.values()))
    return shown


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _machine() -> str:
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    device = f"one {_gpu()}, " if _gpu() else ""
    return f"{device}{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


def page(results: list[dict]) -> str:
    """docs/benchmarks.md as text."""
    parts = [
        "# Benchmarks",
        "",
        "Every figure is printed by the command above its table, and this page is written from `tools/results/*.json`"
        " whenever one runs. Slides painted by `crcjax.slides.synthetic.painter` are synthetic: their accuracies say that the software"
        " works, not that it works on patients.",
    ]
    for result in results:
        parts += ["", f"## {result['name']}", "", f"`{result['command']}` · {result['date']} · {result['machine']} · "]
        parts[-1] += ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        if result["note"]:
            parts += ["", result["note"]]
        columns = list(result["rows"][0])
        parts += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        parts += [f"| {' | '.join(map(_cell, row.values()))} |" for row in result["rows"]]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Runs every quick benchmark beside this file, then prints one table."""
    for script in sorted(Path(__file__).parent.glob("bench_*.py")):
        subprocess.run([sys.executable, str(script)], check=True)
    Console().print(table([result for result in _results() if "measure" in result["rows"][0]]))


if __name__ == "__main__":
    main()
