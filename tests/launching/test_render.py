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
    return {name: yaml.safe_load(text) for name, text in TARGETS["kubernetes"].files(job).items()}


@pytest.mark.parametrize("target", TARGETS)
def test_the_files_in_launch_are_those_of_its_job(target: str, job: TrainingJob, tmp_path: Path) -> None:
    for path in render(job, target, tmp_path):
        assert path.read_text() == (ROOT / "launch" / target / path.name).read_text(), path.name


def test_a_target_that_is_not_known_and_a_job_without_an_image_are_named(job: TrainingJob, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"target must be one of slurm, kubernetes, .*, got 'pbs'"):
        render(job, "pbs", tmp_path)
    with pytest.raises(InputError, match="image must name a container image"):
        render(replace(job, image=""), "kubernetes", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_arguments_and_variables_reach_the_program_as_they_are(job: TrainingJob, tmp_path: Path) -> None:
    hostile = ("--config=$(touch owned)", "--workdir=a b", "--config.x='\"\\", "--config.y=;touch owned", "${HOME}")
    job = replace(job, arguments=hostile, environment={"A": "$(touch owned) 'b'"})
    script = TARGETS["slurm"].files(job)["train.sbatch"]
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


def _ray_job(job: TrainingJob) -> dict:
    return yaml.safe_load(TARGETS["kuberay"].files(job)["rayjob.yaml"])


@pytest.mark.real_data
@pytest.mark.parametrize("gpus", [0, 8])
def test_the_schemas_of_kuberay_and_of_pods_accept_the_ray_job(gpus: int, job: TrainingJob, real_data: Path) -> None:
    definition = json.loads(gzip.decompress((real_data / "kubernetes" / "ray.io_rayjobs.json.gz").read_bytes()))
    versions = {version["name"]: version["schema"]["openAPIV3Schema"] for version in definition["spec"]["versions"]}
    check = Draft202012Validator(versions["v1"])
    manifest = _ray_job(replace(job, gpus_per_node=gpus, queue="gpu", priority="high"))
    assert [error.message for error in check.iter_errors(manifest)] == []
    cluster = manifest["spec"]["rayClusterSpec"]
    for template in (cluster["headGroupSpec"]["template"], cluster["workerGroupSpecs"][0]["template"]):
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": "pod", **template["metadata"]}}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
        (container,) = template["spec"]["containers"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in template["spec"]["volumes"]}
    policy = yaml.safe_load(TARGETS["kuberay"].files(job)["network-policy.yaml"])
    kubernetes_validate.validate(policy, KUBERNETES, strict=True)
    cluster["workerGroupSpecs"][0].pop("groupName")
    assert any("groupName" in error.message for error in check.iter_errors(manifest))


def test_a_worker_of_the_ray_job_saves_before_kubernetes_ends_it(job: TrainingJob) -> None:
    from crcjax.launching import ray_nodes

    (workers,) = _ray_job(job)["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    assert container["lifecycle"]["preStop"]["exec"]["command"] == ["python", "-m", ray_nodes.__name__, "--stop"]


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


def test_shellcheck_passes_the_batch_scripts() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = sorted((ROOT / "launch" / "slurm").iterdir())
    assert len(scripts) == 4
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_command_renders_and_says_how_to_submit(crcjax, tmp_path: Path) -> None:
    done = crcjax("launch", "render", ROOT / "launch" / "job.toml", "--target", "slurm", "--out", tmp_path / "files")
    assert done.returncode == 0
    assert f"submit: sbatch {tmp_path / 'files' / 'train.sbatch'}" in done.stdout
    subprocess.run(["bash", "-n", tmp_path / "files" / "train.sbatch"], check=True)
    done = crcjax("launch", "render", tmp_path / "absent.toml", "--target", "slurm", "--out", tmp_path)
    assert done.returncode == 2
    assert "absent.toml: cannot be read" in done.stderr


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
