"""Starts several processes of a run on this machine, for trying and testing:

    python launch/local.py --processes 2 [--devices 4] -- --config configs/demo.py --workdir RUN [...]

The arguments after `--` go to python -m crcjax.main. `--devices` is the number of CPU devices of each process; without it,
each process has the devices that jax finds. Output lines begin with the process's index. If a process fails, the others
are ended, and the exit status is that of the first that failed. SIGTERM and SIGINT are passed on.
"""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

# Time for the other processes to end by themselves, with the error of the one that failed.
_GRACE_S = 20.0


def main() -> int:
    """Runs the processes and returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, required=True)
    parser.add_argument("--devices", type=int)
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS")
    options = parser.parse_args()
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    # One secret per run, by which the processes recognise each other (crcjax/parallel/rendezvous.py).
    environment["CRCJAX_RENDEZVOUS_SECRET"] = secrets.token_hex(32)
    if options.devices:
        flags = f"{environment.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={options.devices}"
        environment |= {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "crcjax.main", *options.arguments]
    command += [f"--coordinator=127.0.0.1:{port}", f"--processes={options.processes}"]
    processes = [_start([*command, f"--process={index}"], environment) for index in range(options.processes)]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _signal_all(processes, signal.SIGTERM))
    readers = [threading.Thread(target=_print_output, args=pair) for pair in enumerate(processes)]
    for reader in readers:
        reader.start()
    status = _first_failure(processes)
    _end(processes)
    for reader in readers:
        reader.join()
    return status


def _start(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    # In a session of its own, a process does not receive Ctrl-C from the terminal; this launcher passes it on.
    return subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _print_output(index: int, process: subprocess.Popen[str]) -> None:
    assert process.stdout
    prefix = f"[{index}] "
    for line in process.stdout:
        # crcjax prefixes its own lines; the libraries that it uses do not.
        print(line.rstrip("\n") if line.startswith(prefix) else prefix + line.rstrip("\n"), flush=True)


def _first_failure(processes: list[subprocess.Popen[str]]) -> int:
    """Waits until one process has failed or all have ended; returns its status (128 + the signal that killed it), or 0."""
    while True:
        statuses = [process.poll() for process in processes]
        for status in statuses:
            if status:
                return status if status > 0 else 128 - status
        if None not in statuses:
            return 0
        time.sleep(0.05)


def _end(processes: list[subprocess.Popen[str]]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and any(process.poll() is None for process in processes):
            # A stopped process would not end before it is continued.
            _signal_all([process for process in processes if _is_stopped(process)], signal.SIGKILL)
            time.sleep(0.05)
        _signal_all(processes, number)


def _is_stopped(process: subprocess.Popen[str]) -> bool:
    try:
        # The state follows the program's name, which may contain spaces.
        state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state == "T"


def _signal_all(processes: list[subprocess.Popen[str]], number: signal.Signals) -> None:
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
