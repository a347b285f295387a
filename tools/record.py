"""One format for every benchmark: a table on the terminal, and a JSON file from which docs/benchmarks.md is built."""

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
    """One measured figure; `ratio` is `value` divided by the value of `against`, measured in the same run."""

    measure: str
    value: float
    unit: str
    ratio: float | None = None
    against: str = ""


def peak_memory_mib() -> float:
    """The peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def shared_memory_mib(processes: list[psutil.Process]) -> float:
    """The memory of all processes together, with shared pages counted once, in MiB. Takes some milliseconds per process."""
    return sum(process.memory_full_info().pss for process in processes) / 2**20


def largest_worker_mib(processes: list[psutil.Process]) -> float:
    """The largest peak resident memory of a process other than the first, in MiB, as the kernel records it."""
    peaks_kib = [
        Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[:1] for process in processes
    ]
    return max((int(peak) / 1024 for peaks in peaks_kib[1:] for peak in peaks), default=0.0)


class PeakMemory:
    """Samples the memory of this process and its descendants while the block runs.

    Args:
      measure: the memory of a list of processes, in MiB.
      every_s: seconds between two samples.

    Attributes:
      mib: the largest sample.
    """

    def __init__(self, measure: Callable[[list[psutil.Process]], float], every_s: float):
        self._measure, self._every_s = measure, every_s

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
            # A descendant may end meanwhile.
            with suppress(psutil.Error, OSError):
                self.mib = max(self.mib, self._measure([here, *here.children(recursive=True)]))


def record(name: str, command: str, rows: list[Row] | list[dict], about: str) -> None:
    """Prints the rows, writes them to tools/results/NAME.json with machine, versions and date, and rebuilds the page.

    Args:
      name: the name of the benchmark; on a GPU, `_gpu` is appended.
      command: the command that runs it.
      rows: figures or, if the table needs text, dictionaries with the same keys.
      about: Markdown. Its first line says what is measured; the page's contents repeat it.
    """
    result = {
        "name": (name := _named(name)),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "note": about,
        "rows": [asdict(row) if isinstance(row, Row) else row for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS.parents[1] / "docs" / "benchmarks.md").write_text(page(_results()))
    Console().print(table([result]))


def earlier_rows(name: str) -> list[dict]:
    """The rows recorded last under a name. A benchmark that runs in pieces keeps the rows of its other pieces."""
    path = RESULTS / f"{_named(name)}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def _named(name: str) -> str:
    return f"{name}_gpu" if _gpu() else name


def _gpu() -> str:
    """The name of the GPU that JAX uses, or an empty string."""
    # Imported here because worker processes of benchmarks import this file and do not need JAX.
    import jax

    return "" if jax.default_backend() == "cpu" else jax.devices()[0].device_kind


def _results() -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]


def table(results: list[dict]) -> Table:
    """One table of the rows of all results, which must have the same columns."""
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
    lines = [
        "# Benchmarks",
        "",
        "The command above a table prints its figures. `tools/record.py` rebuilds this page from `tools/results/*.json` whenever"
        " a benchmark runs. All figures of a table come from the machine that its section names; other sections may name other"
        " machines.",
        "",
        "* `ratio` is the value divided by that of `against`, measured in the same run.",
        "* Slides painted by `crcjax.slides.synthetic` are synthetic. Accuracies on them show that the software works, not that"
        " it works on patients.",
        "",
        "| table | measures |",
        "|---|---|",
    ]
    lines += [f"| [{result['name']}](#{result['name']}) | {_subject(result)} |" for result in results]
    for result in results:
        versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        lines += ["", f"## {result['name']}", "", result["note"], ""]
        lines += [f"`{result['command']}` · {result['date']} · {result['machine']} · {versions}"]
        columns = list(result["rows"][0])
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(map(_cell, row.values()))} |" for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _subject(result: dict) -> str:
    return result["note"].partition("\n")[0].removesuffix(".")


def main() -> None:
    """Runs every benchmark `bench_*.py`, then prints one table."""
    for script in sorted(Path(__file__).parent.glob("bench_*.py")):
        subprocess.run([sys.executable, str(script)], check=True)
    Console().print(table([result for result in _results() if "measure" in result["rows"][0]]))


if __name__ == "__main__":
    main()
