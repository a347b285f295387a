"""Rendezvous and control channel between the processes of a run.

Before `jax.distributed.initialize`, every process connects to process 0, which checks that all have the same configuration,
code and data (`Fingerprint`). The connections stay open as a control channel: they carry heartbeats and error messages, so
that a failed process is reported within seconds. JAX alone would wait for minutes or exit without a message.

Process 0 listens on the coordinator's address. With a secret (`rendezvous_secret`), both ends of a connection prove that
they know it: each answers the other's random challenge with an HMAC-SHA256 over the challenges and its message. Whoever
fails, sends something else, or is slow is disconnected; the others are not affected. The secret is never sent. Messages
are not encrypted, and the ports of JAX itself have no authentication.
"""

from __future__ import annotations

import hmac
import json
import os
import queue
import secrets
import selectors
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from crcjax.errors import PEER_STATUS, CrcjaxError, InputError, PeerError, exit_status
from crcjax.monitor.logs import log
from crcjax.parallel.cluster_env import ClusterEnvironment, machine_name
from crcjax.parallel.message_connection import MessageConnection

SECRET = "CRCJAX_RENDEZVOUS_SECRET"
SECRET_FILE = "CRCJAX_RENDEZVOUS_SECRET_FILE"
_SECRET_LENGTH = 16
_DIFFERENCES_SHOWN = 3  # of one process
_HANDSHAKE_S = 10.0  # for a connection to identify itself
_MAX_HANDSHAKES = 256  # at a time, beside one of each process
_RETRY_S = 0.1
_SEND_WAIT_S = 1.0


@dataclass(frozen=True)
class Fingerprint:
    """The machine of one process, and the configuration, code and data that must be equal in all processes."""

    host: str
    entries: Mapping[str, str]


