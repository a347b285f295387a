import ast
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from crcjax.config import get_config

ROOT = Path(__file__).parents[1]


def _leaves(config: ConfigDict, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, value in config.items():
        found += _leaves(value, (*prefix, name)) if isinstance(value, ConfigDict) else [(*prefix, name)]
    return found


def test_every_config_field_is_read_by_the_package() -> None:
    read = {
        node.attr
        for path in (ROOT / "crcjax").rglob("*.py")
        if path.name not in ("config.py", "demo.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    assert [leaf for leaf in _leaves(get_config()) if leaf[-1] not in read] == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_every_config_file_has_the_fields_of_the_default_and_no_others(path: Path) -> None:
    scope: dict = {}
    exec(compile(path.read_text(), path, "exec"), scope)
    assert _leaves(scope["get_config"]()) == _leaves(get_config())
