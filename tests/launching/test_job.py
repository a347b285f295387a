from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.launching.job import TrainingJob, Volume, read_job

ROOT = Path(__file__).parents[2]
SHORTEST = """
name = "epoc"
arguments = ["--config=configs/epoc.py", "--workdir=runs/epoc"]
nodes = 2
gpus_per_node = 0
cpus_per_node = 4
memory_gib = 16
time_limit_h = 1
grace_s = 60
restarts = 0
"""


def test_a_job_is_read_with_its_defaults_and_its_tables(tmp_path: Path) -> None:
    path = tmp_path / "job.toml"
    path.write_text(
        SHORTEST
        + '[environment]\nTZ = "UTC"\n[[volumes]]\nclaim = "stores"\npath = "/stores"\nread_only = true\n'
        + '[[volumes]]\nclaim = "runs"\npath = "/runs"\n'
    )
    assert read_job(path) == TrainingJob(
        name="epoc",
        arguments=("--config=configs/epoc.py", "--workdir=runs/epoc"),
        nodes=2,
        gpus_per_node=0,
        cpus_per_node=4,
        memory_gib=16,
        time_limit_h=1,
        grace_s=60,
        restarts=0,
        environment={"TZ": "UTC"},
        volumes=(Volume("stores", "/stores", True), Volume("runs", "/runs")),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("nodes = 2", "nodes = 0"), "nodes must be at least 1, got 0"),
        (("nodes = 2", 'nodes = "2"'), "nodes must be a whole number, got '2'"),
        (("nodes = 2", "nodes = true"), "nodes must be a whole number, got True"),
        (("restarts = 0", "restarts = -1"), "restarts must not be negative, got -1"),
        (("restarts = 0", ""), "field 'restarts' is missing"),
        (("nodes = 2", "node = 2"), "field 'node' is not known; the fields are name, arguments, nodes"),
        (('name = "epoc"', 'name = "EPOC trial"'), "name must be at most 40 lower-case letters"),
        (('name = "epoc"', 'name = "epoc\\n"'), "name must be one line of text"),
        ((', "--workdir=runs/epoc"', ""), "arguments must contain --workdir"),
        (('"--workdir=runs/epoc"', "3"), "arguments must be a list of texts"),
        (("grace_s = 60", "grace_s = 3600"), "grace_s must be shorter than time_limit_h, got 3600 s of 1 h"),
        (("restarts = 0", "restarts = 0\n[environment]\nDB_PASSWORD = 'x'"), "no place for secrets"),
        (("restarts = 0", "restarts = 0\n[environment]\n'A-B' = 'x'"), "environment names a variable 'A-B'"),
        (("restarts = 0", "restarts = 0\n[[volumes]]\nclaim = 'a'\npath = 'runs'"), "path must be absolute"),
        (("restarts = 0", "restarts = 0\n[[volumes]]\nclaim = 'a/b'\npath = '/runs'"), "persistent volume claim"),
        (("restarts = 0", "restarts = 0\n[[volumes]]\npath = '/runs'"), "a volume's field 'claim' is missing"),
        (("restarts = 0", "restarts = 0\nvolumes = 3"), "volumes must be tables"),
        (("nodes = 2", "nodes ="), "is not a TOML file"),
    ],
)
def test_a_field_that_is_wrong_is_named_with_what_it_must_be(
    change: tuple[str, str], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "job.toml"
    assert change[0] in SHORTEST
    path.write_text(SHORTEST.replace(*change))
    with pytest.raises(InputError) as error:
        read_job(path)
    assert str(error.value).startswith(str(path))
    assert message in str(error.value)


def test_a_file_that_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: cannot be read \(No such file"):
        read_job(tmp_path / "absent.toml")
