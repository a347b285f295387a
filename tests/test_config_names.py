from pathlib import Path

import pytest

from crcjax.config import get_config
from crcjax.config_names import OLD_NAMES, renamed_argument, renamed_fields
from crcjax.main import read_config

ROOT = Path(__file__).parents[1]
DEMO = f"--config={ROOT / 'configs' / 'demo.py'}"
# A value of each old field that is no default, and the value of the new field.
VALUES: dict[str, tuple] = {
    "data.bags": (3, 3),
    "data.regions": (5, 5),
    "data.draw_seed": (7, 7),
    "data.region_draw": ("spread", "spread"),
    "train.members": (2, 2),
    "train.agree_every": (9, 9),
    "model.batch_norm": (0.25, 0.25),
    "mesh.shard_params": (0, 0),
    "augment.exchange": (0.5, 0.5),
    "augment.jpeg": (30.0, 70.0),
}


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_field_name_sets_the_new_field_from_the_command_line_a_file_or_a_run(
    old: str, new: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, expected = VALUES[old]
    section, field = old.split(".")
    file = tmp_path / "old.py"
    file.write_text(
        f"from crcjax.config import get_config as default\n\ndef get_config():\n    c = default()\n    c.{old} = {given!r}\n    return c\n"
    )
    for arguments in ([DEMO, f"--config.{old}={given}"], [DEMO, f"--config.{old}", str(given)], [f"--config={file}"]):
        config, _ = read_config([*arguments, "--workdir=/x"])
        assert config[new] == expected, arguments
        error = capsys.readouterr().err
        assert f"{field if len(arguments) == 1 else f'--config.{old}'} is now " in error
        assert error.count("\n") == 1
    config = get_config()
    config.update(renamed_fields({section: {field: given}}))
    assert config[new] == expected


def test_reading_an_old_field_name_gives_the_old_value_with_a_warning() -> None:
    config = get_config()
    config.augment.jpeg_min_quality = 70.0
    with pytest.warns(FutureWarning, match="jpeg is now jpeg_min_quality"):
        assert config.augment.jpeg == 30.0
    assert "jpeg" not in config.augment
    assert config.copy_and_resolve_references() == config


def test_other_arguments_are_left_as_they_are() -> None:
    for argument in ("--config.data.store=bags", "--workdir", "data.bags=3", "--config.model.batch_norm_momentum=0.1"):
        assert renamed_argument(argument) == argument
    with pytest.warns(FutureWarning):
        assert renamed_argument("--config.augment.jpeg=many") == "--config.augment.jpeg_min_quality=many"
