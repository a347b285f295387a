"""A training job as a RayJob of KubeRay: Ray starts the processes of the training on its workers."""

from __future__ import annotations

import shlex
from typing import Any

from crcjax.launching.job import TrainingJob
from crcjax.launching.kubernetes import manifest_files, network_policy, pod_labels, training_pod

_ABOUT = """# Rendered by crcjax launch render: edit the job's TOML file, not this one. Needs KubeRay 1.1 or newer on the cluster.
# The processes of the job recognise each other by a secret, which you create once:
#   kubectl create secret generic {name}-rendezvous --from-literal=secret="$(openssl rand -hex 32)"
"""
_DASHBOARD_PORT = 8265
_HEAD_CPUS = 2
_HEAD_MEMORY_GIB = 8


def kuberay_files(job: TrainingJob) -> dict[str, str]:
    """The manifests of a job, by their file names. Raises InputError: the job names no image."""
    manifests = {"rayjob.yaml": _ray_job(job), "network-policy.yaml": _network_policy(job)}
    return manifest_files(manifests, {"rayjob.yaml": _ABOUT.format(name=job.name)})


def _ray_job(job: TrainingJob) -> dict[str, Any]:
    labels = {"kueue.x-k8s.io/queue-name": job.queue} if job.queue else {}
    head = training_pod(job, {})
    (head_container,) = head["containers"]
    head_resources = {"cpu": str(_HEAD_CPUS), "memory": f"{_HEAD_MEMORY_GIB}Gi"}
    head_container["resources"] = {"requests": head_resources, "limits": dict(head_resources)}
    # Its shared memory would count as memory of a pod that computes nothing.
    head["volumes"] = [volume for volume in head["volumes"] if volume["name"] != "shm"]
    head_container["volumeMounts"] = [mount for mount in head_container["volumeMounts"] if mount["name"] != "shm"]
    # Ray ends its workers at once; before that, the training saves, for at most the grace period of the pod.
    stop = {"exec": {"command": ["python", "-m", "crcjax.launching.ray_nodes", "--stop"]}}
    worker = training_pod(job, {"lifecycle": {"preStop": stop}})
    folder = f"--folder={job.volumes[0].path}" if job.volumes else "--folder=."
    entrypoint = [
        *("python", "-m", "crcjax.launching.ray_nodes", f"--nodes={job.nodes}", f"--gpus={job.gpus_per_node}"),
        *(f"--restarts={job.restarts}", folder, "--", "python", "-m", "crcjax.main", *job.arguments),
    ]
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": job.name, "labels": {**pod_labels(job), **labels}},
        "spec": {
            "entrypoint": shlex.join(entrypoint),
            "shutdownAfterJobFinishes": True,
            # The entry point starts the processes again itself, since it knows what their exit statuses mean.
            "backoffLimit": 0,
            # No pod besides those below.
            "submissionMode": "HTTPMode",
            "rayClusterSpec": {
                "headGroupSpec": {
                    # No training on the head.
                    "rayStartParams": {"num-cpus": "0", "num-gpus": "0"},
                    "template": {"metadata": {"labels": pod_labels(job)}, "spec": head},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "train",
                        "replicas": job.nodes,
                        "minReplicas": job.nodes,
                        "maxReplicas": job.nodes,
                        "rayStartParams": {},
                        "template": {"metadata": {"labels": pod_labels(job)}, "spec": worker},
                    }
                ],
            },
        },
    }


def _network_policy(job: TrainingJob) -> dict[str, Any]:
    policy = network_policy(job)
    operator = {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}}}
    # The operator submits the job and reads its state there.
    policy["spec"]["ingress"].append({"from": [operator], "ports": [{"port": _DASHBOARD_PORT, "protocol": "TCP"}]})
    return policy
