"""Detects a run's processes from the environment variables of AWS Batch, SageMaker, Azure ML and Vertex AI.

Sources: AWS Batch "Multi-node parallel jobs: environment variables", SageMaker "Distributed training configuration"
(resourceconfig.json), Azure ML "Distributed GPU training: environment variables", Vertex AI "CLUSTER_SPEC".
"""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crcjax.errors import InputError

# Each container has its own network address, so that one port serves all jobs.
_PORT = 61440


def cloud_place(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The launcher, coordinator, process_count and process_index that a cloud's job states; None outside of one.

    Raises InputError: what a cloud states cannot be read.
    """
    return _aws_batch(environment) or _sagemaker(environment) or _azure_ml(environment) or _vertex(environment) or None


def _aws_batch(environment: Mapping[str, str]) -> dict[str, Any] | None:
    if "AWS_BATCH_JOB_NUM_NODES" not in environment:
        return None
    # The main node does not get its own address.
    main = environment.get("AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS") or socket.gethostname()
    count, main_index = int(environment["AWS_BATCH_JOB_NUM_NODES"]), int(environment["AWS_BATCH_JOB_MAIN_NODE_INDEX"])
    return {
        "launcher": "AWS Batch",
        "coordinator": f"{main}:{_PORT}",
        "process_count": count,
        # The main node is process 0, whichever it is.
        "process_index": (int(environment["AWS_BATCH_JOB_NODE_INDEX"]) - main_index) % count,
    }


def _sagemaker(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """CRCJAX_HOSTS_FILE, which crcjax launch render sets, names SageMaker's description of the job's machines."""
    if "CRCJAX_HOSTS_FILE" not in environment:
        return None
    path = Path(environment["CRCJAX_HOSTS_FILE"])
    try:
        described = json.loads(path.read_text())
        hosts = sorted(described["hosts"], key=lambda host: (len(host), host))
        index = hosts.index(described["current_host"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} must be SageMaker's resourceconfig.json with hosts and current_host, got {error}; unset "
            "CRCJAX_HOSTS_FILE outside of SageMaker"
        ) from error
    return {
        "launcher": "SageMaker",
        "coordinator": f"{hosts[0]}:{_PORT}",
        "process_count": len(hosts),
        "process_index": index,
    }


def _azure_ml(environment: Mapping[str, str]) -> dict[str, Any] | None:
    names = ("AZUREML_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE")
    if any(name not in environment for name in names):
        return None
    return {
        "launcher": "Azure ML",
        "coordinator": f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}",
        "process_count": int(environment["WORLD_SIZE"]),
        "process_index": int(environment["RANK"]),
    }


def _vertex(environment: Mapping[str, str]) -> dict[str, Any] | None:
    if "CLUSTER_SPEC" not in environment:
        return None
    try:
        described = json.loads(environment["CLUSTER_SPEC"])
        task, pools = described["task"], described["cluster"]
        names = sorted(name for name in pools if name.startswith("workerpool"))
        addresses = [address for name in names for address in pools[name]]
        before = sum(len(pools[name]) for name in names[: names.index(task["type"])])
        index = before + int(task["index"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"CLUSTER_SPEC must be Vertex AI's JSON with cluster and task, got {environment['CLUSTER_SPEC'][:200]!r}; "
            "unset it outside of Vertex AI"
        ) from error
    return {
        "launcher": "Vertex AI",
        "coordinator": addresses[0],
        "process_count": len(addresses),
        "process_index": index,
    }