class ControlChannel:
    """Connections between process 0 and each other process, open while the run lasts.

    `hosts` are the machines, and `names` are `process I (HOST)`, by process index. `jax_address` is host:port of JAX's coordination service, and
    `jax_bind_address` where process 0 opens it, None for all network interfaces. `jax_port_reservation` keeps that port
    from other programs until it is closed.
    """

    def __init__(
        self,
        connections: Mapping[int, MessageConnection],
        hosts: Sequence[str],
        jax_address: str,
        jax_bind_address: str | None = None,
        jax_port_reservation: AbstractContextManager | None = None,
    ):
        self.hosts, self.jax_address, self.jax_bind_address = list(hosts), jax_address, jax_bind_address
        self.names = [f"process {process} ({host})" for process, host in enumerate(hosts)]
        self.jax_port_reservation = jax_port_reservation or nullcontext()
        self._connections = dict(connections)
        self._lock = threading.Lock()
        for connection in self._connections.values():
            connection.keep_alive()

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends to process 0, or from process 0 to all others; lost connections are skipped.

        A message is dropped if another thread has been sending for a second: a stopped process does not receive.
        """
        if not self._lock.acquire(timeout=_SEND_WAIT_S):
            return
        try:
            for connection in self._connections.values():
                connection.send(message)
        finally:
            self._lock.release()

    def subscribe(self, on_message: Callable[[int, dict[str, Any] | None], None]) -> None:
        """Calls `on_message(process, message)` in threads for every message; the message is None once a process is lost."""

        def read(process: int, connection: MessageConnection) -> None:
            while (message := connection.receive_trusted()) is not None:
                on_message(process, message)
            on_message(process, None)

        for process, connection in self._connections.items():
            threading.Thread(target=read, args=(process, connection), daemon=True, name=f"control-{process}").start()

    def close(self) -> None:
        """Closes all connections."""
        for connection in self._connections.values():
            connection.close()


def rendezvous_secret(environment: Mapping[str, str]) -> bytes | None:
    """The secret in CRCJAX_RENDEZVOUS_SECRET, or in the file named by CRCJAX_RENDEZVOUS_SECRET_FILE; None without both.

    Raises InputError: the file cannot be read, or the secret is too short.
    """
    source, secret = SECRET, environment.get(SECRET, "")
    if not secret and (path := environment.get(SECRET_FILE)):
        source = f"the file {path} of {SECRET_FILE}"
        try:
            secret = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{source} cannot be read ({error}); write the run's secret to it") from error
    elif not secret:
        return None
    if len(secret) < _SECRET_LENGTH:
        raise InputError(
            f"{source} must have at least {_SECRET_LENGTH} characters, got {len(secret)}; try `openssl rand -hex 32`"
        )
    return secret.encode()


def connect_processes(
    cluster: ClusterEnvironment, entries: Mapping[str, str], wait_s: float, secret: bytes | None = None
) -> ControlChannel:
    """Waits until all processes have connected to process 0, and compares the `entries` of their fingerprints.

    Raises in every process that started, within 2 `wait_s` + 10 s:
      PeerError: a process did not connect; its index is named.
      InputError: a process has other entries, or another secret.
    """
    fingerprint = Fingerprint(machine_name(os.environ), {"--processes": str(cluster.process_count), **entries})
    if cluster.process_index == 0:
        return _accept_processes(cluster, fingerprint, wait_s, secret)
    return _connect_to_process_0(cluster, fingerprint, wait_s, secret)


def differences(fingerprints: Mapping[int, Fingerprint]) -> str:
    """Which processes differ from the majority (from process 0, if there is none), and in what; empty if all agree."""
    by_process: dict[int, list[str]] = {}
    for name in sorted({name for fingerprint in fingerprints.values() for name in fingerprint.entries}):
        values = {
            process: fingerprint.entries.get(name, "absent") for process, fingerprint in sorted(fingerprints.items())
        }
        # Counter returns the first of equally frequent values: process 0's.
        majority = Counter(values.values()).most_common(1)[0][0]
        for process, value in values.items():
            if value != majority:
                by_process.setdefault(process, []).append(f"{name} is {value} there and {majority} elsewhere")
    sentences = []
    for process, entries in by_process.items():
        more = f" and {len(entries) - _DIFFERENCES_SHOWN} more" if len(entries) > _DIFFERENCES_SHOWN else ""
        shown = "; ".join(entries[:_DIFFERENCES_SHOWN])
        sentences.append(f"process {process} ({fingerprints[process].host}) differs: {shown}{more}")
    return ". ".join(sentences)


def _accept_processes(
    cluster: ClusterEnvironment, fingerprint: Fingerprint, wait_s: float, secret: bytes | None
) -> ControlChannel:
    host, port = _host_and_port(cluster)
    deadline = time.monotonic() + wait_s
    with ExitStack() as opened:
        bind_addresses = _bind_addresses(host, authenticated=secret is not None)
        listeners = [opened.enter_context(_listen(address, port)) for address in bind_addresses]
        reception = _Reception(listeners, cluster.process_count, secret)
        peers, error = _await_processes(cluster, reception, fingerprint, deadline, wait_s)
        reception.close()
    fingerprints = {0: fingerprint} | {process: peer.fingerprint for process, peer in peers.items()}
    if not error and (differing := differences(fingerprints)):
        error = InputError(f"the processes do not agree. {differing}; start all with the same command, code and files")
    hosts = [fingerprints[process].host for process in sorted(fingerprints)]
    reservation = None if error else _reserve_port(bind_addresses)
    jax_port = reservation.getsockname()[1] if reservation else 0
    for peer in peers.values():
        status = exit_status(error) if error else 0
        message = {"error": str(error or ""), "status": status, "hosts": hosts}
        peer.answer({**message, "jax_address": f"{_bracketed(host)}:{jax_port}"}, secret)
        if error:
            peer.connection.close()
    if error:
        raise error
    connections = {process: peer.connection for process, peer in peers.items()}
    # One address is JAX's too; several, or all interfaces, are JAX's default.
    bind = f"{_bracketed(bind_addresses[0])}:{jax_port}" if len(bind_addresses) == 1 and bind_addresses[0] else None
    return ControlChannel(connections, hosts, f"{_bracketed(host)}:{jax_port}", bind, reservation)


def _await_processes(
    cluster: ClusterEnvironment, reception: _Reception, fingerprint: Fingerprint, deadline: float, wait_s: float
) -> tuple[dict[int, _Peer], CrcjaxError | None]:
    """The connected processes, and the error that ended the wait early or late; None if all have connected."""
    peers: dict[int, _Peer] = {}
    while len(peers) < cluster.process_count - 1:
        peer = reception.next_peer(deadline)
        if peer is None:
            missing = [str(process) for process in range(1, cluster.process_count) if process not in peers]
            rejected = f" ({reception.rejected} connections were rejected, see the log)" if reception.rejected else ""
            return peers, PeerError(
                f"of {cluster.process_count} processes, {', '.join(missing)} did not connect within {wait_s:g} s{rejected}; see "
                f"on their machines why they did not start or cannot reach {cluster.coordinator}, or wait longer (--wait_s)"
            )
        if peer.process in peers or peer.process == 0:
            first_host = peers[peer.process].fingerprint.host if peer.process else fingerprint.host
            # The error goes to both; -1 is no process's index.
            return peers | {-1: peer}, InputError(
                f"{first_host} and {peer.fingerprint.host} both say they are process {peer.process}; give each process its "
                "own index"
            )
        peers[peer.process] = peer
    return peers, None


@dataclass(frozen=True)
class _Peer:
    """An authenticated process that waits for process 0's answer; `challenge` is the one that the answer must meet."""

    process: int
    fingerprint: Fingerprint
    connection: MessageConnection
    challenge: str

    def answer(self, message: dict[str, Any], secret: bytes | None) -> None:
        self.connection.send({**message, "proof": _proof(secret, "process 0", self.challenge, message)})


