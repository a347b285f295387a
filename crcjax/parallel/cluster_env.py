"""Which processes a run has, from flags or from what SLURM, Open MPI or Kubernetes say in the environment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from crcjax.errors import InputError

_PORTS = 4096  # from 61440 on: jobs that share a first node rarely share their port
_FIRST_PORT = 65536 - _PORTS
_JOBSET_PORT = 61440  # a pod has its ports for itself


@dataclass(frozen=True)
class ClusterEnvironment:
    """This process among its peers; `coordinator` is host:port of process 0, where the others call it.

    `gpus` are the visible GPUs that are this process's, where several processes share them; None for all.
    """

    coordinator: str
    processes: int
    process: int
    gpus: tuple[int, ...] | None = None


def detect_cluster(
    environment: Mapping[str, str],
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
) -> ClusterEnvironment | None:
    """The peers that the arguments state, the environment stating what they leave out; None for a single process.

    Understood are SLURM's srun, Open MPI's mpirun, and Kubernetes' indexed Jobs and JobSets, which do not say how many
    they are: `processes` must. Raises InputError: something is missing or impossible.
    """
    if processes == 1:
        return None
    told = _slurm(environment) or _open_mpi(environment) or _kubernetes(environment) or {}
    coordinator = coordinator or told.get("coordinator")
    processes = told.get("processes") if processes is None else processes
    process = told.get("process") if process is None else process
    if (not told and coordinator is None and processes is None and process is None) or processes == 1:
        return None
    found = {"--coordinator HOST:PORT": coordinator, "--processes N": processes, "--process I": process}
    if missing := [flag for flag, value in found.items() if value is None]:
        where = told.get("name", "nothing in the environment")
        raise InputError(
            f"several processes: {where} does not say {' or '.join(missing)}; give it (--processes 1 to run alone)"
        )
    assert coordinator is not None
    assert processes is not None
    assert process is not None
    if not 0 <= process < processes:
        raise InputError(f"--process {process} is not among the {processes} of --processes; count from 0")
    if not re.fullmatch(r".+:\d{1,5}", coordinator):
        raise InputError(f"--coordinator {coordinator!r}: give it as HOST:PORT, the address of process 0")
    return ClusterEnvironment(coordinator, processes, process, _gpus(environment, told.get("local")))


def _slurm(environment: Mapping[str, str]) -> dict | None:
    """srun's step; a batch script or salloc's shell has a job, and no step, so that it runs alone."""
    if "SLURM_STEP_ID" not in environment or "SLURM_PROCID" not in environment:
        return None
    nodes = environment["SLURM_STEP_NODELIST"]
    # rack[1-2]n[07-12,14]-ib,m1 begins with rack1n07-ib
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert first is not None
    host = re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])
    port = _FIRST_PORT + int(environment["SLURM_JOB_ID"]) % _PORTS
    return {
        "name": "SLURM",
        "coordinator": f"{host}:{port}",
        "processes": int(environment["SLURM_STEP_NUM_TASKS"]),
        "process": int(environment["SLURM_PROCID"]),
        "local": (int(environment["SLURM_LOCALID"]), _tasks_here(environment)),
    }


def _tasks_here(environment: Mapping[str, str]) -> int:
    """SLURM_STEP_TASKS_PER_NODE is 2(x3),1 for three nodes of two tasks and one of one."""
    counts: list[int] = []
    for part in environment["SLURM_STEP_TASKS_PER_NODE"].split(","):
        tasks, _, nodes = part.removesuffix(")").partition("(x")
        counts += [int(tasks)] * int(nodes or 1)
    return counts[int(environment.get("SLURM_NODEID", 0))]


def _open_mpi(environment: Mapping[str, str]) -> dict | None:
    if "OMPI_COMM_WORLD_RANK" not in environment:
        return None
    told = {
        "name": "Open MPI",
        "processes": int(environment["OMPI_COMM_WORLD_SIZE"]),
        "process": int(environment["OMPI_COMM_WORLD_RANK"]),
        "local": (int(environment["OMPI_COMM_WORLD_LOCAL_RANK"]), int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"])),
    }
    # mpirun's own address, where its first process runs unless a host file says otherwise; Open MPI 5 has no such.
    # 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911
    uri = re.match(r"(\d+)\.\d+;tcp://([^,:]+)", environment.get("OMPI_MCA_orte_hnp_uri", ""))
    if uri:
        told["coordinator"] = f"{uri[2]}:{_FIRST_PORT + int(uri[1]) // _PORTS % _PORTS}"
    return told


def _kubernetes(environment: Mapping[str, str]) -> dict | None:
    """An indexed Job's pod knows its index, a JobSet's the name of the first pod by the downward API (docs/distributed.md)."""
    if "JOB_COMPLETION_INDEX" not in environment:
        return None
    told = {"name": "Kubernetes", "process": int(environment["JOB_COMPLETION_INDEX"])}
    if "JOBSET_NAME" in environment and "REPLICATED_JOB_NAME" in environment:
        jobset = environment["JOBSET_NAME"]
        told["coordinator"] = f"{jobset}-{environment['REPLICATED_JOB_NAME']}-0-0.{jobset}:{_JOBSET_PORT}"
    return told


def _gpus(environment: Mapping[str, str], local: tuple[int, int] | None) -> tuple[int, ...] | None:
    """The visible GPUs divided among the processes of one machine, unless the launcher has done so already."""
    if local is None or local[1] == 1:
        return None
    place, here = local
    if "CUDA_VISIBLE_DEVICES" not in environment:
        return (place,)  # one each, as jax itself would have it
    visible = environment["CUDA_VISIBLE_DEVICES"].split(",")
    if len(visible) == 1:
        return None
    if len(visible) % here:
        raise InputError(
            f"{len(visible)} GPUs for {here} processes on this machine; start one process for all of them, or one each"
        )
    share = len(visible) // here
    return tuple(range(place * share, (place + 1) * share))
