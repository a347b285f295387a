"""Writes the pages of the reference from the program itself: commands, config, HTTP API, errors, metrics.

The pages lie in docs/reference and are not in git.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

import crcjax
from crcjax import errors
from crcjax.cli import app
from crcjax.config import get_config

PACKAGE = Path(crcjax.__file__).parent
PYTHON_OBJECTS = (
    ("Slides and stores", ("open_slide", "demo_cohort", "tile", "open_store", "embed", "Store")),
    ("Training", ("train", "Run", "add_aggregator")),
    ("Prediction", ("predict", "Predictions", "calibrate", "export_bundle", "open_bundle", "Bundle")),
    ("Validation", ("validate",)),
)


def write(folder: Path) -> None:
    """Writes all pages; a page whose text did not change keeps its time, so that Sphinx does not read it again."""
    folder.mkdir(exist_ok=True)
    pages = {
        "commands.md": commands_page(),
        "config.md": config_page(),
        "python_api.md": python_page(),
        "http_api.md": http_page(),
        "errors.md": errors_page(),
        "metrics.md": metrics_page(),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def commands() -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command with the names that lead to it: ("checkpoints", "list"), command."""
    yield from _below(typer.main.get_command(app), ())


def _below(group: Any, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in sorted(getattr(group, "commands", {}).items()):
        yield (*names, name), command
        yield from _below(command, (*names, name))


def commands_page() -> str:
    parts = ["# Commands", _paragraphs(typer.main.get_command(app).help)]
    for names, command in commands():
        parts += [f"{'#' * (len(names) + 1)} crcjax {' '.join(names)}", _paragraphs(command.help)]
        rows = [_parameter_row(parameter) for parameter in command.params]
        if rows:
            parts.append(_table(("argument or option", "default", "meaning"), rows))
    return "\n\n".join(parts) + "\n"


def _parameter_row(parameter: Any) -> tuple[str, str, str]:
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
    default = "" if parameter.default in (None, (), [], "") or callable(parameter.default) else str(parameter.default)
    return f"`{name}`", "required" if parameter.required else default, parameter.help or ""


def config_page() -> str:
    """Every field with the comment that stands above it in crcjax/config.py, and its default."""
    intro = (
        "`crcjax train --config FILE --config.SECTION.FIELD=VALUE` sets a field. The files in `configs/` override some. "
        "A field that does not exist, a value out of range and fields that contradict each other are refused before "
        "anything is read."
    )
    parts, section, rows = ["# Config", intro], "", []
    comments = _field_comments(inspect.getsource(get_config))
    for name, default in _fields(get_config()):
        head = name.rpartition(".")[0]
        if head != section:
            parts += [_table(("field", "default", "meaning"), rows), f"## {head}"]
            section, rows = head, []
        rows.append((f"`{name}`", f"`{default!r}`", comments[name]))
    return "\n\n".join(filter(None, [*parts, _table(("field", "default", "meaning"), rows)])) + "\n"


def _fields(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    plain = {name: value for name, value in config.items() if not hasattr(value, "items")}
    yield from ((prefix + name, value) for name, value in plain.items())
    for name, value in config.items():
        if name not in plain:
            yield from _fields(value, f"{prefix}{name}.")


def _field_comments(source: str) -> dict[str, str]:
    """The comment above each assignment of get_config, by the field's full name."""
    prefixes, comments, lines = {"config": ""}, {}, []
    for line in source.splitlines():
        text = line.strip()
        if text.startswith("#"):
            lines.append(text.removeprefix("#").strip())
            continue
        if section := re.match(r"(\w+)\.(\w+) = (\w+) = Section\(\)", text):
            prefixes[section[3]] = f"{prefixes[section[1]]}{section[2]}."
        elif field := re.match(r"(\w+)\.(\w+) = ", text):
            comments[prefixes.get(field[1], "") + field[2]] = " ".join(lines)
        lines = []
    return comments


def python_page() -> str:
    parts = ["# Python API", "[python.md](../python.md) shows these functions at work."]
    for title, names in PYTHON_OBJECTS:
        parts.append(f"## {title}")
        for name in names:
            item = getattr(crcjax, name)
            if inspect.ismodule(item):
                module, function = item._function
                item = getattr(importlib.import_module(module), function)
            parts.append(_autodoc(item))
    from crcjax.serve.client import Client
    from crcjax.validation.study.validator import EPOCValidator

    parts += [_autodoc(EPOCValidator), "## The service's client", _autodoc(Client)]
    return "\n\n".join(parts) + "\n"


def _autodoc(item: Any) -> str:
    item = inspect.unwrap(item)
    kind, members = ("class", "\n   :members:") if inspect.isclass(item) else ("function", "")
    return f"```{{eval-rst}}\n.. auto{kind}:: {item.__module__}.{item.__qualname__}{members}\n```"


def http_page() -> str:
    from fastapi import FastAPI

    from crcjax.serve.app import ROUTERS

    api = FastAPI()
    for router in ROUTERS:
        api.include_router(router)
    document = api.openapi()
    intro = (
        "The service answers these requests ([service.md](../service.md)). Errors are problem documents (RFC 9457). The "
        "running service gives the whole OpenAPI document, with all schemas, at `/openapi.json`."
    )
    parts = ["# HTTP API", intro]
    for path, methods in sorted(document["paths"].items()):
        for method, operation in methods.items():
            if method not in ("get", "post", "put", "patch", "delete", "head"):
                continue
            parts += [
                f"## {method.upper()} {path}",
                _paragraphs(operation.get("description") or operation.get("summary", "")),
            ]
            rows = [
                (f"`{p['name']}`", p["in"], p.get("description", "") or p.get("schema", {}).get("description", ""))
                for p in operation.get("parameters", [])
            ]
            if rows:
                parts.append(_table(("parameter", "in", "meaning"), rows))
            answers = operation.get("responses", {})
            parts.append(_table(("status", "answer"), [(s, a.get("description", "")) for s, a in answers.items()]))
    return "\n\n".join(filter(None, parts)) + "\n"


def errors_page() -> str:
    """Every error message of the sources, with the values that it inserts as {name}."""
    intro = (
        "Every message states where the fault is, what was found, and, after the last semicolon, what to do. Words in "
        "braces are replaced by the values found. [troubleshooting.md](../troubleshooting.md) says more about the frequent ones."
    )
    statuses = [
        (
            kind.__name__,
            str(errors.exit_status(kind.__new__(kind))),
            " ".join((kind.__doc__ or "").split("\n\n")[0].split()),
        )
        for kind in vars(errors).values()
        if inspect.isclass(kind) and issubclass(kind, errors.CrcjaxError)
    ]
    parts = [
        "# Errors and exit statuses",
        intro,
        "## Exit statuses",
        "Of `crcjax train`, by the error that ended it. Another command ends with 2 by an `InputError`, 3 by an "
        "`OutputError`, and 1 by any other, or when some of its items failed.",
        _table(("error", "status", "meaning"), statuses),
    ]
    for path in sorted(PACKAGE.rglob("*.py")):
        messages = _messages(path.read_text())
        if messages:
            module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
            parts += [f"## {module}", "\n".join(f"* `{kind}`: {_escaped(text)}" for kind, text in messages)]
    return "\n\n".join(parts) + "\n"


def _messages(source: str) -> list[tuple[str, str]]:
    """(class, message) of every error that is raised or made with a literal message, in the order of the source."""
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind)}
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in kinds:
            # A SlideError's reason and remedy are its third and fourth argument.
            texts = [
                _literal(argument) for argument in (node.args[2:] if node.func.id == "SlideError" else node.args[:1])
            ]
            if all(texts) and texts:
                found.append((node.lineno, node.func.id, "; ".join(texts)))
    return [(kind, text) for _, kind, text in sorted(found)]


def _literal(node: ast.AST) -> str:
    """The text of a string or f-string; "" for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(
            part.value if isinstance(part, ast.Constant) else "{" + ast.unparse(part.value) + "}"
            for part in node.values
        )
    return ""


def metrics_page() -> str:
    """The metrics of the service by their registry."""
    from crcjax.serve.app import Metrics

    collectors = Metrics().registry._collector_to_names
    rows = [
        (
            f"`{metric.name}`",
            metric.type,
            ", ".join(f"`{label}`" for label in collector._labelnames),
            metric.documentation,
        )
        for collector in collectors
        for metric in collector.collect()
    ]
    intro = "The service's `/metrics`, in the format of Prometheus."
    return "\n\n".join(["# Metrics", intro, _table(("metric", "type", "labels", "meaning"), rows)]) + "\n"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, tuple("---" for _ in head), *(tuple(_cell(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    if not text.startswith("`"):
        text = _escaped(text)
    return " ".join(text.split()).replace("|", "\\|")


def _paragraphs(text: str | None) -> str:
    return _escaped(textwrap.dedent(text or "").strip())


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#$~])", r"\\\1", text)
