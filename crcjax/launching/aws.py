"""A training job as inputs of the AWS command line: for AWS Batch and for SageMaker."""

from __future__ import annotations

import json
from typing import Any

from crcjax.errors import AGAIN_STATUS, InputError
from crcjax.launching.cloud_volumes import cloud_sources, in_folder, moved, supervised
from crcjax.launching.job import TrainingJob
from crcjax.launching.kubernetes import FINAL_STATUSES, USER, needed_image

# AWS Batch starts a job at most ten times, and SageMaker starts one again at most thirty times.
_BATCH_ATTEMPTS = 10
_SAGEMAKER_RETRIES = 30
_CHANNELS = "/opt/ml/input/data"
# SageMaker describes the machines of a job to its containers in this file (crcjax.parallel.cloud_env).
_HOSTS_FILE = "/opt/ml/input/config/resourceconfig.json"
_EFS = ("efs", r"fs-[0-9a-f]{8,17}", "the id of an Elastic File System, fs-…")


def aws_batch_files(job: TrainingJob) -> dict[str, str]:
    """A job definition of several nodes, and the input of submit-job. Raises InputError: a field is missing."""
    if job.aws_batch is None:
        raise InputError("the job needs the table [aws_batch] with queue for AWS Batch; add it, as in launch/job.toml")
    sources = cloud_sources(job, *_EFS)
    gpus = [{"type": "GPU", "value": str(job.gpus_per_node)}] if job.gpus_per_node else []
    environment = {"HOME": "/tmp", **job.environment}
    claims = {volume.claim: sources[volume.path] for volume in job.volumes}
    container: dict[str, Any] = {
        "image": needed_image(job),
        "command": in_folder(job.volumes[0].path, ["python", "-m", "crcjax.main", *job.arguments]),
        "resourceRequirements": [
            {"type": "VCPU", "value": str(job.cpus_per_node)},
            {"type": "MEMORY", "value": str(job.memory_gib * 1024)},
            *gpus,
        ],
        "environment": [{"name": name, "value": value} for name, value in environment.items()],
        "volumes": [
            {"name": claim, "efsVolumeConfiguration": {"fileSystemId": source, "transitEncryption": "ENABLED"}}
            for claim, source in claims.items()
        ],
        "mountPoints": [
            {"sourceVolume": volume.claim, "containerPath": volume.path, "readOnly": volume.read_only}
            for volume in job.volumes
        ],
        "user": str(USER),
        "privileged": False,
    }
    if job.shared_memory_gib:
        container["linuxParameters"] = {"sharedMemorySize": job.shared_memory_gib * 1024}
    if job.aws_batch.role_arn:
        container["jobRoleArn"] = container["executionRoleArn"] = job.aws_batch.role_arn
    if job.aws_batch.secret_arn:
        container["secrets"] = [{"name": "CRCJAX_RENDEZVOUS_SECRET", "valueFrom": job.aws_batch.secret_arn}]
    rules = [{"onExitCode": str(status), "action": "EXIT"} for status in FINAL_STATUSES]
    definition = {
        "jobDefinitionName": job.name,
        "type": "multinode",
        "nodeProperties": {
            "numNodes": job.nodes,
            "mainNode": 0,
            "nodeRangeProperties": [{"targetNodes": f"0:{job.nodes - 1}", "container": container}],
        },
        # What follows the rules is tried again: a lost machine or process, and a run that saved before its machine was taken.
        "retryStrategy": {
            "attempts": _BATCH_ATTEMPTS,
            "evaluateOnExit": [*rules, {"onExitCode": str(AGAIN_STATUS), "action": "RETRY"}],
        },
        "timeout": {"attemptDurationSeconds": job.time_limit_h * 3600},
    }
    submission = {"jobName": job.name, "jobQueue": job.aws_batch.queue, "jobDefinition": job.name}
    return {"job-definition.json": _text(definition), "submit-job.json": _text(submission)}


def sagemaker_files(job: TrainingJob) -> dict[str, str]:
    """The input of create-training-job. Raises InputError: a field is missing."""
    cloud = job.sagemaker
    if cloud is None:
        raise InputError(
            "the job needs the table [sagemaker] with instance_type, role_arn, output, subnets and security_groups for "
            "SageMaker; add it, as in launch/job.toml"
        )
    sources = cloud_sources(job, *_EFS)
    mounts = {volume.path.rstrip("/"): f"{_CHANNELS}/{volume.claim}" for volume in job.volumes}
    arguments = [moved(argument, mounts) for argument in job.arguments]
    first_mount = f"{_CHANNELS}/{job.volumes[0].claim}"
    limit_s = job.time_limit_h * 3600
    own = {"CRCJAX_HOSTS_FILE": _HOSTS_FILE, "HOME": "/tmp"}
    stopping = {"MaxRuntimeInSeconds": limit_s}
    if job.spot:
        # The longest time for the job with all waits for capacity.
        stopping["MaxWaitTimeInSeconds"] = 2 * limit_s
    request: dict[str, Any] = {
        "TrainingJobName": job.name,
        "RoleArn": cloud.role_arn,
        "AlgorithmSpecification": {
            "TrainingImage": needed_image(job),
            "TrainingInputMode": "File",
            "ContainerEntrypoint": in_folder(first_mount, supervised(job, arguments)),
        },
        "ResourceConfig": {
            "InstanceType": cloud.instance_type,
            "InstanceCount": job.nodes,
            "VolumeSizeInGB": 100,
        },
        "InputDataConfig": [
            {
                "ChannelName": volume.claim,
                "DataSource": {
                    "FileSystemDataSource": {
                        "FileSystemId": sources[volume.path],
                        "FileSystemAccessMode": "ro" if volume.read_only else "rw",
                        "FileSystemType": "EFS",
                        "DirectoryPath": "/",
                    }
                },
            }
            for volume in job.volumes
        ],
        "OutputDataConfig": {"S3OutputPath": cloud.output},
        "VpcConfig": {"Subnets": list(cloud.subnets), "SecurityGroupIds": list(cloud.security_groups)},
        "EnableInterContainerTrafficEncryption": job.nodes > 1,
        "EnableManagedSpotTraining": job.spot,
        "Environment": {**own, **{name: moved(value, mounts) for name, value in job.environment.items()}},
        "StoppingCondition": stopping,
    }
    if job.restarts:
        request["RetryStrategy"] = {"MaximumRetryAttempts": min(job.restarts, _SAGEMAKER_RETRIES)}
    return {"training-job.json": _text(request)}


def _text(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
