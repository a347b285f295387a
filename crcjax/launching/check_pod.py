"""Checks the specification of a pod: volumes, security, resources, secrets and the time to save."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

_SECRET_NAME = re.compile(r"SECRET|PASSWORD|TOKEN|API_KEY")


def pod_faults(pod: dict[str, Any], least_grace_s: int) -> Iterator[str]:
    """The faults of a pod's specification, each as a sentence; `least_grace_s` 0 leaves the grace period to the caller."""
    grace_s = pod.get("terminationGracePeriodSeconds", 30)
    if grace_s < least_grace_s:
        yield f"terminationGracePeriodSeconds must be at least {least_grace_s}, in which a checkpoint is saved, got {grace_s}"
    yield from _security(pod)
    yield from _volumes(pod)
    names = [container.get("name") for container in pod["containers"]]
    if len(set(names)) < len(names):
        yield f"containers must have different names, got {names}"
    for container in pod["containers"]:
        yield from (f"container {container.get('name')}: {fault}" for fault in _container(container, pod))


def _security(pod: dict[str, Any]) -> Iterator[str]:
    context = pod.get("securityContext", {})
    if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
        yield "securityContext must set runAsNonRoot and a runAsUser other than 0"
    if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
        yield "securityContext.seccompProfile.type must be RuntimeDefault"
    if not context.get("fsGroup"):
        yield "securityContext.fsGroup must be set, so that the pod's user can write its volumes"
    if pod.get("automountServiceAccountToken") is not False:
        yield "automountServiceAccountToken must be false: crcjax never speaks with Kubernetes"
    for name in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(name):
            yield f"{name} must not be set"


def _volumes(pod: dict[str, Any]) -> Iterator[str]:
    names = [volume["name"] for volume in pod.get("volumes", [])]
    if len(set(names)) < len(names):
        yield f"volumes must have different names, got {names}"
    mounted = {mount["name"] for container in pod["containers"] for mount in container.get("volumeMounts", [])}
    for name in sorted(set(names) - mounted):
        yield f"the volume {name} is mounted nowhere"
    for name in sorted(mounted - set(names)):
        yield f"a mount names the volume {name}, which the pod does not have"
    for volume in pod.get("volumes", []):
        if "hostPath" in volume:
            yield f"the volume {volume['name']} must not be a hostPath: a folder of the node outlives and endangers it"
        if "secret" in volume and not volume["secret"].get("secretName"):
            yield f"the volume {volume['name']} must name its secret"
        if "secret" in volume and volume["secret"].get("defaultMode", 0o644) & 0o007:
            yield f"the volume {volume['name']} must not be readable by others; set defaultMode 288 (0440)"


def _container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    for name, value in (("allowPrivilegeEscalation", False), ("readOnlyRootFilesystem", True)):
        if context.get(name) is not value:
            yield f"securityContext.{name} must be {str(value).lower()}"
    if context.get("privileged") or context.get("runAsUser") == 0 or context.get("capabilities", {}).get("add"):
        yield "securityContext must not give privileges, root or capabilities"
    if context.get("capabilities", {}).get("drop") != ["ALL"]:
        yield "securityContext.capabilities.drop must be [ALL]"
    image = container.get("image", "")
    tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"image must have a version or a digest, got {image!r}"
    yield from _resources(container.get("resources", {}))
    paths = [mount["mountPath"] for mount in container.get("volumeMounts", [])]
    if len(set(paths)) < len(paths):
        yield f"volumeMounts must have different paths, got {paths}"
    yield from _environment(container, pod)
    ports = [port.get("name") for port in container.get("ports", [])]
    if None in ports or len(set(ports)) < len(ports):
        yield f"ports must have names, each its own, got {ports}"
    if container.get("workingDir") and not any(_lies_in(container["workingDir"], path) for path in paths):
        yield f"workingDir must lie in a volume, got {container['workingDir']}"


def _resources(resources: dict[str, Any]) -> Iterator[str]:
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in ("cpu", "memory"):
        if name not in requests or name not in limits:
            yield f"resources must request and limit {name}"
    if requests != limits:
        yield f"resources.requests must equal limits, got {requests} and {limits}: the pod would be ended before others"
    if "memory" in limits and not re.fullmatch(r"\d+(Mi|Gi|Ti)", str(limits["memory"])):
        yield f"resources.limits.memory must be in Mi, Gi or Ti, got {limits['memory']!r}"
    elif "memory" in limits and _gib(limits["memory"]) < 1:
        yield f"resources.limits.memory must be at least 1Gi, got {limits['memory']!r}"


def _environment(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
    by_name = {volume["name"]: volume for volume in pod.get("volumes", [])}
    names = [entry["name"] for entry in container.get("env", [])]
    if len(set(names)) < len(names):
        yield f"env must have different names, got {names}"
    variables = {entry["name"]: entry for entry in container.get("env", [])}
    for name, entry in variables.items():
        if _SECRET_NAME.search(name) and not name.endswith("_FILE") and "value" in entry:
            yield f"the variable {name} must come from a Secret (valueFrom), not stand in the manifest"
    for argument in [*container.get("command", []), *container.get("args", [])]:
        if re.match(r"--[\w.-]*(secret|password|token)[\w.-]*=", argument, re.IGNORECASE):
            yield f"the argument {argument.partition('=')[0]} must not stand in the manifest; mount a Secret"
    home = variables.get("HOME", {}).get("value", "")
    if not any(_lies_in(home, path) and not mount.get("readOnly") for path, mount in mounts.items()):
        yield f"HOME must lie in a volume that can be written, got {home!r}"
    if container.get("name") != "train":
        return
    secret = variables.get("CRCJAX_RENDEZVOUS_SECRET_FILE", {}).get("value", "")
    holder = next((mount["name"] for path, mount in mounts.items() if _lies_in(secret, path)), "")
    if "secret" not in by_name.get(holder, {}):
        yield f"CRCJAX_RENDEZVOUS_SECRET_FILE must lie in the volume of a Secret, got {secret!r}"
    claims = [name for name, volume in by_name.items() if "persistentVolumeClaim" in volume]
    if not any(mount["name"] in claims and not mount.get("readOnly") for mount in mounts.values()):
        yield "a persistent volume must be mounted writable, for the run's checkpoints"
    if "nvidia.com/gpu" in container.get("resources", {}).get("limits", {}):
        shared = by_name.get(mounts.get("/dev/shm", {}).get("name", ""), {}).get("emptyDir", {})
        if shared.get("medium") != "Memory" or not shared.get("sizeLimit"):
            yield "/dev/shm must be an emptyDir of medium Memory with a sizeLimit: NCCL fails with the default of 64 MiB"
        elif _gib(shared["sizeLimit"]) >= _gib(container["resources"]["limits"].get("memory", "0Gi")):
            yield f"the sizeLimit of /dev/shm must be less than the pod's memory, got {shared['sizeLimit']}"
    if pod.get("restartPolicy") != "Never":
        yield f"restartPolicy must be Never: processes start again together, got {pod.get('restartPolicy')}"


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(f"{folder.rstrip('/')}/")


def _gib(quantity: str) -> float:
    number = re.match(r"\d+", str(quantity))
    factor = {"Mi": 2**-10, "Gi": 1.0, "Ti": 2.0**10}.get(str(quantity)[-2:], 2**-30)
    return float(number[0]) * factor if number else 0.0
