"""A SLURM cluster of two nodes on this machine: Debian's packages slurm-wlm and munge, as root."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")


@pytest.fixture(scope="session")
def daemons() -> list[subprocess.Popen]:
    """The daemons of the cluster, which are stopped at its end; a test that restarts one adds it."""
    return []


@pytest.fixture(scope="session")
def slurm(required, daemons: list[subprocess.Popen]) -> Iterator[Path]:
    """The folder of a running cluster; SLURM's commands find it by the environment variable SLURM_CONF."""
    os.environ["PATH"] += ":/usr/sbin"
    absent = [name for name in (*DAEMONS, "sbatch") if not shutil.which(name)]
    if absent or os.geteuid() != 0:
        message = f"a SLURM cluster needs root and {', '.join(absent) or 'its daemons'}: make slurm-packages"
        if required("slurm"):
            pytest.fail(message)
        pytest.skip(message)
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # short: it holds a socket
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        try:
            _start(folder, daemons)
            yield folder
        finally:
            _stop(folder, daemons)
            shutil.rmtree(folder, ignore_errors=True)


def _start(folder: Path, started: list[subprocess.Popen]) -> None:
    template = (Path(__file__).parent / "slurm.conf").read_text()
    conf = folder / "slurm.conf"
    # Each process of the tests has a cluster of its own.
    port = 26810 + 10 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    values = {"folder": folder, "host": socket.gethostname(), "port": port, "n0": port + 1, "n1": port + 2}
    for name, value in values.items():
        template = template.replace(f"{{{name}}}", str(value))
    conf.write_text(template)
    (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 n0 n1\n")
    mail = folder / "mail"
    mail.write_text(f'#!/bin/sh\necho "$@" >> {folder}/mails\n')
    mail.chmod(0o755)
    (folder / "mails").touch()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)

    def start(*command: str) -> None:
        with open(folder / "daemons.log", "a") as log:
            started.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    munge = [f"--{name}={folder}/{file}" for name, file in (("key-file", "munge.key"), ("socket", "munge.sock"))]
    munge += [f"--pid-file={folder}/munged.pid", f"--seed-file={folder}/munge.seed", "--force", "--foreground"]
    start("munged", *munge)
    _await(lambda: (folder / "munge.sock").exists(), folder)
    start("slurmctld", "-D", "-f", str(conf))
    for node in ("n0", "n1"):
        started.append(start_node(folder, node))
    _await(
        lambda: subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout == "idle\n", folder
    )


def start_node(folder: Path, node: str) -> subprocess.Popen:
    """Starts the daemon of a node, within its own view of /etc/hosts, where the nodes' names stand for this machine."""
    inner = f"mount --bind {folder}/hosts /etc/hosts && exec slurmd -D -f {folder}/slurm.conf -N {node}"
    with open(folder / "daemons.log", "a") as log:
        command = ["unshare", "--mount", "bash", "-c", inner]
        return subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


@pytest.fixture
def lose_node(slurm: Path, daemons: list[subprocess.Popen]) -> Iterator[Callable[[str], None]]:
    """lose_node(name): kills a node's daemon and all that runs there, as a loss of power does. It comes back after the test."""
    lost = []

    def lose(node: str) -> None:
        lost.append(node)
        processes = list(psutil.process_iter())
        for process in processes:
            with suppress(psutil.Error):
                own = [f"{slurm}/slurm.conf", "-N", node]
                is_daemon = process.name() == "slurmd" and process.cmdline()[-3:] == own
                if is_daemon:
                    process.kill()
        for process in processes:
            with suppress(psutil.Error):
                if _is_job(process, slurm) and process.environ().get("SLURMD_NODENAME") == node:
                    parent = process.parent()
                    if parent is not None and parent.name() == "slurmstepd":
                        parent.kill()
                    process.kill()

    yield lose
    for node in lost:
        daemons.append(start_node(slurm, node))
        _await(
            lambda node=node: (
                "idle" in subprocess.run(["sinfo", "-h", "-n", node, "-o", "%T"], capture_output=True, text=True).stdout
            ),
            slurm,
        )


def _await(ready, folder: Path) -> None:
    for _ in range(600):
        if ready():
            return
        time.sleep(0.1)
    raise RuntimeError("".join(path.read_text()[-2000:] for path in sorted(folder.glob("*.log"))))


def _stop(folder: Path, started: list[subprocess.Popen]) -> None:
    subprocess.run(["scancel", "--user=root", "--signal=KILL"], capture_output=True)
    below = [child for process in started for child in _children(process.pid)]
    for process in reversed(started):
        process.send_signal(signal.SIGTERM)
    for process in started:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    # Jobs do not end with slurmd; they know their cluster.
    for process in [*below, *filter(lambda process: _is_job(process, folder), psutil.process_iter())]:
        with suppress(psutil.Error):
            process.kill()


def _is_job(process: psutil.Process, folder: Path) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return "SLURM_JOB_ID" in environment and environment.get("SLURM_CONF", "").startswith(str(folder))


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []
