import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator

from crcjax.errors import InputError
from crcjax.launching.job import TrainingJob, Volume, read_job
from crcjax.launching.render import TARGETS, render

ROOT = Path(__file__).parents[2]
KUBERNETES = "1.34"


@pytest.fixture(scope="module")
def job() -> TrainingJob:
    return read_job(ROOT / "launch" / "job.toml")


def _manifests(job: TrainingJob) -> dict[str, dict]:
    return {name: yaml.safe_load(text) for name, text in TARGETS["kubernetes"](job).items()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_in_launch_are_those_of_its_job(target: str, job: TrainingJob, tmp_path: Path) -> None:
    for path in render(job, target, tmp_path):
        assert path.read_text() == (ROOT / "launch" / target / path.name).read_text(), path.name


def test_a_target_that_is_not_known_and_a_job_without_an_image_are_named(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="target must be one of slurm, kubernetes, got 'pbs'"):
        render(job, "pbs", tmp_path)
    with pytest.raises(InputError, match="image must name a container image"):
        render(replace(job, image=""), "kubernetes", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_every_target_asks_for_the_same_resources_and_gives_the_same_command(job: TrainingJob) -> None:
    job = replace(job, environment={"TZ": "UTC"}, queue="gpu", priority="high")
    script = TARGETS["slurm"](job)["train.sbatch"]
    options = dict(
        line.split("--")[1].split("=") for line in script.splitlines() if line.startswith("#SBATCH") and "=" in line
    )
    template = _manifests(job)["jobset.yaml"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    assert template["completions"] == template["parallelism"] == int(options["nodes"])
    assert container["resources"]["limits"] == {
        "cpu": options["cpus-per-task"],
        "memory": options["mem"].replace("G", "Gi"),
        "nvidia.com/gpu": options["gpus-per-node"],
    }
    assert container["resources"]["requests"] == container["resources"]["limits"]
    assert options["signal"] == f"USR1@{pod['terminationGracePeriodSeconds']}"
    assert (options["partition"], options["qos"]) == ("gpu", "high")
    assert {"name": "TZ", "value": "UTC"} in container["env"]
    assert "export TZ=UTC" in script
    assert container["command"] + container["args"][:2] == ["python", "-m", "crcjax.main", *job.arguments]
    assert f"[ $# -gt 0 ] || set -- {' '.join(job.arguments)}\n" in script


def test_arguments_and_variables_reach_the_program_as_they_are(job: TrainingJob, tmp_path: Path) -> None:
    hostile = ("--config=$(touch owned)", "--workdir=a b", "--config.x='\"\\", "--config.y=;touch owned", "${HOME}")
    job = replace(job, arguments=hostile, environment={"A": "$(touch owned) 'b'"})
    script = TARGETS["slurm"](job)["train.sbatch"]
    settings = script[script.index("export A=") : script.index("# The exit status")]
    show = "import sys, os\nprint([*sys.argv[1:], os.environ['A']])"
    (tmp_path / "show.py").write_text(show)
    command = f'{settings}\n{sys.executable} show.py "$@"'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr([*hostile, "$(touch owned) 'b'"])
    assert not (tmp_path / "owned").exists()
    # Kubernetes expands $(NAME), and takes $$ for $.
    assert _manifests(job)["jobset.yaml"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]["args"] == [*(argument.replace("$", "$$") for argument in hostile), "--processes=4"]


@pytest.mark.parametrize("gpus", [0, 8])
def test_kubernetes_own_schemas_accept_the_manifests(gpus: int, job: TrainingJob) -> None:
    volumes = (Volume("stores", "/stores", True), Volume("stores", "/more"), Volume("runs", "/runs"))
    manifests = _manifests(replace(job, gpus_per_node=gpus, volumes=volumes, priority="high", queue="gpu"))
    kubernetes_validate.validate(manifests["network-policy.yaml"], KUBERNETES, strict=True)
    inner = manifests["jobset.yaml"]["spec"]["replicatedJobs"][0]["template"]
    as_job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "train"}, **inner}
    kubernetes_validate.validate(as_job, KUBERNETES, strict=True)
    pod = inner["spec"]["template"]["spec"]
    # Every mount has its volume, and a claim that is mounted twice is one volume.
    assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert len({volume["name"] for volume in pod["volumes"]}) == len(pod["volumes"])
    as_job["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(as_job, KUBERNETES, strict=True)


@pytest.mark.real_data
def test_the_schema_of_jobset_accepts_the_manifest(job: TrainingJob, real_data: Path) -> None:
    definition = json.loads(
        gzip.decompress((real_data / "kubernetes" / "jobset.x-k8s.io_jobsets.json.gz").read_bytes())
    )
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
    check = Draft202012Validator(versions["v1alpha2"])
    manifest = _manifests(job)["jobset.yaml"]
    assert [error.message for error in check.iter_errors(manifest)] == []
    manifest["spec"]["failurePolicy"]["rules"][0]["action"] = "Fail"
    assert any("Fail" in error.message for error in check.iter_errors(manifest))


def test_kubectl_builds_the_kustomization(job: TrainingJob, tmp_path: Path) -> None:
    render(job, "kubernetes", tmp_path)
    kubectl = Path(sys.executable).with_name("kubectl")
    done = subprocess.run([kubectl, "kustomize", tmp_path], capture_output=True, text=True, check=True)
    built = {manifest["kind"]: manifest for manifest in yaml.safe_load_all(done.stdout)}
    assert set(built) == {"JobSet", "NetworkPolicy"}
    assert built["JobSet"] == _manifests(job)["jobset.yaml"]
    # The policy selects the pods that the job makes, which meet at the port that crcjax expects.
    labels = built["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"]
    template = built["JobSet"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    assert labels.items() <= template["metadata"]["labels"].items()


def test_a_pod_finds_its_place_by_the_environment_of_the_manifest(job: TrainingJob) -> None:
    from crcjax.parallel.cluster_env import detect_cluster

    container = _manifests(job)["jobset.yaml"]["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    # What JobSet writes into the annotations that the manifest refers to.
    annotations = {"jobset.sigs.k8s.io/jobset-name": job.name, "jobset.sigs.k8s.io/replicatedjob-name": "train"}
    environment = {"JOB_COMPLETION_INDEX": "2"}
    for variable in container["env"]:
        if "valueFrom" in variable:
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            environment[variable["name"]] = annotations[field.removeprefix("metadata.annotations['").removesuffix("']")]
    place = detect_cluster(environment, process_count=job.nodes)
    assert place is not None
    assert (place.process_index, place.process_count) == (2, 4)
    assert place.coordinator == f"crcjax-train-0-0.crcjax:{container['ports'][0]['containerPort']}"


def test_the_command_renders_and_says_how_to_submit(crcjax, tmp_path: Path) -> None:
    done = crcjax("launch", "render", ROOT / "launch" / "job.toml", "--target", "slurm", "--out", tmp_path / "files")
    assert done.returncode == 0
    assert f"submit: sbatch {tmp_path / 'files' / 'train.sbatch'}" in done.stdout
    subprocess.run(["bash", "-n", tmp_path / "files" / "train.sbatch"], check=True)
    done = crcjax("launch", "render", tmp_path / "absent.toml", "--target", "slurm", "--out", tmp_path)
    assert done.returncode == 2
    assert "absent.toml cannot be read" in done.stderr


@pytest.mark.parametrize(
    ("status", "restarts", "requeued"),
    [
        (0, 0, False),
        (85, 99, True),
        (4, 0, True),
        (6, 9, True),
        (4, 10, False),
        (2, 0, False),
        (5, 0, False),
        (1, 0, False),
    ],
)
def test_the_batch_script_requeues_what_may_succeed_again(
    status: int, restarts: int, requeued: bool, job: TrainingJob, tmp_path: Path
) -> None:
    render(job, "slurm", tmp_path)
    # Stands for SLURM's commands and for Python, which prints the run's directory and then ends as a process of the run would.
    programs = {
        "scontrol": f"echo $* >> {tmp_path}/requeued",
        "srun": f"exit {status}",
        "python": "cat >/dev/null; echo run",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    done = subprocess.run(["bash", tmp_path / "train.sbatch"], env=environment, stdin=subprocess.DEVNULL)
    assert done.returncode == status
    assert (tmp_path / "requeued").exists() == requeued
