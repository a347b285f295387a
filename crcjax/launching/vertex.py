"""A training job as a custom job of Vertex AI."""

from __future__ import annotations

from typing import Any

import yaml

from crcjax.errors import InputError
from crcjax.launching.cloud_volumes import cloud_sources, in_folder, moved, supervised
from crcjax.launching.job import TrainingJob
from crcjax.launching.kubernetes import needed_image

_ABOUT = "# Rendered by crcjax launch render: edit the job's TOML file, not this one.\n"
# Where Vertex AI mounts shares.
_SHARES = "/mnt/nfs"
_NFS = ("gcp", r"[\w.-]+:/\S+", "an NFS share, SERVER:/SHARE")


def vertex_files(job: TrainingJob) -> dict[str, str]:
    """The file of `gcloud ai custom-jobs create --config`. Raises InputError: a field is missing."""
    cloud = job.vertex
    if cloud is None:
        raise InputError(
            "the job needs the table [vertex] with region and machine_type for Vertex AI; add it, as in launch/job.toml"
        )
    sources = cloud_sources(job, *_NFS)
    mounts = {volume.path.rstrip("/"): f"{_SHARES}/{volume.claim}" for volume in job.volumes}
    if job.gpus_per_node and not cloud.accelerator:
        raise InputError("vertex's field accelerator must name the GPUs, such as NVIDIA_H100_80GB, got none; add it")
    machine: dict[str, Any] = {"machineType": cloud.machine_type}
    if job.gpus_per_node:
        machine |= {"acceleratorType": cloud.accelerator, "acceleratorCount": job.gpus_per_node}
    environment = {"HOME": "/tmp", **{name: moved(value, mounts) for name, value in job.environment.items()}}
    command = supervised(job, [moved(argument, mounts) for argument in job.arguments])
    pool: dict[str, Any] = {
        "machineSpec": machine,
        "containerSpec": {
            "imageUri": needed_image(job),
            "command": in_folder(f"{_SHARES}/{job.volumes[0].claim}", command),
            "env": [{"name": name, "value": value} for name, value in environment.items()],
        },
        "nfsMounts": [
            {
                "server": sources[volume.path].partition(":")[0],
                "path": sources[volume.path].partition(":")[2],
                "mountPoint": volume.claim,
            }
            for volume in job.volumes
        ],
    }
    # The first pool is process 0 alone; the others are a pool of their own.
    counts = [1, job.nodes - 1] if job.nodes > 1 else [1]
    spec: dict[str, Any] = {
        "workerPoolSpecs": [{**pool, "replicaCount": count} for count in counts],
        "scheduling": {
            "timeout": f"{job.time_limit_h * 3600}s",
            "restartJobOnWorkerRestart": True,
            "strategy": "SPOT" if job.spot else "STANDARD",
        },
    }
    if cloud.network:
        spec["network"] = cloud.network
    if cloud.service_account:
        spec["serviceAccount"] = cloud.service_account
    dumper = type("_Dumper", (yaml.SafeDumper,), {"ignore_aliases": lambda *_: True})
    return {"custom-job.yaml": _ABOUT + yaml.dump(spec, Dumper=dumper, sort_keys=False, width=120)}
