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
from dataclasses import asdict, dataclass
from pathlib import Path

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


def peak_memory_mib(children: bool = False) -> float:
    """The largest resident memory so far of this process (or of its largest ended child), in MiB."""
    who = resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF
    return resource.getrusage(who).ru_maxrss / 1024


def record(name: str, command: str, rows: list[Row] | list[dict], note: str = "") -> None:
    """Prints the rows and writes them to tools/results/NAME.json with machine, versions and date.

    Rows are figures (`Row`) or, where words belong in the table, dictionaries with the same keys each.
    """
    result = {
        "name": name,
        "command": command,
        "date": datetime.date.today().isoformat(),
        "machine": _machine(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "note": note,
        "rows": [asdict(row) if isinstance(row, Row) else row for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    Console().print(table([result]))


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
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}"


def page(results: list[dict]) -> str:
    """docs/benchmarks.md as text."""
    parts = [
        "# Benchmarks",
        "",
        "Every figure is printed by the command above its table, and this page is written from `tools/results/*.json`"
        " by `make bench`. Slides painted by `crcjax.slides.painter` are synthetic: their accuracies say that the software"
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
    """Runs every quick benchmark beside this file, then prints one table and writes docs/benchmarks.md."""
    tools = Path(__file__).parent
    for script in sorted(tools.glob("bench_*.py")):
        subprocess.run([sys.executable, str(script)], check=True)
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    Console().print(table([result for result in results if "measure" in result["rows"][0]]))
    (tools.parent / "docs" / "benchmarks.md").write_text(page(results))


if __name__ == "__main__":
    main()
