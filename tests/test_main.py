from pathlib import Path

import pytest

from crcjax.main import main

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "configs" / "demo.py")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [f"--config={DEMO}", "--workdir=/x", "--config.data.stroe=y"],
            "--config.data.stroe: there is no such field; did you mean --config.data.store?",
        ),
        ([f"--config={DEMO}", "--workdir=/x", "--config.train.steps=many"], "train.steps"),
        ([f"--config={DEMO}"], "give --config FILE and --workdir DIR"),
        (["--config=absent.py", "--workdir=/x"], "absent.py"),
        ([f"--config={DEMO}", "--workdir=/x", "extra"], "what is 'extra'"),
        ([f"--config={DEMO}", "--workdir=/x", "--config.data.store=/none"], "config.data.cohort is empty"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(arguments: list[str], message: str, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_field_in_a_config_file_names_the_nearest(tmp_path: Path, capsys) -> None:
    path = tmp_path / "wrong.py"
    path.write_text(
        "from crcjax.config import get_config as default\n\ndef get_config():\n    c = default()\n    c.train.stepz = 1\n    return c\n"
    )
    assert main([f"--config={path}", "--workdir=/x"]) == 2
    error = capsys.readouterr().err
    assert "stepz" in error
    assert '"steps"' in error


def test_a_run_directory_that_cannot_be_written_is_status_3(small_config, capsys) -> None:
    path = [f"--config.data.{name}={small_config.data[name]}" for name in ("store", "cohort")]
    assert main([f"--config={DEMO}", "--workdir=/proc/none", *path]) == 3
    assert "/proc/none: cannot be written" in capsys.readouterr().err


def test_a_config_file_that_does_not_start_from_the_default_names_what_it_lacks(tmp_path: Path, capsys) -> None:
    path = tmp_path / "bare.py"
    path.write_text("from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'seed': 1})\n")
    assert main([f"--config={path}", "--workdir=/x"]) == 2
    assert (
        "the config file has no augment.artefacts; start it from crcjax.config.get_config()" in capsys.readouterr().err
    )


def test_help_documents_the_exit_statuses(capsys) -> None:
    assert main(["--help"]) == 0
    assert "Exit status: 0 trained; 2 " in capsys.readouterr().out
