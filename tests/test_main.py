from pathlib import Path

import pytest

from crcjax.main import main, read_config

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
        ([f"--config={DEMO}", "--workdir=/x", "extra"], "got 'extra'"),
        ([f"--config={DEMO}", "--workdir=/x", "--config.data.store=/none"], "config.data.cohort is empty"),
    ],
)
def test_an_invalid_command_line_is_one_line_and_status_2(arguments: list[str], message: str, capsys) -> None:
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


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("data.regions_per_bag=0", "config.data.regions_per_bag must be at least 1, got 0; try 32"),
        ("data.batch_size=0", "config.data.batch_size must be at least 1, got 0; try 8"),
        ("train.eval_every=0", "config.train.eval_every must be at least 1, got 0; try 100"),
        ("train.log_every=0", "config.train.log_every must be at least 1, got 0; try 10"),
        ("train.checkpoint_every=0", "config.train.checkpoint_every must be at least 1, got 0; try 50"),
        ("model.width=0", "config.model.width must be at least 1, got 0; try 32"),
        ("model.features=0", "config.model.features must be at least 1, got 0; try 128"),
        ("model.encode_regions=0", "config.model.encode_regions must be at least 1, got 0; try 64"),
        ("train.micro_batches=0", "config.train.micro_batches must be at least 1, got 0; try 1"),
        ("data.region_buckets=()", "config.data.region_buckets must be one or more increasing numbers"),
        ("seed=-1", "config.seed must be from 0 to 2147483647, got -1; try 0"),
        ("model.dropout=1.5", "config.model.dropout must be from 0 to below 1, got 1.5; try 0.1"),
        ("model.mil=max_abmil", "config.model.mil must be one of mean, max, abmil"),
    ],
)
def test_an_invalid_value_is_one_line_and_status_2(option: str, message: str, capsys) -> None:
    given = ["--config.data.store=s", "--config.data.cohort=c", f"--config.{option}"]
    assert main([f"--config={DEMO}", "--workdir=/x", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_tuples_are_written_with_commas_or_as_in_python() -> None:
    for text in ("CMS1,CMS2,CMS3,CMS4", "CMS1, CMS2, CMS3, CMS4", "('CMS1','CMS2','CMS3','CMS4')"):
        given = [
            f"--config.data.classes={text}",
            "--config.data.region_buckets=64,256",
            "--config.data.magnifications=10x",
        ]
        config, _ = read_config([f"--config={DEMO}", "--workdir=/x", *given])
        assert config.data.classes == ("CMS1", "CMS2", "CMS3", "CMS4")
        assert config.data.region_buckets == (64, 256)
        assert config.data.magnifications == ("10x",)
