"""What the queue in Redis asks of its server, and the server's own faults; the contract is in test_queue.py."""

import socket
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from crcjax.errors import InputError
from crcjax.serve.open_queue import open_queue
from crcjax.serve.queue import JobRequest, QueueLimits, QueueUnavailableError, Status
from crcjax.serve.redis_queue import RedisQueue

pytestmark = pytest.mark.redis


def test_a_server_that_would_lose_jobs_is_refused_with_every_wrong_setting(redis_server) -> None:
    client = RedisQueue(redis_server.url)._redis
    client.config_set("appendfsync", "everysec")
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(InputError) as caught:
            RedisQueue(redis_server.url)
    finally:
        client.config_set("appendfsync", "always")
        client.config_set("maxmemory-policy", "noeviction")
        client.close()
    assert "appendfsync must be always, got everysec" in str(caught.value)
    assert "maxmemory-policy must be noeviction, got allkeys-lru" in str(caught.value)
    assert "appendonly" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_server_that_does_not_answer_is_one_line_without_its_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(QueueUnavailableError, match="cannot be reached") as caught:
        RedisQueue(f"redis://:secret@127.0.0.1:{port}/0", patience=0)
    assert "secret" not in str(caught.value)
    with pytest.raises(InputError, match="redis must be a URL"):
        RedisQueue("127.0.0.1")


def test_the_service_names_a_server_that_is_not_usable(crcjax: Callable, tmp_path: Path, bundle_folder: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
    done: subprocess.CompletedProcess = crcjax(
        "serve", "--bundle", bundle_folder, "--state", tmp_path / "state", "--redis", url
    )
    assert done.returncode == 2
    assert "redis at 127.0.0.1: cannot be reached" in done.stderr


def test_accepted_jobs_leases_and_results_outlive_a_killed_server(start_redis: Callable, tmp_path: Path) -> None:
    server = start_redis(tmp_path)
    queue = RedisQueue(server.url, patience=0)
    jobs = [queue.submit(JobRequest(str(number), "a", {})) for number in range(3)]
    done, running = queue.claim("w"), queue.claim("w")
    assert done is not None
    assert running is not None
    queue.commit(done, {"answer": 42})
    server.kill()
    with pytest.raises(QueueUnavailableError):
        queue.submit(JobRequest("other", "a", {}))
    server.start()
    statuses = [job.status for job in map(queue.job, (job.id for job in jobs)) if job is not None]
    assert statuses == [Status.DONE, Status.RUNNING, Status.QUEUED]
    queue.commit(running, {})
    first = queue.job(jobs[0].id)
    assert first is not None
    assert first.result == {"answer": 42}
    queue.close()


def test_a_database_belongs_to_one_state_folder(start_redis: Callable, tmp_path: Path) -> None:
    server = start_redis(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    for _ in range(2):
        open_queue(tmp_path / "first", redis=server.url).close()
    with pytest.raises(InputError, match="holds the jobs of another state folder"):
        open_queue(tmp_path / "second", redis=server.url)
    open_queue(tmp_path / "second", redis=server.url.replace("/0", "/1")).close()


def test_a_clock_that_is_set_back_delays_a_dead_workers_job_by_one_lease_at_most(redis_server, tmp_path: Path) -> None:
    time_s = 1e9
    queue = RedisQueue(redis_server.url, QueueLimits(lease_s=10.0), now=lambda: time_s, prefix=f"{tmp_path}:")
    job = queue.submit(JobRequest("x", "a", {}))
    assert queue.claim("dead") is not None
    time_s -= 3600
    assert queue.claim("other") is None
    time_s += 10.5
    again = queue.claim("other")
    assert again is not None
    assert again.job_id == job.id
    queue.close()


def test_a_full_memory_refuses_jobs_and_loses_none(start_redis: Callable, tmp_path: Path) -> None:
    server = start_redis(tmp_path)
    queue = RedisQueue(server.url, patience=0)
    queue._redis.config_set("maxmemory", "2mb")
    accepted = []
    with suppress(QueueUnavailableError):
        for number in range(100):
            accepted.append(queue.submit(JobRequest(str(number), "a", {"text": "x" * 100_000})).id)
    assert 0 < len(accepted) < 100
    assert queue.stats().counts == {Status.QUEUED: len(accepted)}
    queue._redis.config_set("maxmemory", "0")
    assert [queue.job(job) is not None for job in accepted] == [True] * len(accepted)
    queue.close()
