"""Writes the files of a platform for a job, and submits them by the platform's own client."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from crcjax.errors import CrcjaxError, InputError, writing
from crcjax.launching.aws import aws_batch_files, sagemaker_files
from crcjax.launching.azure import azure_ml_files
from crcjax.launching.job import TrainingJob
from crcjax.launching.kuberay import kuberay_files
from crcjax.launching.kubernetes import kubernetes_files
from crcjax.launching.slurm import slurm_files
from crcjax.launching.vertex import vertex_files


@dataclass(frozen=True)
class Target:
    """A platform: its files, the commands that submit them, and the client's package or page.

    In `submit`, {folder}, {name}, {region} and {now} are filled in, with commands separated by &&. `fixed_grace_s` is the time
    between the signal to stop and the end where the platform, and not the job, decides it; 0 where the job does.
    """

    files: Callable[[TrainingJob], dict[str, str]]
    submit: str
    client: str
    fixed_grace_s: int = 0


TARGETS = {
    "slurm": Target(slurm_files, "sbatch {folder}/train.sbatch", "SLURM"),
    "kubernetes": Target(kubernetes_files, "kubectl apply -k {folder}", "kubectl"),
    "kuberay": Target(kuberay_files, "kubectl apply -k {folder}", "kubectl"),
    # The agent of ECS waits 30 s by default; ECS_CONTAINER_STOP_TIMEOUT in the compute environment's launch template raises it.
    "aws-batch": Target(
        aws_batch_files,
        "aws batch register-job-definition --cli-input-json file://{folder}/job-definition.json && "
        "aws batch submit-job --cli-input-json file://{folder}/submit-job.json",
        "the AWS command line (aws)",
        30,
    ),
    "sagemaker": Target(
        sagemaker_files,
        "aws sagemaker create-training-job --cli-input-json file://{folder}/training-job.json "
        "--training-job-name {name}-{now}",
        "the AWS command line (aws)",
        120,
    ),
    # The notice of evicted spot machines.
    "azure-ml": Target(
        azure_ml_files,
        "az ml job create --file {folder}/job.yml",
        "the Azure command line (az) with its extension ml",
        30,
    ),
    # The notice of preempted spot machines.
    "vertex": Target(
        vertex_files,
        "gcloud ai custom-jobs create --region={region} --display-name={name} --config={folder}/custom-job.yaml",
        "the Google Cloud command line (gcloud)",
        30,
    ),
}


def render(job: TrainingJob, target: str, folder: Path) -> list[Path]:
    """Writes the files of the platform `target` into `folder`, replacing those of an earlier call, and returns their paths.

    Raises:
      InputError: `target` is not known, or the job lacks what it needs.
      OutputError: the folder cannot be written.
    """
    if target not in TARGETS:
        raise InputError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    text_by_name = TARGETS[target].files(job)
    with writing(folder, "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in text_by_name.items():
            (folder / name).write_text(text)
    return [folder / name for name in text_by_name]


def submit_commands(job: TrainingJob, target: str, folder: Path) -> list[list[str]]:
    """The commands that submit the rendered files in `folder`, in order."""
    values = {
        "folder": shlex.quote(str(folder)),
        "name": job.name,
        "region": shlex.quote(job.vertex.region) if job.vertex else "",
        # SageMaker refuses a name that it had before.
        "now": datetime.now(UTC).strftime("%Y%m%d-%H%M%S"),
    }
    return [shlex.split(part.format(**values)) for part in TARGETS[target].submit.split(" && ")]


def submit(commands: list[list[str]], client: str) -> None:
    """Runs the commands that submit a job; their output goes to the terminal.

    Raises:
      InputError: the platform's client is not installed.
      CrcjaxError: a command failed; the client has said why.
    """
    for command in commands:
        if shutil.which(command[0]) is None:
            raise InputError(
                f"--submit needs {client}, and {command[0]} is not on the PATH; install it, or run on a machine that has it: "
                + " && ".join(shlex.join(part) for part in commands)
            )
        status = subprocess.run(command).returncode
        if status:
            raise CrcjaxError(f"{shlex.join(command)} ended with status {status}; its message is above")


def grace_warning(job: TrainingJob, target: str) -> str:
    """A warning that the platform gives less time to save than the job asks for, or nothing."""
    seconds = TARGETS[target].fixed_grace_s
    if not 0 < seconds < job.grace_s:
        return ""
    return (
        f"{target} gives {seconds} s between the signal to stop and the end, the job asks for {job.grace_s} s; a save must take "
        "less (checkpoint_saved in RUN/events.jsonl), or the last steps since a checkpoint are lost"
    )
