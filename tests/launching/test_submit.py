"""--submit runs the platform's own client."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.launching.job import TrainingJob, read_job
from crcjax.launching.render import TARGETS, grace_warning, submit_commands

ROOT = Path(__file__).parents[2]
FIELDS = {"aws-batch": "aws_batch", "sagemaker": "sagemaker", "azure-ml": "azure_ml", "vertex": "vertex"}


@pytest.fixture(scope="module")
def job() -> TrainingJob:
    return read_job(ROOT / "launch" / "job.toml")


@pytest.mark.parametrize("target", TARGETS)
def test_the_commands_name_the_rendered_files(target: str, job: TrainingJob, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    commands = submit_commands(job, target, folder)
    assert {command[0] for command in commands} <= {"sbatch", "kubectl", "aws", "az", "gcloud"}
    words = [word for command in commands for word in command]
    named = [word.partition("=")[2] or word for word in words if str(folder) in word]
    rendered = {path.name for path in (ROOT / "launch" / target).iterdir()}
    if target not in ("kubernetes", "kuberay"):
        assert {Path(name.removeprefix("file://")).name for name in named} <= rendered
    assert named


def test_the_client_runs_and_one_that_is_absent_or_fails_is_one_clear_error(
    crcjax, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["launch", "render", ROOT / "launch" / "job.toml", "--target", "sagemaker", "--out", tmp_path / "files"]
    clients = tmp_path / "clients"
    clients.mkdir()
    # Python's own folder has no client of AWS.
    path = f"{clients}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", path)
    absent = crcjax(*command, "--submit")
    assert absent.returncode == 2
    assert "--submit needs the AWS command line (aws), and aws is not on the PATH" in absent.stderr
    assert (tmp_path / "files" / "training-job.json").exists()
    client = clients / "aws"
    client.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/called\nexit $CLIENT_STATUS\n')
    client.chmod(0o755)
    monkeypatch.setenv("CLIENT_STATUS", "0")
    done = crcjax(*command, "--submit")
    assert done.returncode == 0, done.stderr
    assert "sagemaker gives 120 s between the signal to stop and the end, the job asks for 300 s" in done.stderr
    assert re.fullmatch(
        rf"sagemaker create-training-job --cli-input-json file://{tmp_path}/files/training-job.json "
        r"--training-job-name crcjax-\d{8}-\d{6}\n",
        (tmp_path / "called").read_text(),
    )
    monkeypatch.setenv("CLIENT_STATUS", "3")
    refused = crcjax(*command, "--submit")
    assert refused.returncode == 1
    assert "ended with status 3" in refused.stderr


def test_a_grace_period_within_the_platforms_needs_no_warning(job: TrainingJob) -> None:
    assert "aws-batch gives 30 s" in grace_warning(job, "aws-batch")
    assert grace_warning(replace(job, grace_s=30), "aws-batch") == ""
    assert grace_warning(job, "kubernetes") == ""


@pytest.mark.parametrize(("target", "field"), FIELDS.items())
def test_what_a_cloud_needs_and_the_job_lacks_is_named(target: str, field: str, job: TrainingJob) -> None:
    files = TARGETS[target].files
    with pytest.raises(InputError, match=rf"needs the table \[{field}\]"):
        files(replace(job, **{field: None}))
    with pytest.raises(InputError, match="the job needs a volume"):
        files(replace(job, volumes=()))
    with pytest.raises(InputError, match=r"the volume crcjax's field \w+ must be"):
        files(replace(job, volumes=(replace(job.volumes[0], efs="", azure="", gcp=""),)))
    with pytest.raises(InputError, match="image must name a container image"):
        files(replace(job, image=""))
