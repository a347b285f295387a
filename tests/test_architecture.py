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
# From the ground up: a room imports only from rooms before it. A module belongs to the longest name that it starts with.
ROOMS = (
    "errors", "environment", "progress", "pages", "config_names", "config", "config_check",
    "slides.wsi", "slides.jobs", "slides.tiling", "slides.deidentify", "slides.synthetic", "slides.store", "slides.stain",
    "slides.preprocess", "slides.interchange",
    "models", "models.encoders", "models.aggregators", "models.mil",
    "monitor", "encryption", "data", "parallel", "validation", "validation.study", "runs", "audit", "predict", "pictures", "train", "lifecycle", "launching", "serve",
    "demo", "doctor", "main", "api", "cli",
)  # fmt: skip
# Rooms that could be used without the ones before them, and stay so.
IMPORTS_ERRORS_ALONE = ("config_names", "encryption", "launching", "models", "monitor", "slides.jobs", "slides.wsi")
# Validation reads tables of predictions from any system.
NEVER_IMPORTED_BY = {"validation": ("models", "parallel", "monitor"), "validation.study": ("models", "parallel")}


def room_of(module: str) -> str:
    """The room of `crcjax.a.b.c`. Raises KeyError for a module outside every room."""
    name = module.removeprefix("crcjax.")
    # Groups of commands have files of their own beside cli.py.
    name = "cli" if name.startswith("cli_") else name
    rooms = [room for room in ROOMS if name == room or name.startswith(f"{room}.")]
    if not rooms:
        raise KeyError(f"{module} is in no room of ROOMS")
    return max(rooms, key=len)


def imported_rooms(source: str) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "crcjax":
            if node.module in ("crcjax", "crcjax.slides", "crcjax.models"):  # their names may be rooms
                modules |= {f"{node.module}.{alias.name}" for alias in node.names if alias.name != "__version__"}
            else:
                modules.add(node.module)
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.startswith("crcjax.")}
    return {room_of(module) for module in modules}


def forbidden_imports(room: str, source: str) -> set[str]:
    """The rooms that a module of `room` imports and may not."""
    above = set(ROOMS[ROOMS.index(room) + 1 :])
    kept_out = {other for other in ROOMS for out in NEVER_IMPORTED_BY.get(room, ()) if other.startswith(out)}
    if room in IMPORTS_ERRORS_ALONE:
        kept_out = set(ROOMS) - {"errors", room}
    return imported_rooms(source) & (above | kept_out)


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, packages by their own."""
    paths = {
        path: ".".join(("crcjax", *path.relative_to(PACKAGE).with_suffix("").parts)) for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for path, name in paths.items()}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_from_rooms_below_it(room: str) -> None:
    wings = ("crcjax", "crcjax.slides")
    paths = [path for name, path in modules().items() if name not in wings and room_of(name) == room]
    assert paths
    found = {str(path): forbidden_imports(room, path.read_text()) for path in paths}
    assert {path: rooms for path, rooms in found.items() if rooms} == {}


def test_an_upward_or_sideways_import_is_found() -> None:
    assert forbidden_imports("data", "from crcjax.train.loop import train") == {"train"}
    assert forbidden_imports("slides.tiling", "def plan():\n    import crcjax.slides.store.locks") == {"slides.store"}
    assert forbidden_imports("models.aggregators", "from crcjax.models import mil") == {"models.mil"}
    assert forbidden_imports("monitor", "from crcjax.config import get_config") == {"config"}
    assert forbidden_imports("validation", "from crcjax.models.encoders.vit import ViT") == {"models.encoders"}
    assert forbidden_imports("train", "from crcjax.data.bags import Bag\nimport crcjax.errors") == set()


def _table(heading: str) -> list[list[str]]:
    """The cells of the first table below a heading of docs/architecture.md, without its header."""
    section = (ROOT / "docs" / "architecture.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_page_lists_the_rooms_as_they_are() -> None:
    listed = [name.strip(" `") for room, *_ in _table("Rooms, from the ground up") for name in room.split(",")]
    assert tuple(listed) == ROOMS


def test_every_name_of_the_reference_design_has_its_place_or_is_not_built_yet() -> None:
    rows = _table("The reference design and this package")
    assert len(rows) == 10
    for name, place in rows:
        place = place.strip("`")
        if place == "not built yet":
            continue
        if not place.startswith("crcjax."):
            assert (ROOT / place).is_file(), name
            continue
        package, _, attribute = place.rpartition(".")
        assert place in modules() or attribute in _definitions(modules()[package]), name


def _definitions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_type_that_passes_between_rooms_is_made_in_its_room() -> None:
    for names, room, _ in _table("What passes between rooms"):
        paths = [path for module, path in modules().items() if module.startswith(f"crcjax.{room.strip('`')}")]
        defined = set().union(*(_definitions(path) for path in paths))
        assert {name.strip(" `") for name in names.split(",")} <= defined


def test_the_slides_floor_does_not_load_jax() -> None:
    code = "import sys, crcjax.slides.preprocess.tile_slides, crcjax.slides.synthetic.painter; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_prediction_of_exported_models_does_not_load_jax() -> None:
    code = "import sys, crcjax.predict.predict_slides, crcjax.predict.onnx_ensemble; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_benchmark_page_holds_what_the_results_hold() -> None:
    spec = importlib.util.spec_from_file_location("record", ROOT / "tools" / "record.py")
    record = importlib.util.module_from_spec(spec)
    sys.modules["record"] = record  # dataclasses look their module up
    spec.loader.exec_module(record)
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "tools" / "results").glob("*.json"))]
    assert (ROOT / "docs" / "benchmarks.md").read_text() == record.page(results)


def test_an_undefined_name_is_found_by_the_linter_and_an_axis_name_is_none(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text(
        "import numpy as np\nfrom jaxtyping import Float\n\n\n"
        'def mean(values: Float[np.ndarray, "region slot"]) -> Float[np.ndarray, " region"]:\n'
        "    return values.mean(axis=axis_of_slots)\n"
    )
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--config",
        str(ROOT / "pyproject.toml"),
        "--output-format=concise",
    ]
    done = subprocess.run([*command, str(planted)], capture_output=True, text=True)
    findings = [line for line in done.stdout.splitlines() if "planted.py" in line]
    assert len(findings) == 1
    assert "F821 Undefined name `axis_of_slots`" in findings[0]
