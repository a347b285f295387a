"""The repository keeps the promises of docs/architecture.md and CONTRIBUTING.md that a program can check."""

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "crcjax"
# What each room may import of the package, besides itself and `errors`.
MAY_IMPORT = {
    "errors": set(),
    "config": set(),
    "monitor": set(),
    "slides": set(),
    "validation": {"slides", "data"},
    "data": {"slides"},
    "models": set(),
    "train": {"config", "data", "models", "monitor", "slides"},
    "infer": {"validation", "data", "models", "monitor", "slides", "train"},
}


def _rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("crcjax."):
            rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.ImportFrom) and node.module == "crcjax":
            rooms |= {alias.name for alias in node.names} - {"__version__"}
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("crcjax.")}
    return rooms


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).glob("*.py"))
    assert files
    for path in files:
        assert _rooms_imported(path) <= MAY_IMPORT[room] | {room, "errors"}, path


def test_the_slides_floor_does_not_load_jax() -> None:
    code = "import sys, crcjax.slides.preprocess.tile_slides, crcjax.slides.synthetic.painter; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_benchmark_page_holds_what_the_results_hold() -> None:
    spec = importlib.util.spec_from_file_location("record", ROOT / "tools" / "record.py")
    record = importlib.util.module_from_spec(spec)
    sys.modules["record"] = record  # dataclasses look their module up
    spec.loader.exec_module(record)
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "tools" / "results").glob("*.json"))]
    assert (ROOT / "docs" / "benchmarks.md").read_text() == record.page(results)