class _Reception:
    """Accepts connections to process 0; each identifies itself in a thread of its own, so that none delays another."""

    def __init__(self, listeners: Sequence[socket.socket], processes: int, secret: bytes | None):
        self.rejected = 0
        self._secret, self._max_handshakes = secret, _MAX_HANDSHAKES + processes
        self._peers: queue.Queue[_Peer] = queue.Queue()
        self._lock = threading.Lock()
        self._handshakes, self._closed = 0, False
        self._selector = selectors.DefaultSelector()
        for listener in listeners:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)

    def next_peer(self, deadline: float) -> _Peer | None:
        """The next process that has identified itself; None at the deadline (a time of time.monotonic)."""
        while (remaining_s := deadline - time.monotonic()) > 0:
            try:
                return self._peers.get_nowait()
            except queue.Empty:
                for key, _ in self._selector.select(min(0.02, remaining_s)):
                    self._accept(key.fileobj)
        return None

    def close(self) -> None:
        """Turns away whoever has not been handed out by `next_peer`."""
        with self._lock:
            self._closed = True
        while not self._peers.empty():
            self._peers.get().connection.close()
        self._selector.close()

    def _accept(self, listener: Any) -> None:
        try:
            accepted, address = listener.accept()
        except OSError as error:
            log.debug(f"rendezvous: a connection could not be accepted: {error}")
            return
        with self._lock:
            full = self._handshakes >= self._max_handshakes
            self._handshakes += not full
        if full:
            # A process of the run tries again.
            accepted.close()
            return
        threading.Thread(target=self._receive, args=(accepted, address[0]), daemon=True, name="rendezvous").start()

    def _receive(self, accepted: socket.socket, address: str) -> None:
        accepted.settimeout(_HANDSHAKE_S)
        connection = MessageConnection(accepted)
        peer = _identify(connection, address, self._secret)
        with self._lock:
            self._handshakes -= 1
            if peer is not None and not self._closed:
                self._peers.put(peer)
                return
            self.rejected += peer is None
        connection.close()


def _identify(connection: MessageConnection, address: str, secret: bytes | None) -> _Peer | None:
    """The process at the other end, or None, with a line in the log, if it is no process of this run."""
    challenge = secrets.token_hex(16)
    connection.send({"crcjax": "rendezvous", "challenge": challenge, "secret": secret is not None})
    hello = connection.receive(_HANDSHAKE_S)
    if hello is None or not _is_hello(hello):
        log.debug(f"rendezvous: {address} connected and did not identify itself as a process of this run")
        return None
    proof = hello.pop("proof")
    if not hmac.compare_digest(proof, _proof(secret, "process", challenge, hello)):
        log.warning(f"rendezvous: {address} was rejected: its {SECRET} differs from this run's")
        connection.send({"proof": "rejected"})
        return None
    fingerprint = Fingerprint(hello["fingerprint"]["host"], hello["fingerprint"]["entries"])
    return _Peer(hello["process"], fingerprint, connection, hello["challenge"])


def _is_hello(message: Mapping[str, Any]) -> bool:
    types = {"process": int, "fingerprint": dict, "challenge": str, "proof": str}
    if message.keys() != types.keys() or not all(type(message[name]) is kind for name, kind in types.items()):
        return False
    fingerprint = message["fingerprint"]
    return (
        message["process"] >= 0
        and message["proof"].isascii()
        and fingerprint.keys() == {"host", "entries"}
        and isinstance(fingerprint["host"], str)
        and isinstance(fingerprint["entries"], dict)
        and all(isinstance(value, str) for value in fingerprint["entries"].values())
    )


