"""The clouds' own descriptions of their jobs accept the rendered files, and refuse damaged ones."""

import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from crcjax.launching.job import Volume, read_job
from crcjax.launching.render import render

ROOT = Path(__file__).parents[2]
CLOUDS = ("aws-batch", "sagemaker", "azure-ml", "vertex")


@pytest.fixture(scope="module")
def clouds_python(required) -> Path:
    """The Python that has the clouds' packages."""
    python = Path(os.environ.get("CRCJAX_CLOUDS_PYTHON", ROOT / ".venv-clouds" / "bin" / "python"))
    if not python.exists():
        message = f"the clouds' packages are not installed ({python}): make cloud-packages"
        if required("clouds"):
            pytest.fail(message)
        pytest.skip(message)
    return python


def _faults(python: Path, folder: Path) -> list[str]:
    command = [python, Path(__file__).with_name("check_clouds.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == (1 if done.stdout.strip() else 0), done.stderr
    return done.stdout.strip().splitlines()


@pytest.mark.slow
def test_the_clouds_accept_the_files_of_jobs_with_and_without_gpus_spot_and_several_volumes(
    clouds_python: Path, tmp_path: Path
) -> None:
    job = read_job(ROOT / "launch" / "job.toml")
    stores = Volume("stores", "/stores", True, "fs-0123456789abcdef1", "azureml://datastores/s/paths/", "10.0.0.3:/s")
    small = replace(job, nodes=1, gpus_per_node=0, spot=True, shared_memory_gib=0, volumes=(*job.volumes, stores))
    small = replace(small, environment={"TZ": "UTC", "STORE": "/stores/a"})
    for index, case in enumerate((job, small)):
        for target in CLOUDS:
            render(case, target, tmp_path / str(index) / target)
        assert _faults(clouds_python, tmp_path / str(index)) == []


@pytest.mark.slow
def test_the_clouds_refuse_a_field_that_they_do_not_know_or_that_has_a_wrong_value(
    clouds_python: Path, tmp_path: Path
) -> None:
    job = read_job(ROOT / "launch" / "job.toml")
    for target in CLOUDS:
        render(job, target, tmp_path / target)
    definition = tmp_path / "aws-batch" / "job-definition.json"
    definition.write_text(definition.read_text().replace('"RETRY"', '"AGAIN"').replace('"numNodes"', '"nodes"'))
    training = tmp_path / "sagemaker" / "training-job.json"
    training.write_text(json.dumps(json.loads(training.read_text()) | {"TrainingJobName": "a b"}))
    azure = tmp_path / "azure-ml" / "job.yml"
    azure.write_text(azure.read_text().replace("rw_mount", "mounted"))
    vertex = tmp_path / "vertex" / "custom-job.yaml"
    spec = yaml.safe_load(vertex.read_text())
    spec["scheduling"]["strategy"] = "CHEAP"
    vertex.write_text(yaml.safe_dump(spec))
    faults = "\n".join(_faults(clouds_python, tmp_path))
    for expected in ("numNodes", "AGAIN", "'a b'", "mounted", "CHEAP"):
        assert expected in faults, faults
