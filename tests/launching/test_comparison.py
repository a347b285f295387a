from dataclasses import replace
from pathlib import Path

import pytest

from crcjax.launching.comparison import Stated, comparison_table, stated
from crcjax.launching.job import TrainingJob, Volume, read_job
from crcjax.launching.render import TARGETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def job() -> TrainingJob:
    return replace(
        read_job(ROOT / "launch" / "job.toml"),
        arguments=(
            "--config=configs/epoc.py",
            "--workdir=runs/epoc",
            "--config.data.store=/crcjax/a b",
            "--config.seed=3",
        ),
        nodes=3,
        gpus_per_node=2,
        environment={"TZ": "UTC", "QUOTED": "it's $5"},
        restarts=7,
    )


@pytest.fixture(scope="module")
def by_target(job: TrainingJob) -> dict[str, Stated]:
    return {name: stated(name, target.files(job)) for name, target in TARGETS.items()}


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_states_the_same_job(target: str, job: TrainingJob, by_target: dict[str, Stated]) -> None:
    read = by_target[target]
    mounts = list(read.volumes) or ["/crcjax"]
    # Paths on a volume are those at which the platform mounts it; all else is the same everywhere.
    assert [argument.replace(mounts[0], "/crcjax") for argument in read.arguments] == list(job.arguments)
    assert read.environment == job.environment
    assert read.nodes == 3
    for size, asked in ((read.gpus, 2), (read.cpus, 32), (read.memory_gib, 256)):
        # Where the job names a type of machine, that decides.
        assert size == asked or (size is None and read.machine)
    assert "again" in read.again or "requeued" in read.again
    assert "fail" not in read.again


def test_every_target_states_the_grace_period_and_the_retries_that_it_can_have(
    job: TrainingJob, by_target: dict[str, Stated]
) -> None:
    for name, read in by_target.items():
        seconds = TARGETS[name].fixed_grace_s or job.grace_s
        assert read.grace.startswith(f"{seconds} s"), name
        assert read.retry.startswith("10 attempts" if name == "aws-batch" else "7 "), name
    assert {tuple(read.volumes.values()) for name, read in by_target.items() if name != "slurm"} == {
        ("crcjax",),
        ("fs-0123456789abcdef0",),
        ("azureml://datastores/crcjax/paths/epoc",),
        ("10.0.0.2:/crcjax",),
    }


def test_the_table_of_the_page_is_that_of_the_example() -> None:
    table = comparison_table(read_job(ROOT / "launch" / "job.toml"))
    assert table in (ROOT / "docs" / "launch.md").read_text()
    assert len(table.splitlines()) == len(TARGETS) + 2


def test_a_read_only_volume_and_one_within_another_are_mounted_where_the_cloud_puts_them(job: TrainingJob) -> None:
    inner = Volume("stores-2", "/crcjax/stores", True, "fs-0123456789abcdef1", "azureml://datastores/s/paths/", "h:/s")
    arguments = (
        *job.arguments[:2],
        "--config.data.store=/crcjax/stores/a,/crcjax/b",
        "--config.data.cohort=/crcjaxx/c",
    )
    job = replace(job, volumes=(*job.volumes, inner), arguments=arguments)
    for target, first, second in (
        ("sagemaker", "/opt/ml/input/data/crcjax", "/opt/ml/input/data/stores-2"),
        ("azure-ml", "${{outputs.crcjax}}", "${{inputs.stores_2}}"),
        ("vertex", "/mnt/nfs/crcjax", "/mnt/nfs/stores-2"),
    ):
        read = stated(target, TARGETS[target].files(job))
        assert read.arguments[2:] == (
            f"--config.data.store={second}/a,{first}/b",
            "--config.data.cohort=/crcjaxx/c",
        ), target
        assert set(read.volumes) == {first, second}