def _connect_to_process_0(
    cluster: ClusterEnvironment, fingerprint: Fingerprint, wait_s: float, secret: bytes | None
) -> ControlChannel:
    connection, greeting = _reach_process_0(cluster, wait_s)
    try:
        challenge = secrets.token_hex(16)
        hello = {"process": cluster.process_index, "fingerprint": asdict(fingerprint), "challenge": challenge}
        process_0 = f"process 0 at {cluster.coordinator}"
        if (secret is None) == bool(greeting["secret"]):
            with_secret, without = ("this process", process_0) if secret else (process_0, "this process")
            raise InputError(f"{with_secret} has a {SECRET} and {without} has none; give all processes the same one")
        connection.send({**hello, "proof": _proof(secret, "process", str(greeting["challenge"]), hello)})
        answer = connection.receive(wait_s + 10)
        if answer is None:
            raise PeerError(f"{process_0} ended before all processes had connected; see its log")
        proof = str(answer.pop("proof", "")).encode()
        if not hmac.compare_digest(proof, _proof(secret, "process 0", challenge, answer).encode()):
            raise InputError(f"{process_0} has another {SECRET} than this process; give all processes the same one")
        if error := answer.get("error"):
            raise PeerError(error) if answer.get("status") == PEER_STATUS else InputError(error)
        if not {"hosts", "jax_address"} <= answer.keys():
            raise InputError(f"{process_0} does not answer as process 0 of a run of crcjax")
    except BaseException:
        connection.close()
        raise
    return ControlChannel({0: connection}, answer["hosts"], answer["jax_address"])


def _reach_process_0(cluster: ClusterEnvironment, wait_s: float) -> tuple[MessageConnection, dict[str, Any]]:
    """A connection to process 0, which may start later than this process, and its greeting."""
    deadline = time.monotonic() + wait_s
    reason = "no connection"
    while (remaining_s := deadline - time.monotonic()) > 0:
        try:
            connection = MessageConnection(socket.create_connection(_host_and_port(cluster), remaining_s))
        except OSError as error:
            reason = f"{cluster.coordinator} cannot be reached ({error})"
        else:
            greeting = connection.receive(min(_HANDSHAKE_S, remaining_s))
            if greeting is not None and {"crcjax", "challenge", "secret"} <= greeting.keys():
                return connection, greeting
            connection.close()
            reason = f"{cluster.coordinator} does not answer as process 0 of a run of crcjax"
        time.sleep(_RETRY_S)
    raise PeerError(
        f"process 0 did not answer within {wait_s:g} s: {reason}; see on its machine why it did not start, or give another "
        "--coordinator"
    )


def _proof(secret: bytes | None, sender: str, challenge: str, message: Mapping[str, Any]) -> str:
    """The HMAC of a message and of the receiver's challenge; the sender's role keeps it from being sent back."""
    if secret is None:
        return ""
    signed = json.dumps([sender, challenge, message], sort_keys=True)
    return hmac.new(secret, signed.encode(), "sha256").hexdigest()


def _host_and_port(cluster: ClusterEnvironment) -> tuple[str, int]:
    host, _, port = cluster.coordinator.rpartition(":")
    return host.strip("[]"), int(port)


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _bind_addresses(host: str, authenticated: bool) -> list[str]:
    """This machine's addresses of the name `host`, or `[""]` for all interfaces if the name stands for none here."""
    try:
        resolved = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise InputError(
            f"--coordinator {host} has no address ({error}); give a name or address of process 0"
        ) from error
    addresses = [address for address in dict.fromkeys(str(entry[4][0]) for entry in resolved) if _is_local(address)]
    loopback = [address for address in addresses if _is_loopback(address)]
    if host == "localhost" or (addresses and host in loopback):
        return addresses
    if not authenticated:
        log.warning(
            f"{SECRET} is not set: whoever reaches {host} can join or end this run; set it to the same random value for "
            "all processes (launch/slurm/train.sbatch does), for example that of `openssl rand -hex 32`"
        )
    if addresses == loopback:
        # Debian's /etc/hosts gives a machine's own name 127.0.1.1; behind a NAT, the name's address is another machine's.
        log.debug(f"rendezvous: {host} is no network address of this machine; listening on all its interfaces")
        return [""]
    return addresses


def _is_loopback(address: str) -> bool:
    return ip_address(address.partition("%")[0]).is_loopback


def _is_local(address: str) -> bool:
    try:
        with socket.create_server((address, 0), family=_family(address)):
            return True
    except OSError:
        return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _listen(address: str, port: int) -> socket.socket:
    try:
        if not address and socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
        return socket.create_server((address, port), family=_family(address), backlog=1024)
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port} ({error.strerror}); give another one with --coordinator HOST:PORT"
        ) from error


def _reserve_port(bind_addresses: Sequence[str]) -> socket.socket:
    """A bound socket that does not listen: it keeps a port from other programs until JAX has opened it.

    JAX's service sets SO_REUSEPORT as this socket does, so that both can be bound at once. Connections go to the service,
    which alone listens.
    """
    address = bind_addresses[0] if len(bind_addresses) == 1 else ""
    every_ipv6 = not address and socket.has_dualstack_ipv6()
    reservation = socket.socket(socket.AF_INET6 if every_ipv6 else _family(address), socket.SOCK_STREAM)
    reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if every_ipv6:
        reservation.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    reservation.bind((address, 0))
    return reservation
