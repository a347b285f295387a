"""Requests a second: what is answered, what waits, and that all processes count together."""

import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from crcjax.serve.rate_limits import Rate, RateLimits, TooManyRequestsError
from crcjax.serve.service import open_service


def _accepted(limits: RateLimits, name: str, count: int) -> int:
    accepted = 0
    for _ in range(count):
        try:
            limits.count_account(name)
            accepted += 1
        except TooManyRequestsError:
            pass
    return accepted


def test_a_burst_is_answered_and_then_the_sustained_rate(tmp_path: Path) -> None:
    time_s = 1000.0
    limits = RateLimits(tmp_path / "rates.db", Rate(2.0, 10), Rate(0.1, 3), lambda: time_s)
    other_process = RateLimits(tmp_path / "rates.db", Rate(2.0, 10), Rate(0.1, 3), lambda: time_s)
    assert _accepted(limits, "a", 6) + _accepted(other_process, "a", 20) == 10
    assert _accepted(limits, "b", 20) == 10, "others are not affected"
    time_s += 3.0
    assert _accepted(limits, "a", 20) == 6
    time_s += 1000.0
    assert _accepted(limits, "a", 20) == 10, "unused time is worth one burst"
    for _ in range(3):
        limits.count_address("192.0.2.1")
    with pytest.raises(TooManyRequestsError) as caught:
        limits.count_address("192.0.2.1")
    assert caught.value.retry_after_s == 10
    time_s += 10.0
    limits.count_address("192.0.2.1")
    time_s -= 3600.0
    assert _accepted(limits, "a", 5) > 0, "a clock that is set back blocks nobody"


def test_a_file_that_cannot_be_written_limits_nobody(tmp_path: Path) -> None:
    limits = RateLimits(tmp_path / "rates.db", Rate(0.001, 1), Rate(0.001, 1))
    limits._database._connection.execute("PRAGMA query_only = ON")
    assert _accepted(limits, "a", 3) == 3


# Prints how many of 150 requests are accepted.
COUNT = """
import sys
from pathlib import Path
from crcjax.serve.rate_limits import Rate, RateLimits, TooManyRequestsError

limits, accepted = RateLimits(Path(sys.argv[1]), Rate(0.001, 200), Rate(1.0, 1)), 0
for _ in range(150):
    try:
        limits.count_account("a")
        accepted += 1
    except TooManyRequestsError:
        pass
print(accepted)
"""


def test_processes_count_together(tmp_path: Path) -> None:
    limits = RateLimits(tmp_path / "rates.db", Rate(0.001, 200), Rate(1.0, 1))
    limits._database.close()
    command = [sys.executable, "-c", COUNT, str(tmp_path / "rates.db")]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    counts = [int(child.communicate()[0]) for child in children]
    assert sum(counts) == 200


def test_the_api_answers_429_with_a_time_to_come_back(tmp_path: Path, bundle_folder: Path, serve) -> None:
    service = open_service(tmp_path / "state", bundle_folder, {}, rates=(Rate(0.1, 5), Rate(0.1, 3)))
    service.accounts.add_service("gateway", "leeds")
    with serve(service) as server:
        client = server.client(service.accounts.add_service("other", "leeds"))
        statuses = [client._http.get("/v1/me").status_code for _ in range(6)]
        assert statuses == [200] * 5 + [429]
        guest = server.client("not a token")
        responses: list[httpx.Response] = [guest._http.get("/v1/me") for _ in range(4)]
        assert [response.status_code for response in responses] == [401] * 3 + [429]
        assert 1 <= int(responses[-1].headers["retry-after"]) <= 10
        assert responses[-1].headers["content-type"] == "application/problem+json"
        body = {"name": "gateway", "password": "wrong"}
        assert guest._http.post("/v1/sign-in", json=body).status_code == 429, "before the password is looked at"
        assert guest._http.get("/livez").status_code == 200
