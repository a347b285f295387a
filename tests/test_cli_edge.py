"""The wheel crcjax-edge predicts with the packages that it declares and without JAX, as crcjax predict does."""

import csv
import importlib.metadata
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def edge(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the wheel, and links to the packages that it declares, and no others."""
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("edge")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "--wheel-dir", str(folder), str(ROOT / "launch" / "edge")], check=True)
    (wheel,) = folder.glob("crcjax_edge-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    (folder / "packages").mkdir()
    (distribution,) = importlib.metadata.distributions(path=[str(folder / "installed")])
    for name in _required_by(distribution):
        for file in importlib.metadata.distribution(name).files or ():
            link = folder / "packages" / file.parts[0]
            if file.parts[0] not in ("..", "__pycache__") and not link.exists():
                link.symlink_to(importlib.metadata.distribution(name).locate_file(file.parts[0]))
    return {**os.environ, "PYTHONPATH": f"{folder / 'installed'}{os.pathsep}{folder / 'packages'}"}


def _required_by(distribution: importlib.metadata.Distribution) -> set[str]:
    """The names of all packages that a distribution requires, and of those that these require."""
    names: set[str] = set()
    waiting = [distribution]
    while waiting:
        for text in waiting.pop().requires or ():
            required = Requirement(text)
            if (not required.marker or required.marker.evaluate({"extra": ""})) and required.name not in names:
                names.add(required.name)
                waiting.append(importlib.metadata.distribution(required.name))
    return names


def _python(edge: dict[str, str], folder: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Runs Python without the packages that are installed for these tests."""
    command = [sys.executable, "-S", *map(str, arguments)]
    return subprocess.run(command, env=edge, cwd=folder, capture_output=True, text=True)


def _rows(out: Path) -> list[dict[str, str]]:
    with open(out / "predictions.csv", newline="") as table:
        return list(csv.DictReader(table))


def test_the_wheel_predicts_a_slide_as_the_run_does(
    edge: dict[str, str], exported: Path, run: Path, painted: Path, tmp_path: Path, crcjax: Callable
) -> None:
    slide = painted / "slides" / "synthetic-0015.svs"
    done = _python(
        *(edge, tmp_path, "-m", "crcjax.cli_edge", "predict", slide),
        *("--onnx", exported, "--out", tmp_path / "edge", "--cohort", painted / "cohort.csv"),
    )
    assert done.returncode == 0, done.stderr
    assert "1 of 1 slides predicted" in done.stderr
    options = ("--out", tmp_path / "run", "--cohort", painted / "cohort.csv")
    assert crcjax("predict", slide, "--run", run, *options).returncode == 0
    (actual,), (expected,) = _rows(tmp_path / "edge"), _rows(tmp_path / "run")
    assert actual.keys() == expected.keys()
    # The code and the graphs are part of the pipeline; durations differ.
    for name in set(expected) - {"pipeline_id"}:
        if name.startswith("seconds"):
            continue
        try:
            np.testing.assert_allclose(float(actual[name]), float(expected[name]), atol=1e-4, err_msg=name)
        except ValueError:
            assert actual[name] == expected[name], name
    assert (tmp_path / "edge" / "heatmaps" / "synthetic-0015.png").exists()


def test_every_module_of_the_wheel_loads_without_jax_and_a_run_is_refused(
    edge: dict[str, str], painted: Path, tmp_path: Path
) -> None:
    code = (
        "import importlib, pkgutil, sys, crcjax\n"
        "names = [module.name for module in pkgutil.walk_packages(crcjax.__path__, 'crcjax.')]\n"
        "for name in names: importlib.import_module(name)\n"
        "assert len(names) > 50 and importlib.util.find_spec('jax') is None\n"
        "sys.argv = ['crcjax', 'predict', '--run', 'run', '--out', 'out', 'slide.svs']\n"
        "crcjax.cli_edge.main()\n"
    )
    done = _python(edge, tmp_path, "-c", code)
    assert done.returncode == 2, done.stderr
    assert "--run and --bundle need JAX, which crcjax-edge leaves out" in done.stderr


def test_the_wheel_declares_the_versions_that_crcjax_declares() -> None:
    import tomllib

    edge, whole = (
        tomllib.loads((folder / "pyproject.toml").read_text())["project"] for folder in (ROOT / "launch" / "edge", ROOT)
    )
    declared = {*whole["dependencies"], *whole["optional-dependencies"]["onnx"]}
    assert set(edge["dependencies"]) <= declared
    assert edge["requires-python"] == whole["requires-python"]
