"""Several processes of a run on this machine, for trying and testing:

    python launch/local.py --processes 2 [--devices 4] -- --config configs/demo.py --workdir RUN [...]

What follows `--` goes to python -m crcjax.main. `--devices` are CPU devices for each process; without it, the processes
have what jax finds. Lines begin with the process's index. If one fails, the others are ended, and the exit status is that
of the first that failed; SIGTERM and SIGINT are passed on.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

_GRACE_S = 20.0  # for the others to end by themselves, naming the one that failed


def main() -> int:
    """Runs the processes and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int)
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS")
    given = parser.parse_args()
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    if given.devices:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={given.devices}"
        environment |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "crcjax.main", *given.arguments]
    command += [f"--coordinator=127.0.0.1:{port}", f"--processes={given.processes}"]
    running = [_start([*command, f"--process={process}"], environment) for process in range(given.processes)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _tell(running, signal.SIGTERM))
    readers = [threading.Thread(target=_forward, args=pair) for pair in enumerate(running)]
    for reader in readers:
        reader.start()
    status = _first_failure(running)
    _end(running)
    for reader in readers:
        reader.join()
    return status


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    # A session of its own: Ctrl-C comes through here alone.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _forward(index: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout
    prefix = f"[{index}] "
    for line in process.stdout:
        # crcjax numbers its own lines; those of the libraries below it come bare.
        print(line.rstrip("\n") if line.startswith(prefix) else prefix + line.rstrip("\n"), flush=True)


def _first_failure(running: list[subprocess.Popen[str]]) -> int:
    """Waits until one has failed, or all have ended, and returns its status; 128 + the signal that killed it."""
    while True:
        ended = [process.poll() for process in running]
        for status in ended:
            if status:
                return status if status > 0 else 128 - status
        if None not in ended:
            return 0
        time.sleep(0.05)


def _end(running: list[subprocess.Popen[str]]) -> None:
    for stop in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in running):
            time.sleep(0.05)
        _tell(running, stop)


def _tell(running: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
