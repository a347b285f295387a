"""How the processes of a run reach each other beside jax: who is there, whether they agree, and who has ended.

jax waits for minutes or ends the process without a word where a peer does not come, dies or errs. So each process calls
process 0 before jax is started, and the line stays open while they train.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from crcjax.errors import InputError
from crcjax.parallel.cluster_env import ClusterEnvironment

LOOPBACK = ("127.0.0.1", "localhost")  # listened to by this machine alone
_NAMES_SHOWN = 3  # of what differs


@dataclass(frozen=True)
class Caller:
    """One process: its machine, and what must be the same in all of them."""

    host: str
    facts: Mapping[str, str]


class Line:
    """Open wires between process 0 and each of the others; JSON lines go over them.

    `service` is host:port for jax's own service, which process 0 chose; `names` are `process I (HOST)`.
    """

    def __init__(self, wires: dict[int, _Wire], names: list[str], service: str):
        self.names, self.service = names, service
        self._wires = wires
        self._lock = threading.Lock()
        for wire in wires.values():
            wire.keep()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Sends to process 0, or as process 0 to all others; those that are gone are passed over."""
        with self._lock:
            for wire in self._wires.values():
                wire.send(message)

    def listen(self, heard: Callable[[int, dict[str, Any] | None], None]) -> None:
        """Calls `heard` from threads with every message and the process it came from; None once that process is gone."""

        def follow(process: int, wire: _Wire) -> None:
            while (message := wire.receive()) is not None:
                heard(process, message)
            heard(process, None)

        for process, wire in self._wires.items():
            threading.Thread(target=follow, args=(process, wire), daemon=True, name=f"line-{process}").start()

    def close(self) -> None:
        """Hangs up."""
        for wire in self._wires.values():
            wire.close()


def call_roll(peers: ClusterEnvironment, facts: Mapping[str, str], wait_s: float) -> Line:
    """Waits until all processes are there, and compares their `facts`.

    Raises InputError, in every process that came and within 2 `wait_s` + 10 s: processes that did not come, by index, or
    what differs in which process.
    """
    facts = {"--processes": str(peers.processes), **facts}
    return _gather(peers, facts, wait_s) if peers.process == 0 else _call(peers, facts, wait_s)


def differences(callers: Mapping[int, Caller]) -> str:
    """Which processes differ from the most (from process 0, if as many), and in what; empty if they agree."""
    found: dict[int, list[str]] = {}
    for name in sorted({name for caller in callers.values() for name in caller.facts}):
        values = {process: caller.facts.get(name, "absent") for process, caller in sorted(callers.items())}
        usual = Counter(values.values()).most_common(1)[0][0]  # the first among equals is process 0's
        for process, value in values.items():
            if value != usual:
                found.setdefault(process, []).append(f"{name} is {value} there and {usual} elsewhere")
    told = []
    for process, names in found.items():
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        told.append(f"process {process} ({callers[process].host}) differs: {'; '.join(names[:_NAMES_SHOWN])}{more}")
    return ". ".join(told)


def _gather(peers: ClusterEnvironment, facts: Mapping[str, str], wait_s: float) -> Line:
    host, port = _address(peers)
    callers = {0: Caller(socket.gethostname(), facts)}
    wires: dict[int, _Wire] = {}
    error = ""
    with _server(host, port) as server:
        deadline = time.monotonic() + wait_s
        while len(callers) < peers.processes and not error:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                wire = _Wire(server.accept()[0], 5.0)
            except TimeoutError:
                missing = [str(process) for process in range(peers.processes) if process not in callers]
                error = (
                    f"of {peers.processes} processes, {', '.join(missing)} did not come within {wait_s:g} s; see on "
                    f"their machines why they did not start or cannot reach {peers.coordinator}, or wait longer (--wait_s)"
                )
                break
            hello = wire.receive()
            if not hello or not {"process", "host", "facts"} <= hello.keys():
                wire.close()  # a port scanner, say
                continue
            process, caller = hello["process"], Caller(hello["host"], hello["facts"])
            if process in callers:
                error = f"{callers[process].host} and {caller.host} both say they are process {process}; number them"
                process = -1  # it is told with the others
            callers[process], wires[process] = caller, wire
    if not error and (found := differences(callers)):
        error = f"the processes do not agree. {found}; start all with the same command, code and files"
    names = [f"process {process} ({callers[process].host})" for process in sorted(callers)]
    service = _free_port(host)
    for wire in wires.values():
        wire.send({"error": error, "service": service, "names": names})
        if error:
            wire.close()
    if error:
        raise InputError(error)
    return Line(wires, names, f"{host}:{service}")


def _call(peers: ClusterEnvironment, facts: Mapping[str, str], wait_s: float) -> Line:
    host, port = _address(peers)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            # Process 0 may have started to wait later than this process.
            wire = _Wire(socket.create_connection((host, port), max(0.1, deadline - time.monotonic())), wait_s + 10)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 did not come within {wait_s:g} s: {host}:{port} cannot be reached ({error}); see on its "
                    "machine why it did not start, or give another --coordinator"
                ) from error
            time.sleep(0.1)
    wire.send({"process": peers.process, "host": socket.gethostname(), "facts": dict(facts)})
    verdict = wire.receive()
    if verdict is None or verdict["error"]:
        wire.close()
        silent = f"process 0 at {host}:{port} ended before all processes were there; see its words"
        raise InputError(verdict["error"] if verdict else silent)
    return Line({0: wire}, verdict["names"], f"{host}:{verdict['service']}")


def _address(peers: ClusterEnvironment) -> tuple[str, int]:
    host, _, port = peers.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _server(host: str, port: int) -> socket.socket:
    """Listens on all networks of the machine, since its name may stand for another than the peers use."""
    try:
        if host in LOOPBACK:
            return socket.create_server((host, port), backlog=1024)
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror}); give another one with --coordinator HOST:PORT"
        ) from error


def _free_port(host: str) -> int:
    with _server(host, 0) as server:
        return server.getsockname()[1]


class _Wire:
    """A connection of JSON lines."""

    def __init__(self, connection: socket.socket, timeout_s: float):
        connection.settimeout(timeout_s)
        self._connection = connection
        self._lines = connection.makefile("r", encoding="utf-8")

    def keep(self) -> None:
        """From now on it waits for ever, yet notices within a minute that the other machine has lost its power."""
        self._connection.settimeout(None)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 8)):
            if hasattr(socket, option):
                self._connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, message: Mapping[str, Any]) -> None:
        # Whoever listens to it finds out that it is gone.
        with suppress(OSError):
            self._connection.sendall((json.dumps(message) + "\n").encode())

    def receive(self) -> dict[str, Any] | None:
        """The next message; None if the other is gone, silent for too long or talks nonsense."""
        with suppress(OSError, ValueError):
            message = json.loads(self._lines.readline())
            return message if isinstance(message, dict) else None
        return None

    def close(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # whoever waits for its next message wakes up
        self._lines.close()
        self._connection.close()
