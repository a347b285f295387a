"""Detects a run's processes from flags and from the environment variables of SLURM, Open MPI, Kubernetes and the clouds."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from crcjax.errors import InputError
from crcjax.parallel.cloud_env import cloud_place

# The port follows from the job's number, so that jobs whose first node is the same rarely share it.
_FIRST_PORT = 61440
_PORT_COUNT = 65536 - _FIRST_PORT
# Each pod has its own network address, so that one port serves all JobSets.
_JOBSET_PORT = 61440


@dataclass(frozen=True)
class ClusterEnvironment:
    """This process's place among the processes of the run.

    `coordinator` is the HOST:PORT at which the other processes reach process 0. `gpu_indices` are those of the visible GPUs
    that belong to this process, where several processes share a machine; None if all do.
    """

    coordinator: str
    process_count: int
    process_index: int
    gpu_indices: tuple[int, ...] | None = None


def detect_cluster(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    process_count: int | None = None,
    process_index: int | None = None,
) -> ClusterEnvironment | None:
    """The cluster that the arguments describe, completed from the environment; None for a single process.

    Supported are SLURM's srun, Open MPI's mpirun, Kubernetes' indexed Jobs and JobSets, and the jobs of AWS Batch, SageMaker,
    Azure ML and Vertex AI. Kubernetes does not tell a pod how many pods there are, so that `process_count` must be given.
    Raises InputError: a value is missing or impossible.
    """
    if process_count == 1:
        return None
    detected = (
        _slurm(environment) or _open_mpi(environment) or _kubernetes(environment) or cloud_place(environment) or {}
    )
    arguments = (coordinator, process_count, process_index)
    coordinator = coordinator or detected.get("coordinator")
    process_count = detected.get("process_count") if process_count is None else process_count
    process_index = detected.get("process_index") if process_index is None else process_index
    if (not detected and arguments == (None, None, None)) or process_count == 1:
        return None
    flags = {"--coordinator HOST:PORT": coordinator, "--processes N": process_count, "--process I": process_index}
    if missing := [flag for flag, value in flags.items() if value is None]:
        source = detected.get("launcher", "nothing in the environment")
        raise InputError(
            f"several processes: {source} does not say {' or '.join(missing)}; give it (--processes 1 to run alone)"
        )
    assert coordinator is not None
    assert process_count is not None
    assert process_index is not None
    if not 0 <= process_index < process_count:
        raise InputError(f"--process must be from 0 to {process_count - 1} (--processes - 1), got {process_index}")
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise InputError(f"--coordinator must be HOST:PORT, the address of process 0, got {coordinator!r}")
    return ClusterEnvironment(
        coordinator, process_count, process_index, _gpu_indices(environment, detected.get("local"))
    )


def machine_name(environment: Mapping[str, str]) -> str:
    """The name of this machine; in a step of SLURM the name that SLURM gives it, which its commands understand."""
    return environment.get("SLURMD_NODENAME") or socket.gethostname()


def _slurm(environment: Mapping[str, str]) -> dict | None:
    """The step of srun. A batch script, or the shell of salloc, has a job but no step, and runs as a single process."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    # The first name of a node list such as rack[1-2]n[07-12,14]-ib,m1 is rack1n07-ib.
    first_entry = re.match(r"(?:[^,\[]|\[[^\]]*\])+", environment["SLURM_STEP_NODELIST"])
    assert first_entry is not None
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first_entry[0])
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORT_COUNT
    return {
        "launcher": "SLURM",
        "coordinator": f"{host}:{port}",
        "process_count": int(environment["SLURM_STEP_NUM_TASKS"]),
        "process_index": int(environment["SLURM_PROCID"]),
        "local": (int(environment["SLURM_LOCALID"]), _slurm_tasks_on_node(environment)),
    }


def _slurm_tasks_on_node(environment: Mapping[str, str]) -> int:
    """From SLURM_STEP_TASKS_PER_NODE, where 2(x3),1 means three nodes of two tasks and one of one."""
    counts: list[int] = []
    for entry in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, nodes = entry.removesuffix(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID", 0))]


def _open_mpi(environment: Mapping[str, str]) -> dict | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    detected = {
        "launcher": "Open MPI",
        "process_count": int(environment["OMPI_COMM_WORLD_SIZE"]),
        "process_index": int(environment["OMPI_COMM_WORLD_RANK"]),
        "local": (int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])),
    }
    # The address of mpirun, such as 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911; Open MPI 5 does not set it. The first
    # process runs on that machine unless a host file says otherwise.
    uri = re.match(r"(\d+)\.\d+;tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if uri:
        # The lower bits of the job identifier are zero.
        detected["coordinator"] = f"{uri[2]}:{_FIRST_PORT + int(uri[1]) // _PORT_COUNT % _PORT_COUNT}"
    return detected


def _kubernetes(environment: Mapping[str, str]) -> dict | None:
    """A pod of an indexed Job has its index, one of a JobSet also the first pod's name (docs/distributed.md)."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    detected = {"launcher": "Kubernetes", "process_index": int(environment["JOB_COMPLETION_INDEX"])}
    if "JOBSET_NAME" in environment and "REPLICATED_JOB_NAME" in environment:
        jobset = environment["JOBSET_NAME"]
        detected["coordinator"] = f"{jobset}-{environment['REPLICATED_JOB_NAME']}-0-0.{jobset}:{_JOBSET_PORT}"
    return detected


def _gpu_indices(environment: Mapping[str, str], local: tuple[int, int] | None) -> tuple[int, ...] | None:
    """Divides the visible GPUs among the processes of a machine; None if one process has all, or one each is visible.

    `local` are this process's index on its machine and the number of processes there.
    """
    if local is None or local[1] == 1:
        return None
    local_index, local_count = local
    if "CUDA_VISIBLE_DEVICES" not in environment:
        # One each, as jax itself divides them.
        return (local_index,)
    visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
    if len(visible) == 1:
        return None
    if len(visible) % local_count:
        raise InputError(
            f"the GPUs of a machine must divide evenly among its processes, got {len(visible)} GPUs for {local_count} "
            "processes; start one process for all GPUs, or one for each"
        )
    share = len(visible) // local_count
    return tuple(range(local_index * share, (local_index + 1) * share))
