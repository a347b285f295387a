import json
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from crcjax.errors import PEER_STATUS, CrcjaxError, InputError, exit_status
from crcjax.monitor.logs import log
from crcjax.parallel import rendezvous
from crcjax.parallel.cluster_env import ClusterEnvironment
from crcjax.parallel.message_connection import MessageConnection
from crcjax.parallel.rendezvous import ControlChannel, Fingerprint, connect_processes, differences, rendezvous_secret

ENTRIES = {"config.train.steps": "300", "jax": "0.10.2", "the cohort file": "aa"}
SECRET = b"a secret of the tests"
HOST = socket.gethostname()

Start = Callable[..., "Future[ControlChannel]"]


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def start(address: str) -> Iterator[Start]:
    """start(process, count): one process of a run, as a thread; its future gives the channel or raises the error."""
    futures: list[Future[ControlChannel]] = []

    def start(
        process: int,
        count: int = 2,
        *,
        entries: Mapping[str, str] = ENTRIES,
        wait_s: float = 20.0,
        secret: bytes | None = SECRET,
        coordinator: str = address,
    ) -> Future[ControlChannel]:
        cluster = ClusterEnvironment(coordinator, count, process)
        futures.append(pool.submit(connect_processes, cluster, entries, wait_s, secret))
        return futures[-1]

    with ThreadPoolExecutor(16) as pool:
        yield start
    for future in futures:
        if future.exception() is None:
            future.result().close()
            with future.result().jax_port_reservation:
                pass


def _stranger(address: str) -> MessageConnection:
    """A connection to process 0, whose greeting has been read."""
    host, port = address.split(":")
    while True:
        with suppress(ConnectionRefusedError):
            connection = MessageConnection(socket.create_connection((host, int(port))))
            assert connection.receive(20.0) is not None
            return connection


def _error(future: Future[ControlChannel], status: int = 2) -> str:
    error = future.exception()
    assert isinstance(error, CrcjaxError)
    assert exit_status(error) == status
    return str(error)


@pytest.mark.parametrize("secret", [SECRET, None])
def test_processes_connect_in_any_order_and_exchange_messages(start: Start, secret: bytes | None) -> None:
    two, zero, one = (start(process, 3, secret=secret).result for process in (2, 0, 1))
    assert zero().names == two().names == [f"process {i} ({HOST})" for i in range(3)]
    assert zero().jax_address == one().jax_address == zero().jax_bind_address
    messages: queue.Queue = queue.Queue()
    zero().subscribe(lambda *message: messages.put(message))
    one().send({"progress": 3})
    assert messages.get(timeout=20) == (1, {"progress": 3})
    # As the system does for a killed process.
    one().close()
    assert messages.get(timeout=20) == (1, None)


def test_processes_that_do_not_connect_are_named_in_every_process(start: Start) -> None:
    for future in (start(0, 4, wait_s=2.0), start(2, 4, wait_s=2.0)):
        assert "of 4 processes, 1, 3 did not connect within 2 s" in _error(future, PEER_STATUS)


def test_a_process_0_that_does_not_start_is_named(start: Start, address: str) -> None:
    error = _error(start(1, wait_s=0.3), PEER_STATUS)
    assert f"process 0 did not answer within 0.3 s: {address} cannot be reached" in error


def test_a_different_config_or_version_is_named_in_every_process(start: Start) -> None:
    others = ENTRIES | {"config.train.steps": "400", "jax": "0.11.0"}
    for future in [start(0, 3), start(1, 3), start(2, 3, entries=others)]:
        assert f"process 2 ({HOST}) differs: config.train.steps is 400 there and 300 elsewhere" in _error(future)
        assert "jax is 0.11.0 there" in _error(future)
        assert "process 1" not in _error(future)


def test_two_processes_with_the_same_index_are_refused(start: Start) -> None:
    for future in [start(0, 3), start(1, 3), start(1, 3)]:
        assert f"{HOST} and {HOST} both say they are process 1; give each process its own index" in _error(future)


