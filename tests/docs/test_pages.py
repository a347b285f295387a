"""The pages name commands, options, config fields and Python objects that exist, and build to a site without a warning."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from crcjax.cli import app
from crcjax.config import get_config

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "docs" / "notebooks").glob("*.md"))]
# Of any command: those of click, and of the training's flags.
FLAGS_OF_TRAINING = {"--config", "--workdir", "--processes", "--process", "--coordinator", "--wait_s"}


def code_lines(page: str) -> Iterator[str]:
    """The lines of the indented and fenced blocks, with continued lines joined."""
    fenced, text = False, []
    for line in page.splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            text.append(line.strip())
    yield from "\n".join(text).replace("\\\n", " ").splitlines()


def mistakes_of_command(line: str) -> list[str]:
    """What a line of a page asks of the `crcjax` command that it does not have; empty if it names no crcjax command."""
    match = re.match(r"(?:\$ |[\w/.]*python -m |sbatch .*--wrap '|srun )?crcjax (?!\W)(.*)", line.partition("  #")[0])
    if match is None:
        return []
    words = shlex.split(re.sub(r"'$", "", match[1]) if "--wrap" in line else match[1], comments=True)
    command: Any = typer.main.get_command(app)
    names: list[str] = []
    while words and hasattr(command, "commands"):
        if words[0] not in command.commands:
            return (
                [] if words[0].startswith("-") or not re.fullmatch(r"[a-z-]+", words[0]) else [f"no command {words[0]}"]
            )
        names.append(words[0])
        command = command.commands[words.pop(0)]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    mistakes = []
    for word in words:
        option = word.partition("=")[0]
        if word == "--" or not option.startswith("--"):
            if word == "--":
                break
            continue
        if option.startswith("--config.") or (
            names[:1] in (["train"], ["crossvalidate"]) and option in FLAGS_OF_TRAINING
        ):
            continue
        if option not in known | {"--help"}:
            mistakes.append(f"crcjax {' '.join(names)} has no option {option}")
    return mistakes


def test_every_command_and_option_on_the_pages_exists() -> None:
    seen = 0
    mistakes = []
    for page in PAGES:
        for line in code_lines(page.read_text()):
            seen += bool(re.search(r"\bcrcjax [a-z]", line))
            mistakes += [f"{page.name}: {line}: {mistake}" for mistake in mistakes_of_command(line)]
    assert not mistakes, "\n".join(mistakes)
    assert seen > 60
    assert mistakes_of_command("crcjax predict --bundel B") == ["crcjax predict has no option --bundel"]
    assert mistakes_of_command("crcjax predikt") == ["no command predikt"]


def test_every_config_field_that_a_page_sets_exists() -> None:
    config = get_config()
    unknown = []
    for page in PAGES:
        for field in re.findall(r"--config\.([a-z_]+(?:\.[a-z_]+)*)", page.read_text()):
            value: Any = config
            for name in field.split("."):
                if not hasattr(value, "keys") or name not in value:
                    unknown.append(f"{page.name}: {field}")
                    break
                value = value[name]
    assert not unknown


def test_python_blocks_compile_and_their_imports_of_crcjax_exist() -> None:
    for page in PAGES:
        for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.M | re.S):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "crcjax":
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names), f"{page.name}: {ast.unparse(node)}"


def test_every_test_that_a_page_names_exists() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text())}
    assert len(named) > 20
    for name in sorted(named):
        path, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / path).read_text(), name


def test_links_of_the_readme_lead_to_files_and_every_page_is_in_it_or_in_the_site() -> None:
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", readme):
        assert (ROOT / target).exists(), target


def test_the_pages_are_spelt_right() -> None:
    checked = subprocess.run(
        [
            sys.executable,
            "-m",
            "codespell_lib",
            "--builtin",
            "clear,rare",
            "--ignore-words-list",
            "AKS",
            *map(str, PAGES),
            str(ROOT / "CHANGELOG.md"),
        ],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    built = subprocess.run(
        [
            sys.executable,
            *["-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-d"],
            tmp_path / "cache",
            ROOT / "docs",
            tmp_path / "site",
        ],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link|iframe)[^>]*(?:src|href)=\"(https?:)?//[^\"]*\"", page.read_text())
        assert not loaded, page
    assert "open_slide" in (tmp_path / "site" / "reference" / "python_api.html").read_text()
    # The search is a file beside the pages.
    assert (tmp_path / "site" / "searchindex.js").stat().st_size > 10_000
