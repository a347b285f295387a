import queue
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from crcjax.errors import InputError
from crcjax.parallel.cluster_env import ClusterEnvironment
from crcjax.parallel.rendezvous import Caller, Line, call_roll, differences

FACTS = {"config.train.steps": "300", "jax": "0.10.2", "the cohort file": "aa"}


LINES: list[Line] = []


@pytest.fixture(autouse=True)
def _hung_up() -> Iterator[None]:
    yield
    while LINES:
        LINES.pop().close()


@pytest.fixture
def address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def _call_all(address: str, facts: dict[int, dict[str, str]], processes: int, wait_s: float = 10.0) -> list:
    """What `call_roll` gives or raises in each process of `facts`, threads standing for processes."""

    def call(process: int):
        try:
            LINES.append(line := call_roll(ClusterEnvironment(address, processes, process), facts[process], wait_s))
            return line
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(len(facts)) as pool:
        return list(pool.map(call, facts))


def test_all_come_in_any_order_and_can_talk(address: str) -> None:
    lines = _call_all(address, dict.fromkeys((2, 0, 1), FACTS), 3)
    assert all(isinstance(line, Line) for line in lines)
    two, zero, one = lines
    assert zero.names == two.names == [f"process {i} ({socket.gethostname()})" for i in range(3)]
    assert zero.service == one.service
    heard: queue.Queue = queue.Queue()
    zero.listen(lambda *what: heard.put(what))
    one.tell({"at": 3})
    assert heard.get(timeout=5) == (1, {"at": 3})


def test_those_that_do_not_come_are_named_to_all_within_the_time(address: str) -> None:
    began = time.monotonic()
    found = _call_all(address, {0: FACTS, 2: FACTS}, 4, wait_s=0.5)
    assert time.monotonic() - began < 5
    assert len(found) == 2
    assert all("of 4 processes, 1, 3 did not come within 0.5 s" in words for words in found)


def test_a_process_0_that_does_not_come_is_named(address: str) -> None:
    (words,) = _call_all(address, {1: FACTS}, 2, wait_s=0.3)
    assert f"process 0 did not come within 0.3 s: {address} cannot be reached" in words


def test_another_config_or_version_is_named_to_all_with_its_process(address: str) -> None:
    other = FACTS | {"config.train.steps": "400", "jax": "0.11.0"}
    found = _call_all(address, {0: FACTS, 1: FACTS, 2: other}, 3)
    for words in found:
        assert f"process 2 ({socket.gethostname()}) differs: config.train.steps is 400 there and 300 elsewhere" in words
        assert "jax is 0.11.0 there" in words
        assert "process 1" not in words


def test_two_processes_of_one_index_are_refused(address: str) -> None:
    def late() -> str:
        time.sleep(0.3)
        return _call_all(address, {1: FACTS}, 3)[0]

    with ThreadPoolExecutor(1) as pool:
        doubled = pool.submit(late)
        found = [*_call_all(address, {0: FACTS, 1: FACTS}, 3), doubled.result()]
    assert all("both say they are process 1" in words for words in found)


def test_a_stranger_on_the_port_does_not_disturb(address: str) -> None:
    def disturb() -> None:
        host, port = address.split(":")
        for _ in range(100):
            try:
                with socket.create_connection((host, int(port))) as wire:
                    wire.sendall(b"GET / HTTP/1.1\r\n\r\n")
                return
            except OSError:
                time.sleep(0.02)

    thread = threading.Thread(target=disturb)
    thread.start()
    with ThreadPoolExecutor(1) as pool:
        zero = pool.submit(lambda: _call_all(address, {0: FACTS}, 2)[0])
        thread.join()
        one = _call_all(address, {1: FACTS}, 2)[0]
        assert isinstance(zero.result(), Line)
        assert isinstance(one, Line)


def test_a_taken_port_is_named(address: str) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))):
        assert "give another one with --coordinator" in _call_all(address, {0: FACTS}, 2)[0]


def test_a_process_that_is_gone_is_heard_of_at_once(address: str) -> None:
    zero, one = _call_all(address, {0: FACTS, 1: FACTS}, 2)
    heard: queue.Queue = queue.Queue()
    zero.listen(lambda *what: heard.put(what))
    one.close()  # as the system does for a killed process
    assert heard.get(timeout=5) == (1, None)


def test_the_odd_one_differs_from_the_most_and_among_two_from_process_0() -> None:
    a, b = Caller("m", {"x": "1"}), Caller("n", {"x": "2"})
    assert differences({0: b, 1: a, 2: a}).startswith("process 0 (n) differs: x is 2 there and 1 elsewhere")
    assert differences({0: a, 1: b}).startswith("process 1 (n) differs")
    assert differences({0: a, 1: Caller("n", {})}) == "process 1 (n) differs: x is absent there and 1 elsewhere"
    assert differences({0: a, 1: a}) == ""
