"""A training job as manifests of Kubernetes: a JobSet, and a policy that lets its pods talk to each other alone."""

from __future__ import annotations

from typing import Any

import yaml

from crcjax.errors import AGAIN_STATUS, InputError
from crcjax.launching.job import TrainingJob

_PORT = 61440  # where crcjax's processes meet in a JobSet (crcjax.parallel.cluster_env)
# Exit statuses of crcjax.main after which the same command would fail again: wrong input, output not writable, divergence.
FINAL_STATUSES = [2, 3, 5]
# The user of the images in launch/container, which may write nothing of the image.
USER = 10001
_SECRET_FOLDER = "/run/secrets/crcjax"
_ABOUT = """# Rendered by crcjax launch render: edit the job's TOML file, not this one. Needs JobSet 0.8 or newer on the cluster.
# The processes of the job recognise each other by a secret, which you create once:
#   kubectl create secret generic {name}-rendezvous --from-literal=secret="$(openssl rand -hex 32)"
"""


def kubernetes_files(job: TrainingJob) -> dict[str, str]:
    """The manifests of a job, by their file names; `kubectl apply -k DIR` submits them.

    `time_limit_h` is not used: a pod runs until the job has ended or the pod is evicted. Raises InputError: the job names no image.
    """
    manifests = {"jobset.yaml": _job_set(job), "network-policy.yaml": network_policy(job)}
    return manifest_files(manifests, {"jobset.yaml": _ABOUT.format(name=job.name)})


def needed_image(job: TrainingJob) -> str:
    """The job's image. Raises InputError: it names none."""
    if not job.image:
        raise InputError("the job's field image must name a container image, got none; add it")
    return job.image


def manifest_files(manifests: dict[str, dict[str, Any]], about: dict[str, str]) -> dict[str, str]:
    """The texts of manifests and of a kustomization of them, by file name; `about` are comments before some."""
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": sorted(manifests),
    }
    return {
        name: about.get(name, "") + yaml.safe_dump(manifest, sort_keys=False, width=120)
        for name, manifest in (*manifests.items(), ("kustomization.yaml", kustomization))
    }


def _job_set(job: TrainingJob) -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    rules = [
        # Eviction and preemption are no failures, and a pod that saved and ended after a signal starts again.
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        {"action": "Ignore", "onExitCodes": _exit_codes([AGAIN_STATUS])},
        {"action": "FailJob", "onExitCodes": _exit_codes(FINAL_STATUSES)},
    ]
    template = {
        "backoffLimit": 0,
        "completionMode": "Indexed",
        "completions": job.nodes,
        "parallelism": job.nodes,
        "podFailurePolicy": {"rules": rules},
        "template": {"metadata": {"labels": pod_labels(job)}, "spec": _pod(job)},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": job.name, "labels": {**pod_labels(job), **labels}},
        "spec": {
            # Processes look for each other before any pod is ready.
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            # A lost process ends all others; together they start again, and resume from the last checkpoint.
            "failurePolicy": {
                "maxRestarts": job.restarts,
                "rules": [{"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": template}}],
        },
    }


def _exit_codes(statuses: list[int]) -> dict[str, Any]:
    return {"containerName": "train", "operator": "In", "values": statuses}


def _pod(job: TrainingJob) -> dict[str, Any]:
    annotation = "metadata.annotations['jobset.sigs.k8s.io/{}']"
    names: list[dict[str, Any]] = [
        {"name": name, "valueFrom": {"fieldRef": {"fieldPath": annotation.format(source)}}}
        for name, source in (("JOBSET_NAME", "jobset-name"), ("REPLICATED_JOB_NAME", "replicatedjob-name"))
    ]
    container = {
        "command": ["python", "-m", "crcjax.main"],
        "args": [*map(_literal, job.arguments), f"--processes={job.nodes}"],
        "ports": [{"name": "rendezvous", "containerPort": _PORT}],
    }
    return training_pod(job, container, names)


def training_pod(
    job: TrainingJob, container: dict[str, Any], environment: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    """The specification of a pod that has a node's resources and the job's volumes, environment and secret.

    `container` and `environment` are what the caller adds to the container named train. Raises InputError: the job names no image.
    """
    own = {"CRCJAX_RENDEZVOUS_SECRET_FILE": f"{_SECRET_FOLDER}/secret", "HOME": "/tmp"}
    variables = [{"name": name, "value": _literal(value)} for name, value in {**own, **job.environment}.items()]
    resources: dict[str, Any] = {"cpu": str(job.cpus_per_node), "memory": f"{job.memory_gib}Gi"}
    if job.gpus_per_node:
        resources["nvidia.com/gpu"] = str(job.gpus_per_node)
    volumes, mounts = _volumes(job)
    full_container: dict[str, Any] = {
        "name": "train",
        "image": needed_image(job),
        **container,
        "env": [*(environment or []), *variables],
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": mounts,
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": job.grace_s,
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [full_container],
        "volumes": volumes,
    }
    if job.volumes:
        # Relative paths of the arguments begin there.
        full_container["workingDir"] = job.volumes[0].path
    if job.priority:
        pod["priorityClassName"] = job.priority
    return pod


def _volumes(job: TrainingJob) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """A pod's volumes, and where its container mounts them."""
    # The root file system is read-only; programs write to these.
    volumes: list[dict[str, Any]] = [
        {"name": "tmp", "emptyDir": {}},
        {"name": "rendezvous", "secret": {"secretName": f"{job.name}-rendezvous", "defaultMode": 0o440}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "tmp", "mountPath": "/tmp"},
        {"name": "rendezvous", "mountPath": _SECRET_FOLDER, "readOnly": True},
    ]
    if job.shared_memory_gib:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": f"{job.shared_memory_gib}Gi"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    for volume in job.volumes:
        name = f"claim-{volume.claim}"
        if all(known["name"] != name for known in volumes):
            volumes.append({"name": name, "persistentVolumeClaim": {"claimName": volume.claim}})
        mounts.append({"name": name, "mountPath": volume.path, "readOnly": volume.read_only})
    return volumes, mounts


def network_policy(job: TrainingJob) -> dict[str, Any]:
    same_job = {"podSelector": {"matchLabels": pod_labels(job)}}
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": job.name, "labels": pod_labels(job)},
        # Only the job's own pods reach its ports, which JAX leaves unencrypted.
        "spec": {**same_job, "policyTypes": ["Ingress"], "ingress": [{"from": [same_job]}]},
    }


def pod_labels(job: TrainingJob) -> dict[str, str]:
    return {"app.kubernetes.io/name": "crcjax", "app.kubernetes.io/instance": job.name}


def _literal(text: str) -> str:
    """Kubernetes replaces $(NAME) by the variable NAME, and $$ by $."""
    return text.replace("$", "$$")
