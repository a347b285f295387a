"""Reads manifests of Kubernetes from files, builds kustomizations, and checks them against Kubernetes' own schemas."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from crcjax.errors import InputError

# The newest version of Kubernetes whose schemas kubernetes-validate 1.34 has.
_KUBERNETES = "1.34"
_OWN_KINDS = ("Deployment", "Service", "NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim")


def read_manifests(path: Path) -> list[dict[str, Any]]:
    """The objects in a YAML file, or of a folder with a kustomization, which kubectl builds without a cluster.

    Raises InputError: the path cannot be read or built, or holds no objects.
    """
    if path.is_dir():
        text = _built(path)
    else:
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{path}: cannot be read ({error}); give a YAML file or a folder with a kustomization"
            ) from error
    try:
        objects = [manifest for manifest in yaml.safe_load_all(text) if manifest is not None]
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}; correct it") from error
    if not objects or not all(isinstance(manifest, dict) for manifest in objects):
        raise InputError(f"{path} must hold objects of Kubernetes, got none or other values")
    return objects


def _built(folder: Path) -> str:
    beside = Path(sys.executable).with_name("kubectl")
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is None:
        raise InputError(f"{folder} is built by kubectl, which is not on the PATH; install it, or give a YAML file")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{folder} cannot be built: {' '.join(done.stderr.split())}")
    return done.stdout


def schema_faults(manifests: list[dict[str, Any]]) -> list[str]:
    """What Kubernetes' own schemas say about its own kinds, and about the pods of a JobSet. Needs kubernetes-validate."""
    import kubernetes_validate

    faults = []
    for manifest in manifests:
        kind, name = manifest.get("kind"), manifest.get("metadata", {}).get("name")
        checked = [manifest] if kind in _OWN_KINDS else []
        if kind == "JobSet":
            inner = [job["template"] for job in manifest["spec"]["replicatedJobs"]]
            checked = [{"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **job} for job in inner]
        for one in checked:
            try:
                kubernetes_validate.validate(one, _KUBERNETES, strict=True)
            except kubernetes_validate.ValidationError as error:
                faults.append(f"{kind} {name}: {'.'.join(map(str, error.path))}: {error.message[:200]}")
    return faults


def longest_save_s(run: Path) -> float:
    """The longest time in seconds that a checkpoint of a run took to save. Raises InputError: no save is recorded."""
    path = run / "events.jsonl"
    try:
        events = [json.loads(line) for line in path.read_text().splitlines()]
        seconds = [float(event["facts"]["seconds"]) for event in events if event.get("kind") == "checkpoint_saved"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{path}: cannot be read ({error}); give the --workdir of a run that saved checkpoints"
        ) from error
    if not seconds:
        raise InputError(f"{path} records no saved checkpoint; give the --workdir of a run that saved one")
    return max(seconds)
