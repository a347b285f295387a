"""The sources and pages keep to docs/glossary.md."""

import ast
import io
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
SOURCES = sorted(path for folder in ("crcjax", "configs", "launch", "tools") for path in (ROOT / folder).rglob("*.py"))
# The changelog quotes earlier words; the glossary lists them.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted({*(ROOT / "docs").glob("*.md")} - {GLOSSARY}),
    *sorted((ROOT / "crcjax").rglob("*.html")),  # the templates of the overview and of the report
]
# Old names of config fields are accepted for one release.
OLD_NAMES = ROOT / "crcjax" / "config_names.py"


def _column(heading: str) -> list[str]:
    section = re.split(r"^#+ ", GLOSSARY.read_text(), flags=re.M)
    rows = next(part for part in section if part.startswith(heading)).splitlines()
    cells = [row.split("|")[1] for row in rows if row.startswith("|") and not row.startswith(("|---", "| not"))]
    return [word.strip().strip("`") for cell in cells for word in cell.split(",")]


IDENTIFIERS = set(_column("As identifiers"))
PHRASE = re.compile(
    r"\b(" + "|".join(re.sub(r" ", r"\\s+", re.escape(p).replace(r"\ ", " ")) for p in _column("As phrases")) + r")\b",
    re.I,
)


def forbidden_identifiers(source: str) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.append((node.lineno, node.id))
        elif isinstance(node, ast.arg | ast.keyword) and node.arg:
            names.append((node.lineno, node.arg))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append((node.lineno, node.name))
    return [f"{line}: {name}" for line, name in names if name.lstrip("_") in IDENTIFIERS]


def forbidden_phrases(text: str) -> list[str]:
    return [f"{text.count(chr(10), 0, match.start()) + 1}: {match[0]}" for match in PHRASE.finditer(text)]


def prose(source: str) -> str:
    """The comments and strings of a program, each on its line."""
    lines = [""] * (source.count("\n") + 2)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)):
            for number, line in enumerate(token.string.splitlines(), token.start[0]):
                lines[number - 1] += line + " "
    return "\n".join(lines)


def forbidden_words(path: Path) -> list[str]:
    """What a source or page says that the glossary does not allow, each with its line."""
    text = path.read_text()
    if path.suffix in (".md", ".html"):
        return forbidden_phrases(text)
    return forbidden_identifiers(text) + ([] if path == OLD_NAMES else forbidden_phrases(prose(text)))


def test_sources_and_pages_use_the_words_of_the_glossary() -> None:
    words = {str(path.relative_to(ROOT)): forbidden_words(path) for path in (*SOURCES, *PAGES)}
    assert {path: lines for path, lines in words.items() if lines} == {}


def test_forbidden_words_are_found_wherever_they_stand() -> None:
    assert len(IDENTIFIERS) > 10
    names = forbidden_identifiers("def told(seen, *, kept=1):\n    _found = 1\n    f(held=2)")
    assert sorted(names) == ["1: kept", "1: seen", "1: told", "2: _found", "3: held"]
    assert forbidden_phrases("equal\nbut for  rounding") == ["2: but for"]
    assert forbidden_phrases(prose('x = 1  # it is told\n"""All\nthe same."""')) == ["1: is told", "2: All \nthe same"]
    assert forbidden_phrases("butter for all") == []
