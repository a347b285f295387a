"""Every config field is read by the package, and every config file has all fields."""

import ast
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from crcjax.config import get_config

ROOT = Path(__file__).parents[1]
Names = tuple[str, ...]


def _leaves(config: ConfigDict, prefix: Names = ()) -> list[Names]:
    leaves = []
    for name, value in config.items():
        leaves += _leaves(value, (*prefix, name)) if isinstance(value, ConfigDict) else [(*prefix, name)]
    return leaves


def _chain(node: ast.AST) -> Names:
    """The names of `a.b.c`, or of `f().b.c` as ("", "b", "c"); empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return (node.id if isinstance(node, ast.Name) else "", *names) if names or isinstance(node, ast.Name) else ()


def _aliases(function: ast.AST) -> dict[str, list[Names]]:
    """The local names that stand for another expression: `data = config.data`, `sizes, data = config.mesh, config.data`."""
    aliases: dict[str, list[Names]] = {}
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign):
            continue
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=True))
            for name, value in pairs:
                if isinstance(name, ast.Name) and len(_chain(value)) > 1:
                    aliases.setdefault(name.id, []).append(_chain(value))
    return aliases


def _config_reads(function: ast.AST) -> list[tuple[str, Names]]:
    """What a function reads of configs: whose config it is, and the names that follow."""
    configs = {"config"} | {
        argument.arg
        for node in ast.walk(function)
        if isinstance(node, ast.arguments)
        for argument in (*node.posonlyargs, *node.args, *node.kwonlyargs)
        if argument.annotation is not None and "ConfigDict" in ast.unparse(argument.annotation)
    }
    aliases, reads = _aliases(function), []
    for node in ast.walk(function):
        if not isinstance(node, ast.Attribute) or not isinstance(node.ctx, ast.Load):
            continue
        for chain in _expanded(_chain(node), aliases):
            at = next((i for i, name in enumerate(chain) if i and name in ("config", "_config")), 0)
            if at:
                reads.append((".".join(chain[: at + 1]), chain[at + 1 :]))
            elif chain[0] in configs:
                reads.append((chain[0], chain[1:]))
    return reads


def _expanded(chain: Names, aliases: dict[str, list[Names]]) -> list[Names]:
    return [(*full, *chain[1:]) for full in aliases.get(chain[0], []) if full[0] != chain[0]] or [chain]


def _read_fields(source: str, fields: set[Names]) -> set[Names]:
    """The config fields that Python code reads, each by its whole path.

    A function may take the whole config or a section of it. All that it reads of the config, or all that the methods of its
    class read, tells which one. Where several sections have all those names, none of them counts as read.
    """
    read = set()
    sections = {field[:depth] for field in fields for depth in range(len(field))}
    for scope in ast.parse(source).body:
        is_class = isinstance(scope, ast.ClassDef)
        if not is_class and not isinstance(scope, ast.FunctionDef):
            continue
        functions = [node for node in scope.body if isinstance(node, ast.FunctionDef)] if is_class else [scope]
        names_of: dict[tuple[int, str], set[Names]] = {}
        for number, function in enumerate(functions):
            for config, names in _config_reads(function):
                # The methods of a class share self.config; each function has arguments of its own.
                owner = -1 if config.startswith("self.") else number
                names_of.setdefault((owner, config), set()).add(_without_method(names))
        for (_, config), reads in names_of.items():
            # Another object's config, as run.config or plan.config, is a whole one.
            prefixes = {()} if "." in config and not config.startswith("self.") else sections
            fitting = [prefix for prefix in prefixes if all(prefix + names in sections | fields for names in reads)]
            if len(fitting) == 1:
                read |= {fitting[0] + names for names in reads} & fields
    return read


def _without_method(names: Names) -> Names:
    """The names without a method at their end, as in config.copy_and_resolve_references() or data.classes.index(name)."""
    ends_in_method = names and any(hasattr(kind, names[-1]) for kind in (ConfigDict, str, tuple, float))
    return names[:-1] if ends_in_method else names


def _package_reads(fields: set[Names]) -> set[Names]:
    # These set, rename or check fields. That alone gives a field no effect.
    without = ("config.py", "config_check.py", "config_names.py", "demo.py")
    paths = [path for path in (ROOT / "crcjax").rglob("*.py") if path.name not in without]
    return set().union(*(_read_fields(path.read_text(), fields) for path in paths))


def test_every_config_field_is_read_by_the_package() -> None:
    fields = set(_leaves(get_config()))
    assert sorted(fields - _package_reads(fields)) == []


@pytest.mark.parametrize("planted", ["data.width", "model.store", "train.seed", "stain.batch_size", "optimizer.steps"])
def test_a_field_that_nobody_reads_is_reported_though_another_section_has_its_name(planted: str) -> None:
    fields = {*_leaves(get_config()), tuple(planted.split("."))}
    assert tuple(planted.split(".")) in fields - _package_reads(fields)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(config: ConfigDict):\n    return config.data.features", {"data.features"}),
        ("def f(config: ConfigDict):\n    data = config.data\n    return data.features", {"data.features"}),
        ("def f(config: ConfigDict):\n    m, d = config.mesh, config.data\n    return d.features", {"data.features"}),
        ("def f(config: ConfigDict):\n    return config.features, config.mil", {"model.features", "model.mil"}),
        ("def f(run):\n    return run.config.seed", {"seed"}),
        ("class A:\n    def f(self):\n        return self._config.heads", {"model.heads"}),
        ("def f(config: ConfigDict):\n    return config.features", set()),  # of data or of model
        ("def f(config: ConfigDict):\n    config.data.store = 1", set()),
        ("def f(other):\n    return other.data.store", set()),
    ],
)
def test_reads_are_found_by_the_whole_path_of_a_field(code: str, expected: set[str]) -> None:
    assert {".".join(field) for field in _read_fields(code, set(_leaves(get_config())))} == expected


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_has_the_fields_of_the_default_and_no_others(path: Path) -> None:
    scope: dict = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    assert _leaves(scope["get_config"]()) == _leaves(get_config())