def test_a_stranger_neither_ends_nor_delays_a_run(start: Start, address: str) -> None:
    zero = start(0)
    # It would be process 1, but for the proof.
    hello = {"process": 1, "fingerprint": {"host": "stranger", "entries": {}}, "challenge": "", "proof": "0" * 64}
    lines = [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\xff\xfe\n",
        b"[" * 200_000 + b"\n",
        json.dumps(hello).encode() + b"\n",
        json.dumps(hello | {"proof": "é"}).encode() + b"\n",
        json.dumps(hello | {"process": "1"}).encode() + b"\n",
        json.dumps(hello | {"fingerprint": None}).encode() + b"\n",
        b"x" * (1 << 21),
    ]
    strangers = [_stranger(address) for _ in lines]
    for connection, line in zip(strangers, lines, strict=True):
        with suppress(OSError):
            connection._connection.sendall(line)
    answers = [connection.receive(20.0) for connection in strangers]
    # Each is disconnected at once; only a process with another secret is told why.
    assert answers == [None, None, None, {"proof": "rejected"}, None, None, None, None]
    half_open, slow = _stranger(address), _stranger(address)
    slow._connection.sendall(b'{"process"')
    one = start(1)
    # These two are still connected, and the run starts nevertheless.
    assert zero.result().names == one.result().names
    assert half_open._connection.fileno() >= 0
    for connection in [*strangers, half_open, slow]:
        connection.close()


def test_a_connection_that_sends_a_byte_at_a_time_is_closed_at_its_deadline() -> None:
    ours, theirs = socket.socketpair()
    connection = MessageConnection(ours)
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(connection.receive, 0.3)
        while not received.done():
            theirs.sendall(b"x")
            time.sleep(0.01)  # faster, the bytes would fill the socket, and nobody reads them after the deadline
        assert received.result() is None
    connection.close()
    theirs.close()


def test_more_strangers_than_process_0_serves_at_once_do_not_keep_a_process_out(
    start: Start, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rendezvous, "_MAX_HANDSHAKES", 0)
    zero = start(0)
    # As many as there are processes are served at once.
    strangers = [_stranger(address), _stranger(address)]
    one = start(1)
    host, port = address.split(":")
    with socket.create_connection((host, int(port))) as turned_away:
        assert turned_away.recv(1) == b""
    for connection in strangers:
        connection.close()
    assert zero.result().names == one.result().names


@pytest.mark.parametrize(
    ("secret", "message"),
    [(b"another secret, wrong", "has another CRCJAX_RENDEZVOUS_SECRET"), (None, "and this process has none")],
)
def test_a_process_with_another_secret_is_told_so_and_the_others_go_on(
    start: Start, secret: bytes | None, message: str
) -> None:
    zero = start(0)
    assert message in _error(start(1, secret=secret))
    assert start(1).result().names == zero.result().names


def test_a_process_0_that_does_not_know_the_secret_is_refused(start: Start) -> None:
    start(0, secret=None, wait_s=2.0)
    assert "this process has a CRCJAX_RENDEZVOUS_SECRET and process 0" in _error(start(1))


def test_an_answer_without_proof_is_refused(address: str, start: Start) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server:
        one = start(1)
        impostor = MessageConnection(server.accept()[0])
        impostor.send({"crcjax": "rendezvous", "challenge": "00", "secret": True})
        hello = impostor.receive(20.0)
        assert hello is not None
        # It sends the process's own proof back.
        impostor.send({"error": "", "hosts": ["a", "b"], "jax_address": "evil:1", "proof": hello["proof"]})
        assert "has another CRCJAX_RENDEZVOUS_SECRET" in _error(one)
        assert SECRET.decode() not in str(hello)
        impostor.close()


def test_a_service_that_is_no_run_of_crcjax_is_named(address: str, start: Start) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as server, ThreadPoolExecutor(1) as pool:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with server.accept()[0] as connection:
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        pool.submit(serve)
        assert "does not answer as process 0 of a run of crcjax" in _error(start(1, wait_s=0.5), PEER_STATUS)
        server.shutdown(socket.SHUT_RDWR)


