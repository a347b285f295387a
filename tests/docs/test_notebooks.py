"""The notebooks are their Markdown pages without outputs, and run from the built wheel in a clean environment."""

import os
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_every_notebook_is_its_page_and_has_no_outputs() -> None:
    assert len(NOTEBOOKS) == 7
    assert [path.with_suffix(".md") for path in NOTEBOOKS] == sorted((ROOT / "docs" / "notebooks").glob("*.md"))
    for path in NOTEBOOKS:
        notebook, page = nbformat.read(path, 4), jupytext.read(path.with_suffix(".md"))
        cells = [(cell.cell_type, cell.source) for cell in notebook.cells]
        assert cells == [(cell.cell_type, cell.source) for cell in page.cells], f"{path}: run jupytext --sync"
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), path
        assert "CRCJAX_WHEEL" in next(cell.source for cell in notebook.cells if cell.cell_type == "code")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, ROOT], check=True)
    (built,) = folder.glob("crcjax-*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has what Colab has, and the packages that the wheel names; not crcjax."""
    folder = tmp_path_factory.mktemp("environment") / "venv"
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--seed", "--python", sys.executable, folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "ipykernel", "nbclient", wheel], check=True)
    subprocess.run([uv, "pip", "uninstall", "--quiet", "--python", python, "crcjax"], check=True)
    return python


RUN = """
import sys, nbformat
from nbclient import NotebookClient
NotebookClient(nbformat.read(sys.argv[1], 4), timeout=600, kernel_name="python3").execute()
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_notebooks_run_from_the_wheel(wheel: Path, clean_python: Path, tmp_path: Path) -> None:
    bin_folder = clean_python.parent
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "XLA_FLAGS")}
    environment |= {"PATH": f"{bin_folder}:{os.environ['PATH']}", "CRCJAX_WHEEL": str(wheel)}
    failed = {}
    for path in NOTEBOOKS:
        folder = tmp_path / path.stem
        folder.mkdir()
        done = subprocess.run(
            [clean_python, "-c", RUN, path], cwd=folder, env=environment, capture_output=True, text=True
        )
        if done.returncode:
            failed[path.stem] = done.stderr[-3000:]
    assert not failed, "\n".join(f"{name}: {text}" for name, text in failed.items())
