"""Checks manifests of Kubernetes for faults that its schemas accept: references that lead nowhere, pods that lose work or data.

Each fault is one sentence that names the object and the field, states what was found, and says what it must be.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from crcjax.errors import AGAIN_STATUS
from crcjax.launching.check_pod import pod_faults
from crcjax.launching.kubernetes import FINAL_STATUSES

Manifest = dict[str, Any]
_WORKLOADS = ("Deployment", "JobSet", "RayJob")


@dataclass(frozen=True)
class Pods:
    """A pod template of a workload: where it stands, its labels and its specification."""

    where: str
    labels: dict[str, str]
    spec: dict[str, Any]


def manifest_faults(manifests: list[Manifest], least_grace_s: int) -> list[str]:
    """Like `_faults`; manifests that lack what every object of their kind has are a fault themselves."""
    try:
        return _faults(manifests, least_grace_s)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        return [f"a manifest lacks a field, or has one of a wrong type: {type(error).__name__}: {error}"]


def _faults(manifests: list[Manifest], least_grace_s: int) -> list[str]:
    """The faults of manifests that are applied together.

    Args:
      manifests: objects of Kubernetes.
      least_grace_s: seconds that a training's pod needs between the signal to stop and its end, from the longest measured save.
    """
    faults = []
    templates = [template for manifest in manifests for template in _templates(manifest)]
    for manifest in manifests:
        check = _CHECKS.get(manifest.get("kind", ""))
        name = f"{manifest.get('kind', 'an object')} {manifest.get('metadata', {}).get('name', 'without a name')}"
        if "kind" not in manifest or "apiVersion" not in manifest or not manifest.get("metadata", {}).get("name"):
            faults.append(f"{name}: kind, apiVersion and metadata.name must be given")
        if check:
            faults += [f"{name}: {fault}" for fault in check(manifest["spec"], manifests, templates)]
    for template in templates:
        is_service = template.where.startswith("Deployment")
        faults += [
            f"{template.where}: {fault}" for fault in pod_faults(template.spec, 0 if is_service else least_grace_s)
        ]
        if not any(
            _selects(policy["spec"].get("podSelector"), template.labels) for policy in _of(manifests, "NetworkPolicy")
        ):
            faults.append(f"{template.where}: a NetworkPolicy must select its pods, got none")
        budgets = _of(manifests, "PodDisruptionBudget")
        if is_service and not any(_selects(budget["spec"].get("selector"), template.labels) for budget in budgets):
            faults.append(f"{template.where}: a PodDisruptionBudget must select its pods, got none")
    names = [(manifest.get("kind"), manifest.get("metadata", {}).get("name")) for manifest in manifests]
    faults += [
        f"{kind} {name} is described twice" for kind, name in sorted({key for key in names if names.count(key) > 1})
    ]
    return faults


def _of(manifests: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest.get("kind") == kind]


def _templates(manifest: Manifest) -> Iterator[Pods]:
    kind, name = manifest.get("kind"), manifest.get("metadata", {}).get("name")
    spec = manifest.get("spec", {})
    if kind == "Deployment":
        templates = [("", spec["template"])]
    elif kind == "JobSet":
        templates = [(f" {job['name']}", job["template"]["spec"]["template"]) for job in spec["replicatedJobs"]]
    elif kind == "RayJob":
        cluster = spec["rayClusterSpec"]
        templates = [(" head", cluster["headGroupSpec"]["template"])]
        templates += [(f" {group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
    else:
        return
    for part, template in templates:
        yield Pods(f"{kind} {name}{part}", template.get("metadata", {}).get("labels", {}), template["spec"])


def _selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    wanted = (selector or {}).get("matchLabels", selector or {})
    return bool(wanted) and wanted.items() <= labels.items()


def _port_names(template: Pods) -> set[str]:
    return {port.get("name") for container in template.spec["containers"] for port in container.get("ports", [])}


def _deployment(spec: dict[str, Any], _: list[Manifest], __: list[Pods]) -> Iterator[str]:
    template = spec["template"]
    if not _selects(spec.get("selector"), template.get("metadata", {}).get("labels", {})):
        yield "spec.selector must select the labels of its own template"
    claims = [volume for volume in template["spec"].get("volumes", []) if "persistentVolumeClaim" in volume]
    writes = any(not volume["persistentVolumeClaim"].get("readOnly") for volume in claims)
    if writes and spec.get("replicas", 1) != 1:
        yield f"replicas must be 1, got {spec.get('replicas')}: one process uses a state folder at a time"
    if writes and spec.get("strategy", {}).get("type") != "Recreate":
        yield "strategy.type must be Recreate: the new pod must not open the state folder of the old one"
    if not writes:
        yield "a volume must hold the state folder; a pod's own storage is lost with it"
    for container in template["spec"]["containers"]:
        yield from _service_container(container, template["spec"])


def _service_container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    options = dict(argument.removeprefix("--").partition("=")[::2] for argument in container.get("args", []))
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", [])}
    for option in ("bundle", "state", "keys", "certificate", "key"):
        path = options.get(option, "").removeprefix("file:")
        if not path:
            yield f"the argument --{option} must be given"
        elif not any(path == mount or path.startswith(f"{mount}/") for mount in mounts):
            yield f"--{option} must lie in a volume, got {path}, which none of {', '.join(mounts)} holds"
    state = options.get("state", "")
    for path, mount in mounts.items():
        if state.startswith(path) and mount.get("readOnly"):
            yield f"the volume at {path} must be writable, since --state lies there"
    if options.get("host") != "0.0.0.0":
        yield f"--host must be 0.0.0.0, got {options.get('host')!r}: only that reaches the pod's address"
    ports = [port["containerPort"] for port in container.get("ports", [])]
    if options.get("port", "8443") not in map(str, ports):
        yield f"--port must be one of the container's ports {ports}, got {options.get('port')}"
    # Besides draining, the service waits 10 s for its workers, and closes connections within 5 s.
    needed_s = float(options.get("drain-s", 30)) + 15
    grace_s = pod.get("terminationGracePeriodSeconds", 30)
    if grace_s < needed_s:
        yield f"terminationGracePeriodSeconds must be at least --drain-s and 15 s more, {needed_s:g}, got {grace_s}"
    yield from _probes(container)


# Seconds in which a worker must be able to load a model before the pod is ended.
_LOADING_S = 300
_PATHS = {"startupProbe": "/readyz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}


def _probes(container: dict[str, Any]) -> Iterator[str]:
    names = {port.get("name") for port in container.get("ports", [])}
    for kind, path in _PATHS.items():
        probe = container.get(kind)
        get = (probe or {}).get("httpGet")
        if probe is None or get is None:
            yield f"{kind} must ask {path} by httpGet, got none"
            continue
        if get.get("path") != path:
            yield f"{kind}.httpGet.path must be {path}, got {get.get('path')!r}"
        if get.get("port") not in names:
            yield f"{kind}.httpGet.port must be one of {sorted(filter(None, names))}, got {get.get('port')!r}"
        if get.get("scheme") != "HTTPS":
            yield f"{kind}.httpGet.scheme must be HTTPS, got {get.get('scheme')!r}"
        seconds = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
        if kind == "startupProbe" and seconds < _LOADING_S:
            yield f"startupProbe must allow {_LOADING_S} s for loading a model, got {seconds}"
        if kind == "livenessProbe" and seconds < 30:
            yield f"livenessProbe must allow 30 s without an answer, got {seconds}: a busy pod would be ended"


def _job_set(spec: dict[str, Any], _: list[Manifest], __: list[Pods]) -> Iterator[str]:
    network = spec.get("network", {})
    if not (network.get("enableDNSHostnames") and network.get("publishNotReadyAddresses")):
        yield "network must set enableDNSHostnames and publishNotReadyAddresses: the processes meet before they are ready"
    if spec.get("failurePolicy", {}).get("maxRestarts", 0) < 1:
        yield "failurePolicy.maxRestarts must be at least 1: a lost process would end the job"
    rules = spec.get("failurePolicy", {}).get("rules", [])
    if not any(
        rule.get("action") == "FailJobSet" and "PodFailurePolicy" in rule.get("onJobFailureReasons", [])
        for rule in rules
    ):
        yield "failurePolicy.rules must fail the JobSet after PodFailurePolicy: the same command would fail again"
    for replicated in spec["replicatedJobs"]:
        if replicated.get("replicas", 1) != 1:
            yield f"replicatedJobs.replicas must be 1: completions are the nodes of a run, got {replicated.get('replicas')}"
        yield from _training_job(replicated["template"]["spec"])


def _training_job(job: dict[str, Any]) -> Iterator[str]:
    (container,) = job["template"]["spec"]["containers"][:1]
    nodes = job.get("completions")
    stated = [
        int(word.partition("=")[2]) for word in container.get("args", []) if re.fullmatch(r"--processes=\d+", word)
    ]
    if not (nodes == job.get("parallelism") and stated == [nodes]):
        yield f"completions, parallelism and --processes must be equal, got {nodes}, {job.get('parallelism')} and {stated}"
    if job.get("completionMode") != "Indexed":
        yield f"completionMode must be Indexed, by which a process knows its index, got {job.get('completionMode')}"
    if job.get("backoffLimit") != 0:
        yield f"backoffLimit must be 0: processes start again together, got {job.get('backoffLimit')}"
    rules = job.get("podFailurePolicy", {}).get("rules", [])
    exits: dict[str, set[int]] = {}
    for rule in rules:
        codes = rule.get("onExitCodes", {})
        if codes.get("containerName", container["name"]) != container["name"]:
            yield f"podFailurePolicy names a container {codes['containerName']!r} that the pod does not have"
        elif codes.get("operator") == "In":
            exits.setdefault(rule["action"], set()).update(codes.get("values", []))
    if exits.get("Ignore", set()) != {AGAIN_STATUS}:
        yield f"podFailurePolicy must ignore exit status {AGAIN_STATUS} alone, got {sorted(exits.get('Ignore', set()))}"
    if exits.get("FailJob", set()) != set(FINAL_STATUSES):
        yield f"podFailurePolicy must fail the job at {FINAL_STATUSES}, got {sorted(exits.get('FailJob', set()))}"
    disruption = {"type": "DisruptionTarget", "status": "True"}
    if not any(rule["action"] == "Ignore" and disruption in rule.get("onPodConditions", []) for rule in rules):
        yield "podFailurePolicy must ignore the condition DisruptionTarget: a preemption is no failure"
    if container.get("command") != ["python", "-m", "crcjax.main"]:
        yield f"command must be python -m crcjax.main, got {container.get('command')}"
    flags = {word.partition("=")[0] for word in container.get("args", [])}
    if missing := {"--config", "--workdir"} - flags:
        yield f"args must contain {' and '.join(sorted(missing))}"
    names = {
        entry["name"]: entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
        for entry in container.get("env", [])
    }
    for name, source in (("JOBSET_NAME", "jobset-name"), ("REPLICATED_JOB_NAME", "replicatedjob-name")):
        if names.get(name) != f"metadata.annotations['jobset.sigs.k8s.io/{source}']":
            yield f"the variable {name} must come from the annotation jobset.sigs.k8s.io/{source}"
    ports = {port.get("name"): port.get("containerPort") for port in container.get("ports", [])}
    if ports.get("rendezvous") != 61440:
        yield f"the port rendezvous must be 61440, at which the processes meet, got {ports.get('rendezvous')}"


def _ray_job(spec: dict[str, Any], _: list[Manifest], __: list[Pods]) -> Iterator[str]:
    if spec.get("backoffLimit", 0) != 0:
        yield f"backoffLimit must be 0: the entry point knows what exit statuses mean, got {spec.get('backoffLimit')}"
    for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
        counts = {group.get(name) for name in ("replicas", "minReplicas", "maxReplicas")}
        if len(counts) > 1 or f"--nodes={group.get('replicas')} " not in f"{spec.get('entrypoint')} ":
            yield f"replicas, minReplicas, maxReplicas and the entry point's --nodes must be equal, got {sorted(map(str, counts))}"


def _service(spec: dict[str, Any], _: list[Manifest], templates: list[Pods]) -> Iterator[str]:
    selected = [template for template in templates if _selects(spec.get("selector"), template.labels)]
    if not selected:
        yield f"selector must select the pods of a workload here, got {spec.get('selector')}"
    for port in spec.get("ports", []):
        target = port.get("targetPort", port.get("port"))
        if selected and not any(target in _port_names(template) for template in selected):
            yield f"targetPort must be the name of a port of its pods, got {target!r}"
        if not port.get("name"):
            yield "each port must have a name, by which meshes and monitors know its protocol"


def _network_policy(spec: dict[str, Any], _: list[Manifest], templates: list[Pods]) -> Iterator[str]:
    selected = [template for template in templates if _selects(spec.get("podSelector"), template.labels)]
    if not selected:
        yield f"podSelector must select the pods of a workload here, got {spec.get('podSelector')}"
    if "Ingress" not in spec.get("policyTypes", []):
        yield "policyTypes must contain Ingress: all pods of the cluster would reach these"
    for rule in spec.get("ingress", []):
        if not rule.get("from") or {} in rule["from"]:
            yield "each ingress rule must say from whom, got a rule for all"
        for port in rule.get("ports", []):
            named = port.get("port")
            if isinstance(named, str) and selected and not any(named in _port_names(template) for template in selected):
                yield f"ingress names a port {named!r} that its pods do not have"
    own = {"podSelector": {"matchLabels": spec.get("podSelector", {}).get("matchLabels")}}
    is_training = any(not template.where.startswith("Deployment") for template in selected)
    if is_training and not any(own in rule.get("from", []) for rule in spec.get("ingress", [])):
        yield "ingress must admit the job's own pods, which exchange gradients"
    if not spec.get("ingress"):
        yield "ingress must admit somebody: nobody would reach these pods"


def _disruption_budget(spec: dict[str, Any], _: list[Manifest], templates: list[Pods]) -> Iterator[str]:
    if not any(_selects(spec.get("selector"), template.labels) for template in templates):
        yield f"selector must select the pods of a workload here, got {spec.get('selector')}"
    if spec.get("maxUnavailable") == 0 or spec.get("minAvailable"):
        yield "maxUnavailable must be at least 1: with one pod, a node could never be drained"


def _service_monitor(spec: dict[str, Any], manifests: list[Manifest], _: list[Pods]) -> Iterator[str]:
    services = [
        service
        for service in _of(manifests, "Service")
        if _selects(spec.get("selector"), service["metadata"].get("labels", {}))
    ]
    if not services:
        yield f"selector must select the labels of a Service here, got {spec.get('selector')}"
    names = {port.get("name") for service in services for port in service["spec"].get("ports", [])}
    for endpoint in spec.get("endpoints", []):
        if services and endpoint.get("port") not in names:
            yield f"endpoints.port must be the name of a port of the Service, got {endpoint.get('port')!r}"
        if endpoint.get("path") != "/metrics" or endpoint.get("scheme") != "https":
            yield "endpoints must read /metrics by https"


def _claim(spec: dict[str, Any], _: list[Manifest], __: list[Pods]) -> Iterator[str]:
    if set(spec.get("accessModes", [])) - {"ReadWriteOncePod", "ReadWriteMany", "ReadOnlyMany"}:
        yield f"accessModes must be ReadWriteOncePod for a state folder or ReadWriteMany for a run, got {spec.get('accessModes')}"


_CHECKS: dict[str, Callable[[dict[str, Any], list[Manifest], list[Pods]], Iterator[str]]] = {
    "Deployment": _deployment,
    "JobSet": _job_set,
    "RayJob": _ray_job,
    "Service": _service,
    "NetworkPolicy": _network_policy,
    "PodDisruptionBudget": _disruption_budget,
    "ServiceMonitor": _service_monitor,
    "PersistentVolumeClaim": _claim,
}
