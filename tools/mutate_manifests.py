"""How many mutated manifests `crcjax launch check` catches, by operator.

Each operator makes one fault at one place of the manifests in launch/kubernetes and launch/kuberay, as a hurried edit would. Half of the
mutants and more still satisfy Kubernetes' schemas. Mutants that are missed are listed.

    python tools/mutate_manifests.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crcjax.launching.check_manifests import manifest_faults
from crcjax.launching.read_manifests import read_manifests, schema_faults

ROOT = Path(__file__).parents[1]
SOURCES = ("kubernetes", "kuberay", "kubernetes/service/overlays/monitored")
Objects = list[dict[str, Any]]
Path_ = tuple[Any, ...]


def paths(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every place of a manifest with its value, inner ones too."""
    yield path, value
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from paths(inner, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from paths(inner, (*path, index))


def changed(objects: Objects, path: Path_, new: Any = None, *, delete: bool = False, key: str | None = None) -> Objects:
    """A copy with the value at a path replaced or deleted, or its key renamed."""
    copied = copy.deepcopy(objects)
    parent: Any = copied
    for step in path[:-1]:
        parent = parent[step]
    if delete:
        del parent[path[-1]]
    elif key is not None:
        parent[key] = parent.pop(path[-1])
    else:
        parent[path[-1]] = new
    return copied


def _replaced(last: set[str], new: Callable[[Any], Any], within: str = "") -> Callable[[Objects], Iterator[Objects]]:
    """An operator that replaces the values of the keys `last`, at places whose path contains `within`."""

    def operator(objects: Objects) -> Iterator[Objects]:
        for path, value in paths(objects):
            if path and path[-1] in last and within in ".".join(map(str, path)):
                yield changed(objects, path, new(value))

    return operator


def _deleted(last: set[str], within: str = "") -> Callable[[Objects], Iterator[Objects]]:
    def operator(objects: Objects) -> Iterator[Objects]:
        for path, _ in paths(objects):
            if path and path[-1] in last and within in ".".join(map(str, path)):
                yield changed(objects, path, delete=True)

    return operator


def _one_fewer(last: str) -> Callable[[Objects], Iterator[Objects]]:
    """Leaves out each entry of the lists under a key."""

    def operator(objects: Objects) -> Iterator[Objects]:
        for path, value in paths(objects):
            if path and path[-1] == last and isinstance(value, list):
                for index in range(len(value)):
                    yield changed(objects, path, value[:index] + value[index + 1 :])

    return operator


def object_left_out(objects: Objects) -> Iterator[Objects]:
    for index, manifest in enumerate(objects):
        if manifest["kind"] not in ("JobSet", "RayJob", "Deployment", "PersistentVolumeClaim", "ServiceMonitor"):
            yield objects[:index] + objects[index + 1 :]


def secret_in_plain_text(objects: Objects) -> Iterator[Objects]:
    for path, value in paths(objects):
        if path and path[-1] == "env":
            yield changed(objects, path, [*value, {"name": "DB_PASSWORD", "value": "x"}])


def host_access(objects: Objects) -> Iterator[Objects]:
    for path, value in paths(objects):
        if isinstance(value, dict) and "containers" in value:
            for name in ("hostNetwork", "hostPID"):
                yield changed(objects, (*path, name), True)


def host_path(objects: Objects) -> Iterator[Objects]:
    for path, value in paths(objects):
        if isinstance(value, dict) and "persistentVolumeClaim" in value:
            yield changed(objects, path, {"name": value["name"], "hostPath": {"path": "/data"}})


def label_changed(objects: Objects) -> Iterator[Objects]:
    for path, _ in paths(objects):
        places = [str(step) for step in path]
        is_label = places and places[-1] in ("app.kubernetes.io/instance", "app.kubernetes.io/component")
        if is_label and {"template", "matchLabels", "selector"} & set(places):
            yield changed(objects, path, "other")


def misspelt(objects: Objects) -> Iterator[Objects]:
    names = (
        "resources",
        "volumeMounts",
        "securityContext",
        "readinessProbe",
        "ports",
        "containers",
        "selector",
        "policyTypes",
    )
    for path, _ in paths(objects):
        if (
            path
            and path[-1] in names
            and objects[path[0]]["kind"] in ("Deployment", "JobSet", "Service", "NetworkPolicy")
        ):
            yield changed(objects, path, key=f"{path[-1][:-1]}e")


def wrong_type(objects: Objects) -> Iterator[Objects]:
    names = (
        "replicas",
        "completions",
        "parallelism",
        "terminationGracePeriodSeconds",
        "containerPort",
        "runAsUser",
        "periodSeconds",
    )
    for path, value in paths(objects):
        if (
            path
            and path[-1] in names
            and isinstance(value, int)
            and objects[path[0]]["kind"] in ("Deployment", "JobSet")
        ):
            yield changed(objects, path, f"{value}x")


OPERATORS: dict[str, Callable[[Objects], Iterator[Objects]]] = {
    "grace period too short": _replaced({"terminationGracePeriodSeconds"}, lambda _: 20),
    "grace period left out": _deleted({"terminationGracePeriodSeconds"}),
    "probe, service, policy or monitor names a port that does not exist": _replaced({"port", "targetPort"}, lambda _: "web"),
    "port of a container renamed": _replaced({"name"}, lambda name: f"{name}s", "ports"),
    "number of a container's port changed": _replaced({"containerPort"}, lambda _: 9999),
    "volume left out": _one_fewer("volumes"),
    "mount left out": _one_fewer("volumeMounts"),
    "mount at another path": _replaced({"mountPath"}, lambda _: "/elsewhere"),
    "argument left out": _one_fewer("args"),
    "variable left out": _one_fewer("env"),
    "secret in plain text": secret_in_plain_text,
    "probe left out": _deleted({"startupProbe", "livenessProbe", "readinessProbe"}),
    "probe of another path": _replaced({"path"}, lambda _: "/health", "Probe"),
    "probe without TLS": _replaced({"scheme"}, lambda _: "HTTP", "Probe"),
    "probe that gives up early": _replaced({"failureThreshold"}, lambda _: 1),
    "two replicas of one state folder": _replaced({"replicas"}, lambda count: count + 1),
    "rolling update of one state folder": _replaced({"strategy"}, lambda _: {"type": "RollingUpdate"}),
    "security field left out": _deleted({"runAsNonRoot", "readOnlyRootFilesystem", "allowPrivilegeEscalation", "seccompProfile", "capabilities", "automountServiceAccountToken", "fsGroup"}),
    "root": _replaced({"runAsUser"}, lambda _: 0),
    "network or processes of the host": host_access,
    "folder of the host": host_path,
    "image without a version": _replaced({"image"}, lambda image: image.partition(":")[0]),
    "newest image": _replaced({"image"}, lambda image: f"{image.partition(':')[0]}:latest"),
    "memory in other units": _replaced({"memory"}, lambda amount: amount.replace("Gi", "G")),
    "limit without a request": _deleted({"requests"}),
    "GPU limit left out": _deleted({"nvidia.com/gpu"}, "limits"),
    "shared memory on the disk": _deleted({"medium"}),
    "exit statuses of a rule changed": _replaced({"values"}, lambda statuses: [*statuses, 1]),
    "rule of failures left out": _one_fewer("rules"),
    "number of pods changed": _replaced({"completions", "parallelism"}, lambda count: count + 1),
    "pods that are started again one by one": _replaced({"backoffLimit"}, lambda _: 3),
    "restart policy": _replaced({"restartPolicy"}, lambda _: "OnFailure"),
    "names of pods not published": _replaced({"enableDNSHostnames", "publishNotReadyAddresses"}, lambda _: False),
    "label changed": label_changed,
    "object left out": object_left_out,
    "traffic from everywhere": _replaced({"ingress"}, lambda _: [{}]),
    "disruption budget that blocks": _replaced({"maxUnavailable"}, lambda _: 0),
    "field misspelt": misspelt,
    "value of a wrong type": wrong_type,
}  # fmt: skip


def outcomes(every: int = 1) -> Iterator[dict[str, Any]]:
    """Every mutant, or one of `every`: its operator and source, and whether the schemas and the whole check catch it."""
    count = 0
    for source in SOURCES:
        objects = read_manifests(ROOT / "launch" / source)
        assert not schema_faults(objects)
        assert not manifest_faults(objects, 60), manifest_faults(objects, 60)
        for name, operator in OPERATORS.items():
            for number, mutant in enumerate(operator(objects)):
                count += 1
                if count % every:
                    continue
                by_schema = _schema_catches(mutant)
                is_caught = by_schema or bool(manifest_faults(mutant, 60))
                yield {"operator": name, "source": source, "number": number, "schema": by_schema, "caught": is_caught}


def _schema_catches(objects: Objects) -> bool:
    try:
        return bool(schema_faults(objects))
    except (KeyError, TypeError, AttributeError):
        return True


def main() -> None:
    from record import record

    mutants = list(outcomes())
    rows = []
    for name in OPERATORS:
        of_name = [mutant for mutant in mutants if mutant["operator"] == name]
        rows.append(
            {
                "fault": name,
                "mutants": len(of_name),
                "valid by the schemas": sum(not one["schema"] for one in of_name),
                "caught": sum(one["caught"] for one in of_name),
                "missed": ", ".join(f"{one['source']} {one['number']}" for one in of_name if not one["caught"]),
            }
        )
    columns = ("mutants", "valid by the schemas", "caught")
    rows.append({"fault": "all", **{column: sum(row[column] for row in rows) for column in columns}, "missed": ""})
    about = (
        "Faults in manifests of Kubernetes that `crcjax launch check` catches.\n\nEach mutant has one fault at one place of the manifests in "
        "`launch/kubernetes`, `launch/kuberay` and `launch/kubernetes/service/overlays/monitored`. Missed ones have their source and "
        "their number within the operator. The schemas are those of Kubernetes' own kinds and of a JobSet's pods."
    )
    record("mutate_manifests", "python tools/mutate_manifests.py", rows, about)


if __name__ == "__main__":
    main()
