"""A training job as a command job of Azure Machine Learning."""

from __future__ import annotations

import shlex
from typing import Any

import yaml

from crcjax.errors import InputError
from crcjax.launching.cloud_volumes import cloud_sources, moved, supervised
from crcjax.launching.job import TrainingJob
from crcjax.launching.kubernetes import needed_image

_SCHEMA = "https://azuremlschemas.azureedge.net/latest/commandJob.schema.json"
_ABOUT = """# Rendered by crcjax launch render: edit the job's TOML file, not this one. The workspace is that of
#   az configure --defaults group=GROUP workspace=WORKSPACE
"""
_DATASTORE = ("azure", r"azureml://datastores/[\w-]+/paths/\S*", "azureml://datastores/NAME/paths/PATH")


def azure_ml_files(job: TrainingJob) -> dict[str, str]:
    """The YAML file of `az ml job create`. Raises InputError: a field is missing."""
    if job.azure_ml is None:
        raise InputError("the job needs the table [azure_ml] with compute for Azure ML; add it, as in launch/job.toml")
    sources = cloud_sources(job, *_DATASTORE)
    # Azure ML replaces these by the folders in which it mounts inputs and outputs, whose names have no hyphens.
    folders = {
        volume.path: f"${{{{{'inputs' if volume.read_only else 'outputs'}.{volume.claim.replace('-', '_')}}}}}"
        for volume in job.volumes
    }
    mounts = {path.rstrip("/"): folder for path, folder in folders.items()}
    command = supervised(job, [moved(argument, mounts) for argument in job.arguments])
    manifest: dict[str, Any] = {
        "$schema": _SCHEMA,
        "type": "command",
        "display_name": job.name,
        "experiment_name": job.name,
        "compute": f"azureml:{job.azure_ml.compute}",
        "environment": {"image": needed_image(job)},
        "command": f'cd "{folders[job.volumes[0].path]}" && exec {shlex.join(command)}',
        # One process a machine; Azure ML sets MASTER_ADDR, RANK and WORLD_SIZE (crcjax.parallel.cloud_env).
        "distribution": {"type": "pytorch", "process_count_per_instance": 1},
        "resources": {"instance_count": job.nodes},
        "limits": {"timeout": job.time_limit_h * 3600},
        "environment_variables": {
            "HOME": "/tmp",
            **{name: moved(value, mounts) for name, value in job.environment.items()},
        },
    }
    if job.shared_memory_gib:
        manifest["resources"]["shm_size"] = f"{job.shared_memory_gib}g"
    for volume in job.volumes:
        kind, mode = ("inputs", "ro_mount") if volume.read_only else ("outputs", "rw_mount")
        entry = {"type": "uri_folder", "path": sources[volume.path], "mode": mode}
        manifest.setdefault(kind, {})[volume.claim.replace("-", "_")] = entry
    return {"job.yml": _ABOUT + yaml.safe_dump(manifest, sort_keys=False, width=120)}
