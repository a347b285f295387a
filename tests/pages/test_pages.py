"""Pages are one file, stamped on every sheet, and look right in a browser."""

import re
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.pages.pdf import write_pdf
from crcjax.pages.render import Table, number, render_page
from crcjax.pages.svg import FULL_WIDTH, drawing, to_figure

TEMPLATE = """{% extends "page.html" %}{% import "parts.html" as parts %}
{% block content %}{{ parts.figures(figures) }}{{ parts.table(table) }}{% endblock %}"""


def _figure(id: str, width: float):
    with drawing(width) as figure:
        figure.subplots().plot([0, 1], [0, 1])
        return to_figure(figure, id, "A line", "a line that rises", stamp="SYNTHETIC DATA")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    import sys

    package = tmp_path_factory.mktemp("templates") / "templates_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "a.html").write_text(TEMPLATE)
    sys.path.insert(0, str(package.parent))
    figures = [_figure("one", 4.8), _figure("two", 4.8), _figure("three", FULL_WIDTH), _figure("four", 4.8)]
    rows = tuple((f"<row {i}>", "0.500 (0.400 to 0.600)\nn = 12") for i in range(120))
    table = Table("t", "A table", ("", "value"), rows, ("value",), "A note")
    try:
        values = {"figures": figures, "table": table}
        return render_page("templates_of_test", "a.html", values, title="A page", stamp="SYNTHETIC DATA")
    finally:
        sys.path.remove(str(package.parent))


def test_a_page_needs_no_other_file_and_escapes_what_it_shows(page: str) -> None:
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "url(" not in page
    assert "&lt;row 7&gt;" in page
    assert page.count("SYNTHETIC DATA") >= 3, "at the head, at the end, and on every sheet"
    assert "Research use only" in page
    assert re.findall(r'<figure id="figure-(\w+)" class="(\w+)"', page) == [
        ("one", "left"),
        ("two", "right"),
        ("three", "wide"),
        ("four", "left"),
    ]


def test_the_same_figure_gives_the_same_bytes_and_says_what_it_shows(page: str) -> None:
    assert _figure("one", 4.8) == _figure("one", 4.8)
    assert 'alt="a line that rises"' in page


def test_every_sheet_of_the_pdf_has_the_stamp_and_the_use(page: str, tmp_path: Path) -> None:
    pypdf = pytest.importorskip("pypdf")
    write_pdf(page, tmp_path / "page.pdf")
    sheets = pypdf.PdfReader(tmp_path / "page.pdf").pages
    assert len(sheets) > 2
    for sheet in sheets:
        text = sheet.extract_text()
        assert "SYNTHETIC DATA" in text
        assert "Research use only" in text


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "weasyprint", None)
    with pytest.raises(InputError, match=r"writing a PDF needs weasyprint; install it: pip install 'crcjax\[pdf\]'"):
        write_pdf("<p>x</p>", tmp_path / "page.pdf")


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page: str, tmp_path: Path, browser, width: int) -> None:
    (tmp_path / "page.html").write_text(page)
    with browser(tmp_path / "page.html", width=width) as opened:
        assert opened.errors == []
        assert opened.overflow() == 0
        assert opened.empty_images() == []
        sizes = [opened.box(f"#figure-{name}") for name in ("one", "two", "three")]
        assert (sizes[0]["y"] == sizes[1]["y"]) is (width > 720)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.12345, "0.123"),
        (None, "not determined"),
        (float("nan"), "not determined"),
        (1e-5, "1e-05"),
        (-0.0, "-0.000"),
        (12345.6, "12346"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text