def test_a_port_in_use_is_named(start: Start, address: str) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        assert f"cannot listen on port {port}" in _error(start(0))


def test_process_0_listens_on_the_address_of_the_coordinator_alone(start: Start, address: str) -> None:
    start(0)
    _stranger(address).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", int(address.split(":")[1])))
    start(1).result()


def test_the_port_of_jax_is_reserved_until_jax_has_opened_it(start: Start) -> None:
    zero, _ = start(0), start(1)
    channel = zero.result()
    host, port = channel.jax_address.split(":")
    with channel.jax_port_reservation:
        with pytest.raises(OSError, match="in use"):
            socket.create_server((host, int(port)))
        initialize = (
            f"import jax; jax.distributed.initialize('{channel.jax_address}', 1, 0, "
            f"coordinator_bind_address='{channel.jax_bind_address}', initialization_timeout=60)"
        )
        subprocess.run([sys.executable, "-c", initialize], check=True, timeout=120)


def test_without_a_secret_a_network_address_gives_a_warning_and_loopback_gives_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(log, "warning", warnings.append)
    assert rendezvous._bind_addresses("127.0.0.1", False) == ["127.0.0.1"]
    assert set(rendezvous._bind_addresses("localhost", False)) <= {"127.0.0.1", "::1"}
    assert warnings == []
    # As Debian's /etc/hosts has it for a machine's own name, which other machines resolve to its network address.
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(None, None, None, "", ("127.0.1.1", 0))])
    assert rendezvous._bind_addresses("node-07", True) == [""]
    assert warnings == []
    assert rendezvous._bind_addresses("node-07", False) == [""]
    assert "CRCJAX_RENDEZVOUS_SECRET is not set: whoever reaches node-07 can join or end this run" in warnings[0]


def test_a_name_whose_address_is_not_of_this_machine_listens_on_all_interfaces(start: Start, address: str) -> None:
    # 192.0.2.0/24 is reserved for documentation.
    assert rendezvous._bind_addresses("192.0.2.7", True) == [""]
    zero = start(0, coordinator=f"192.0.2.7:{address.split(':')[1]}")
    start(1).result()
    assert zero.result().jax_bind_address is None


def test_the_secret_comes_from_a_variable_or_a_file_and_must_be_long(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_bytes(SECRET + b"\n")
    assert rendezvous_secret({}) is None
    assert rendezvous_secret({"CRCJAX_RENDEZVOUS_SECRET": SECRET.decode()}) == SECRET
    assert rendezvous_secret({"CRCJAX_RENDEZVOUS_SECRET_FILE": str(file)}) == SECRET
    file.write_text("")
    for environment in ({"CRCJAX_RENDEZVOUS_SECRET": "short"}, {"CRCJAX_RENDEZVOUS_SECRET_FILE": str(file)}):
        with pytest.raises(InputError, match=r"must have at least 16 characters, got [05]; try `openssl rand -hex 32`"):
            rendezvous_secret(environment)
    with pytest.raises(InputError, match="absent of CRCJAX_RENDEZVOUS_SECRET_FILE cannot be read"):
        rendezvous_secret({"CRCJAX_RENDEZVOUS_SECRET_FILE": str(tmp_path / "absent")})


def test_a_process_differs_from_the_majority_and_of_two_from_process_0() -> None:
    a, b = Fingerprint("m", {"x": "1"}), Fingerprint("n", {"x": "2"})
    assert differences({0: b, 1: a, 2: a}).startswith("process 0 (n) differs: x is 2 there and 1 elsewhere")
    assert differences({0: a, 1: b}).startswith("process 1 (n) differs")
    assert differences({0: a, 1: Fingerprint("n", {})}) == "process 1 (n) differs: x is absent there and 1 elsewhere"
    assert differences({0: a, 1: a}) == ""
