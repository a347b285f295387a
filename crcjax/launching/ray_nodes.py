"""Starts one process of a training on each node of a running Ray cluster, and starts them again as their exit statuses say.

    python -m crcjax.launching.ray_nodes --nodes 4 --gpus 8 --restarts 10 --folder DIR -- python -m crcjax.main ARGUMENTS

Ray places the processes; they find each other by crcjax's own flags, which are added to the command. --stop, on a node, makes
the processes there save and end, and waits for that: the hook of a pod that Kubernetes is about to end.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from crcjax.errors import AGAIN_STATUS, PEER_STATUS

_FINAL_STATUSES = (2, 3, 5)
# In the environment of the processes, by which --stop knows them.
_MARK = "CRCJAX_RAY_NODE"


def main(arguments: list[str] | None = None) -> int:
    """Runs the module's command line, and returns the exit status of the training."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1, help="processes, each on a node of its own")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of each node")
    parser.add_argument("--restarts", type=int, default=0, help="starts after a lost process; preemptions do not count")
    parser.add_argument("--folder", type=Path, default=Path(), help="folder in which the processes run")
    parser.add_argument("--stop", action="store_true", help="make the processes of this machine save and end")
    parser.add_argument("command", nargs="*", help="the training command, after --")
    given = parser.parse_args(arguments)
    if given.stop:
        stop_local_processes()
        return 0
    if not given.command:
        parser.error("give the training command after --")
    return run_on_nodes(given.command, given.nodes, given.gpus, given.restarts, given.folder)


def run_on_nodes(command: Sequence[str], nodes: int, gpus: int, restarts: int, folder: Path) -> int:
    """Runs a training command on `nodes` nodes of the Ray cluster until it succeeds or cannot, and returns its exit status.

    Args:
      command: the command, without the flags of crcjax.main that place a process.
      nodes: processes, each on a node of its own.
      gpus: GPUs of each node.
      restarts: how often all start again after one was lost or failed; status 85 does not count.
      folder: where they run.
    """
    import ray

    ray.init(address="auto", log_to_driver=True, logging_level=logging.ERROR)
    failures = 0
    while True:
        statuses = _one_attempt(command, nodes, gpus, folder)
        status = overall_status(statuses)
        print(f"crcjax: the processes ended with {statuses}", flush=True)
        if status == 0 or status in _FINAL_STATUSES:
            return status
        failures += status != AGAIN_STATUS
        if failures > restarts:
            return status


def overall_status(statuses: Sequence[int]) -> int:
    """The exit status of a run, from those of its processes: the one that decides what happens next."""
    for final in _FINAL_STATUSES:
        if final in statuses:
            return final
    # Where one process saved after a signal, all did; one that lost sight of it may say that it was lost.
    if AGAIN_STATUS in statuses:
        return AGAIN_STATUS
    return next((status for status in statuses if status), 0)


def _one_attempt(command: Sequence[str], nodes: int, gpus: int, folder: Path) -> list[int]:
    """Starts the processes once, waits for them, and returns their exit statuses."""
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundles = [{"CPU": 1.0, **({"GPU": float(gpus)} if gpus else {})} for _ in range(nodes)]
    group = placement_group(bundles, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    actor = ray.remote(_Node)
    processes: list[Any] = [
        actor.options(
            num_cpus=1,
            num_gpus=gpus,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote()
        for index in range(nodes)
    ]
    try:
        coordinator = ray.get(processes[0].free_address.remote())
    except ray.exceptions.RayActorError:
        remove_placement_group(group)
        return [PEER_STATUS]
    place = [f"--coordinator={coordinator}", f"--processes={nodes}"]
    results = [
        process.run.remote([*command, *place, f"--process={index}"], str(folder))
        for index, process in enumerate(processes)
    ]
    statuses = []
    for result in results:
        try:
            statuses.append(ray.get(result))
        except ray.exceptions.RayError:
            # Its node was lost, and the other processes notice that themselves.
            statuses.append(PEER_STATUS)
    remove_placement_group(group)
    return statuses


class _Node:
    """Runs in a worker process of Ray on one node."""

    def free_address(self) -> str:
        """HOST:PORT of this node, with a port that is free now."""
        import socket

        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind(("", 0))
            return f"{host}:{probe.getsockname()[1]}"

    def run(self, command: list[str], folder: str) -> int:
        """Runs a process to its end, and returns its exit status as shells report it."""
        status = subprocess.run(command, cwd=folder, env={**os.environ, _MARK: "1"}).returncode
        return 128 - status if status < 0 else status


def stop_local_processes(poll_s: float = 0.5) -> None:
    """Sends SIGTERM to the processes of a training on this machine, and waits until they have ended."""
    import psutil

    def running() -> list[Any]:
        marked = []
        for process in psutil.process_iter():
            try:
                # The environment of a process that has ended, or that belongs to somebody else, cannot be read.
                if process.environ().get(_MARK) and process.status() != psutil.STATUS_ZOMBIE:
                    marked.append(process)
            except psutil.Error:
                continue
        return marked

    for process in running():
        process.send_signal(signal.SIGTERM)
    while running():
        time.sleep(poll_s)


if __name__ == "__main__":
    sys.exit(main())
