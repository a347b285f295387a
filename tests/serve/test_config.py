"""The configuration of the service: a TOML file, options, or both."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.serve.config import ServeConfig, read_config

DOCS = Path(__file__).parents[2] / "docs" / "service.md"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write_file(text: str) -> Path:
        (tmp_path / "serve.toml").write_text(text)
        return tmp_path / "serve.toml"

    return write_file


def test_the_file_of_the_documentation_is_valid_and_its_paths_are_relative_to_it(write: Callable[[str], Path]) -> None:
    text = re.search(r"```toml\n(.*?)```", DOCS.read_text(), re.S)
    assert text is not None
    config = read_config(write(text[1]), {})
    folder = write(text[1]).parent
    assert config.bundle == folder / "model.bundle"
    assert config.state == Path("/srv/crcjax")
    assert config.slides["leeds"] == [Path("/mnt/slides/leeds")]


def test_the_file_has_the_fields_of_the_options_and_options_replace_the_files(
    write: Callable[[str], Path], crcjax: Callable
) -> None:
    path = write('state = "s"\nbundle = "b"\nport = 1\nworkers = 3\nslides = {york = ["y"]}')
    config = read_config(path, {"port": 2, "state": Path("other")})
    assert (config.port, config.workers, config.state) == (2, 3, Path("other"))
    assert config.slides == {"york": [path.parent / "y"]}
    help_text = crcjax("serve", "--help").stdout
    tables = {"rate_limit", "oidc"}
    for name in set(ServeConfig.model_fields) - tables:
        assert f"--{name.replace('_', '-')}" in help_text, name


@pytest.mark.parametrize(
    ("text", "options", "mistakes"),
    [
        ("bundle = 1\nprot = 2", {}, ["state is missing", "bundle must be", "prot is no field", "did you mean 'port'"]),
        ('state="s"\nbundle="b"\nport = 70000', {}, ["port must be less than or equal to 65535, got 70000"]),
        ('state="s"\nbundle="b"', {"port": -1}, ["--port must be greater than or equal to 0, got -1"]),
        ('state="s"\nbundle="b"\nkey="k"', {}, ["certificate and key must be given together"]),
        ('state="s"\nbundle="b"\nslides={"a/b"=["x"]}', {}, ["slides.a/b"]),
        ("state=", {}, ["is not TOML"]),
    ],
)
def test_each_mistake_is_one_line_that_names_the_field(
    text: str, options: dict, mistakes: list[str], write: Callable[[str], Path]
) -> None:
    with pytest.raises(InputError) as caught:
        read_config(write(text), options)
    message = str(caught.value)
    assert message.startswith(str(write(text)))
    for words in mistakes:
        assert words in message, message
    expected = sum(" is " in words or "must" in words or "slides" in words for words in mistakes)
    assert len(message.splitlines()) == (1 if expected == 1 else expected + 1)


def test_a_file_that_does_not_exist_and_a_missing_option_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: cannot be read"):
        read_config(tmp_path / "absent.toml", {})
    with pytest.raises(InputError, match="bundle or models must be given, and not both"):
        read_config(None, {"state": tmp_path})
