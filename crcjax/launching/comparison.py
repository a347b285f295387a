"""Reads the files of every platform back, and shows as a table what each of them says about one job."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from crcjax.launching.job import TrainingJob
from crcjax.launching.render import TARGETS


@dataclass(frozen=True)
class Stated:
    """What the rendered files of one platform state.

    `arguments` are those of crcjax.main, and `volumes` are names of storage by the paths where it is mounted. The type of a
    machine, where a cloud's job names one, decides CPUs, memory and GPUs that are None here.
    """

    arguments: tuple[str, ...]
    environment: dict[str, str]
    nodes: int
    gpus: int | None
    cpus: int | None
    memory_gib: int | None
    machine: str
    grace: str
    retry: str
    again: str
    volumes: dict[str, str] = field(default_factory=dict)


def stated(target: str, text_by_name: Mapping[str, str]) -> Stated:
    """Reads the files of a platform, as `render` writes them."""
    return _READERS[target](text_by_name)


def comparison_table(job: TrainingJob) -> str:
    """A Markdown table with one row for each platform: what its files state for a job."""
    head = [
        "platform",
        "command",
        "nodes, resources",
        "environment",
        "volumes",
        "grace period",
        "retry",
        "exit status 85",
    ]
    rows = [head, ["---"] * len(head)]
    for target, platform in TARGETS.items():
        read = stated(target, platform.files(job))
        sizes = ((read.gpus, "GPUs"), (read.cpus, "CPUs"), (read.memory_gib, "GiB"))
        each = ", ".join(f"{size} {unit}" for size, unit in sizes if size is not None)
        rows.append(
            [
                target,
                f"`crcjax.main {shlex.join(read.arguments)}`",
                f"{read.nodes} x {', '.join(filter(None, (read.machine, each)))}",
                ", ".join(f"`{name}={value}`" for name, value in read.environment.items()) or "none",
                ", ".join(f"`{source}` at `{path}`" for path, source in read.volumes.items())
                or "the cluster's file system",
                read.grace,
                read.retry,
                read.again,
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


# Variables that the launchers themselves need.
_OWN = ("HOME", "CRCJAX_RENDEZVOUS_SECRET_FILE", "CRCJAX_HOSTS_FILE", "JOBSET_NAME", "REPLICATED_JOB_NAME")


def _of_job(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _OWN}


def _main_arguments(command: list[str]) -> tuple[str, ...]:
    """The arguments of crcjax.main, without those that a launcher adds."""
    after = command[command.index("crcjax.main") + 1 :]
    return tuple(argument for argument in after if not argument.startswith("--processes="))


def _slurm(files: Mapping[str, str]) -> Stated:
    script = files["train.sbatch"]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    environment = {}
    for line in re.findall(r"^export (.*)$", script.partition("\n[ $# -gt 0 ]")[0], re.MULTILINE):
        name, _, value = line.partition("=")
        environment[name] = shlex.split(value)[0] if value else ""
    arguments = re.search(r"^\[ \$# -gt 0 \] \|\| set -- (.*)$", script, re.MULTILINE)
    restarts = re.search(r"^RESTARTS=(\d+)$", script, re.MULTILINE)
    again = re.search(r"^AGAIN=(\d+)$", script, re.MULTILINE)
    assert arguments
    assert restarts
    assert again
    return Stated(
        arguments=tuple(shlex.split(arguments[1])),
        environment=environment,
        nodes=int(options["nodes"]),
        gpus=int(options.get("gpus-per-node", 0)),
        cpus=int(options["cpus-per-task"]),
        memory_gib=int(options["mem"].removesuffix("G")),
        machine="",
        grace=f"{options['signal'].partition('@')[2]} s before the time limit",
        retry=f"{restarts[1]} requeues after a lost process",
        again="requeued, not counted" if again[1] == "85" else again[1],
    )


def _pod(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    limits = container["resources"]["limits"]
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    variables = {entry["name"]: entry.get("value", "").replace("$$", "$") for entry in container["env"]}
    return {
        "environment": _of_job(variables),
        "gpus": int(limits.get("nvidia.com/gpu", 0)),
        "cpus": int(limits["cpu"]),
        "memory_gib": int(limits["memory"].removesuffix("Gi")),
        "machine": "",
        "grace": f"{pod['terminationGracePeriodSeconds']} s",
        "volumes": {
            mount["mountPath"]: claims[mount["name"]] for mount in container["volumeMounts"] if mount["name"] in claims
        },
    }


def _kubernetes(files: Mapping[str, str]) -> Stated:
    spec = yaml.safe_load(files["jobset.yaml"])["spec"]
    template = spec["replicatedJobs"][0]["template"]["spec"]
    pod = template["template"]["spec"]
    (container,) = pod["containers"]
    command = [argument.replace("$$", "$") for argument in [*container["command"], *container["args"]]]
    ignored = [
        status
        for rule in template["podFailurePolicy"]["rules"]
        if rule["action"] == "Ignore" and "onExitCodes" in rule
        for status in rule["onExitCodes"]["values"]
    ]
    return Stated(
        arguments=_main_arguments(command),
        nodes=template["completions"],
        retry=f"{spec['failurePolicy']['maxRestarts']} restarts of all pods",
        again="the pod starts again, not counted" if ignored == [85] else str(ignored),
        **_pod(pod),
    )


def _kuberay(files: Mapping[str, str]) -> Stated:
    spec = yaml.safe_load(files["rayjob.yaml"])["spec"]
    (workers,) = spec["rayClusterSpec"]["workerGroupSpecs"]
    entrypoint = shlex.split(spec["entrypoint"])
    (restarts,) = (word.partition("=")[2] for word in entrypoint if word.startswith("--restarts="))
    return Stated(
        arguments=_main_arguments(entrypoint),
        nodes=workers["replicas"],
        retry=f"{restarts} restarts of all processes by the entry point",
        again="all processes start again, not counted",
        **_pod(workers["template"]["spec"]),
    )


def _aws_batch(files: Mapping[str, str]) -> Stated:
    definition = json.loads(files["job-definition.json"])
    (group,) = definition["nodeProperties"]["nodeRangeProperties"]
    container = group["container"]
    needs = {entry["type"]: int(entry["value"]) for entry in container["resourceRequirements"]}
    retry = definition["retryStrategy"]
    again = [rule["action"] for rule in retry["evaluateOnExit"] if rule["onExitCode"] == "85"]
    sources = {entry["name"]: entry["efsVolumeConfiguration"]["fileSystemId"] for entry in container["volumes"]}
    return Stated(
        arguments=_main_arguments(container["command"]),
        environment=_of_job({entry["name"]: entry["value"] for entry in container["environment"]}),
        nodes=definition["nodeProperties"]["numNodes"],
        gpus=needs.get("GPU", 0),
        cpus=needs["VCPU"],
        memory_gib=needs["MEMORY"] // 1024,
        machine="",
        grace=f"{TARGETS['aws-batch'].fixed_grace_s} s, set by the compute environment",
        retry=f"{retry['attempts']} attempts in all, the most that AWS Batch allows",
        again="started again, one of the attempts" if again == ["RETRY"] else str(again),
        volumes={entry["containerPath"]: sources[entry["sourceVolume"]] for entry in container["mountPoints"]},
    )


def _supervision(command: list[str]) -> dict[str, str]:
    """How the command under `crcjax supervise` is started again."""
    (failures,) = (word.partition("=")[2] for word in command if word.startswith("--max-failures="))
    return {
        "retry": f"{int(failures) - 1} in series, by crcjax supervise",
        "again": "started again, not counted",
    }


def _sagemaker(files: Mapping[str, str]) -> Stated:
    request = json.loads(files["training-job.json"])
    command = request["AlgorithmSpecification"]["ContainerEntrypoint"]
    return Stated(
        arguments=_main_arguments(command),
        environment=_of_job(request["Environment"]),
        nodes=request["ResourceConfig"]["InstanceCount"],
        gpus=None,
        cpus=None,
        memory_gib=None,
        machine=request["ResourceConfig"]["InstanceType"],
        grace=f"{TARGETS['sagemaker'].fixed_grace_s} s, set by SageMaker",
        volumes={
            f"/opt/ml/input/data/{channel['ChannelName']}": channel["DataSource"]["FileSystemDataSource"][
                "FileSystemId"
            ]
            for channel in request["InputDataConfig"]
        },
        **_supervision(command),
    )


def _azure_ml(files: Mapping[str, str]) -> Stated:
    manifest = yaml.safe_load(files["job.yml"])
    command = shlex.split(manifest["command"])
    return Stated(
        arguments=_main_arguments(command),
        environment=_of_job(manifest["environment_variables"]),
        nodes=manifest["resources"]["instance_count"],
        gpus=None,
        cpus=None,
        memory_gib=None,
        machine=f"machines of {manifest['compute'].removeprefix('azureml:')}",
        grace=f"{TARGETS['azure-ml'].fixed_grace_s} s with spot capacity",
        volumes={
            f"${{{{{kind}.{name}}}}}": entry["path"]
            for kind in ("inputs", "outputs")
            for name, entry in manifest.get(kind, {}).items()
        },
        **_supervision(command),
    )


def _vertex(files: Mapping[str, str]) -> Stated:
    spec = yaml.safe_load(files["custom-job.yaml"])
    pools = spec["workerPoolSpecs"]
    container, machine = pools[0]["containerSpec"], pools[0]["machineSpec"]
    return Stated(
        arguments=_main_arguments(container["command"]),
        environment=_of_job({entry["name"]: entry["value"] for entry in container["env"]}),
        nodes=sum(pool["replicaCount"] for pool in pools),
        gpus=machine.get("acceleratorCount", 0),
        cpus=None,
        memory_gib=None,
        machine=machine["machineType"],
        grace=f"{TARGETS['vertex'].fixed_grace_s} s with spot capacity",
        volumes={
            f"/mnt/nfs/{mount['mountPoint']}": f"{mount['server']}:{mount['path']}" for mount in pools[0]["nfsMounts"]
        },
        **_supervision(container["command"]),
    )


_READERS = {
    "slurm": _slurm,
    "kubernetes": _kubernetes,
    "kuberay": _kuberay,
    "aws-batch": _aws_batch,
    "sagemaker": _sagemaker,
    "azure-ml": _azure_ml,
    "vertex": _vertex,
}
