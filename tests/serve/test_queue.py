"""The contract of `crcjax.serve.queue`, for every back end."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from crcjax.serve.database import Database
from crcjax.serve.open_queue import open_queue as open_back_end
from crcjax.serve.queue import (
    JobRequest,
    LeaseLostError,
    Priority,
    Queue,
    QueueFullError,
    QueueLimits,
    Status,
)
from crcjax.serve.redis_queue import RedisQueue
from crcjax.serve.sqlite_queue import MIGRATIONS, Clock, SqliteQueue

BACK_ENDS = ["sqlite", pytest.param("redis", marks=pytest.mark.redis)]
# Opens the queue of a folder with limits and a clock.
Open = Callable[[Path, QueueLimits, Clock], Queue]
LIMITS = QueueLimits(max_queued=2000, max_tries=3, lease_s=10.0, ageing_s=100.0)


class FakeClock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.time_s = 1000.0

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.time_s, lambda: self.time_s)


@pytest.fixture
def time_() -> FakeClock:
    return FakeClock()


@pytest.fixture(params=BACK_ENDS)
def open_(request: pytest.FixtureRequest) -> Iterator[Open]:
    """open_(folder, limits, clock): the queue of a folder."""
    if request.param == "sqlite":
        yield lambda folder, limits, clock: SqliteQueue(folder / "queue.db", limits, clock)
        return
    url = request.getfixturevalue("redis_server").url
    queues: list[RedisQueue] = []

    def open_redis(folder: Path, limits: QueueLimits, clock: Clock) -> RedisQueue:
        queues.append(RedisQueue(url, limits, now=clock.now, prefix=f"{folder}:"))
        return queues[-1]

    yield open_redis
    for queue in queues:
        queue.close()


@pytest.fixture
def open_queue(open_: Open, tmp_path: Path, time_: FakeClock) -> Callable[..., Queue]:
    """open_queue(): the queue of this test; each call opens it once more."""
    return lambda limits=LIMITS: open_(tmp_path, limits, time_.clock)


@pytest.fixture
def queue(open_queue: Callable[..., Queue]) -> Queue:
    return open_queue()


def _request(key: str, owner: str = "a", priority: Priority = Priority.ROUTINE, site: str = "") -> JobRequest:
    return JobRequest(key, owner, {"key": key}, priority, site)


def _claimed(queue: Queue, worker: str = "w") -> str:
    lease = queue.claim(worker)
    assert lease is not None
    return lease.payload["key"]


def test_a_job_goes_from_queued_over_running_to_done_and_another_process_sees_it(
    queue: Queue, open_queue: Callable[..., Queue], time_: FakeClock
) -> None:
    job = queue.submit(_request("x"))
    assert (job.status, job.position, job.tries) == (Status.QUEUED, 0, 0)
    time_.time_s += 5
    lease = queue.claim("w")
    assert lease is not None
    assert lease.job_id == job.id
    assert queue.claim("w") is None
    queue.renew(lease, 0.5, "slide 1 of 2")
    running = open_queue().job(job.id)
    assert running is not None
    assert (running.status, running.progress, running.stage) == (Status.RUNNING, 0.5, "slide 1 of 2")
    time_.time_s += 5
    queue.commit(lease, {"answer": 42})
    done = open_queue().job(job.id)
    assert done is not None
    assert (done.status, done.result, done.progress, done.position) == (Status.DONE, {"answer": 42}, 1.0, None)
    assert (done.submitted_s, done.started_s, done.ended_s) == (1000, 1005, 1010)
    assert done.revision > running.revision > job.revision
    assert queue.stats().mean_job_s == 5


def test_the_same_result_key_is_the_same_job_until_it_failed(queue: Queue) -> None:
    first = queue.submit(_request("x"))
    assert queue.submit(_request("x", "b")).id == first.id
    lease = queue.claim("w")
    assert lease is not None
    assert queue.submit(_request("x")).id == first.id
    queue.fail(lease, "the slide is damaged")
    again = queue.submit(_request("x"))
    assert again.id != first.id
    failed = queue.job(first.id)
    assert failed is not None
    assert (failed.status, failed.reason) == (Status.FAILED, "the slide is damaged")
    lease = queue.claim("w")
    assert lease is not None
    queue.commit(lease, {})
    assert queue.submit(_request("x")).status == Status.DONE


def test_an_urgent_job_is_the_next_of_a_thousand(queue: Queue) -> None:
    for number in range(1000):
        queue.submit(_request(f"r{number}"))
    assert _claimed(queue) == "r0"
    queue.submit(_request("r500", priority=Priority.URGENT))
    assert queue.submit(_request("u", priority=Priority.URGENT)).position == 1
    assert [_claimed(queue) for _ in range(3)] == ["r500", "u", "r1"]


def test_users_take_turns(queue: Queue) -> None:
    for number in range(5):
        queue.submit(_request(f"a{number}", "a"))
    assert _claimed(queue) == "a0"
    for number in range(2):
        queue.submit(_request(f"b{number}", "b"))
    assert [_claimed(queue) for _ in range(6)] == ["b0", "a1", "b1", "a2", "a3", "a4"]


def test_sites_take_turns_and_the_users_of_each_site_among_themselves(queue: Queue) -> None:
    for number in range(4):
        queue.submit(_request(f"la{number}", "a", site="leeds"))
    assert [_claimed(queue) for _ in range(2)] == ["la0", "la1"]
    queue.submit(_request("lb0", "b", site="leeds"))
    for number in range(2):
        queue.submit(_request(f"ya{number}", "a", site="york"))
    jobs = [queue.submit(_request(key, site="other")) for key in ("la2", "la3", "lb0", "ya0", "ya1")]
    order = ["ya0", "lb0", "ya1", "la2", "la3"]
    assert {job.payload["key"]: job.position for job in jobs} == {key: place for place, key in enumerate(order)}
    assert [_claimed(queue) for _ in range(5)] == order


def test_positions_are_the_order_of_the_claims(queue: Queue) -> None:
    choose = random.Random(0)
    for number in range(60):
        priority = Priority.URGENT if choose.random() < 0.3 else Priority.ROUTINE
        queue.submit(_request(str(number), choose.choice("abc"), priority, choose.choice(["leeds", "york", "hull"])))
        if choose.random() < 0.3:
            _claimed(queue)
    waiting = [queue.submit(_request(str(number))) for number in range(60)]
    positions = {job.payload["key"]: job.position for job in waiting if job.status == Status.QUEUED}
    claims = [_claimed(queue) for _ in positions]
    assert claims == sorted(positions, key=lambda key: positions[key] or 0)


def test_only_the_newest_results_are_shared_and_none_once_they_are_forgotten(open_queue: Callable[..., Queue]) -> None:
    queue, jobs = open_queue(QueueLimits(max_shared=3)), {}
    for number in range(9):
        jobs[number] = queue.submit(_request(f"x{number}")).id
        lease = queue.claim("w")
        assert lease is not None
        queue.commit(lease, {"number": number})
    assert queue.submit(_request("x8")).id == jobs[8]
    assert queue.submit(_request("x0")).id != jobs[0]
    first = queue.job(jobs[0])
    assert first is not None
    assert first.result == {"number": 0}, "the result itself stays"
    queue.forget_results()
    assert queue.submit(_request("x8")).id != jobs[8]


def test_an_aged_job_gets_every_second_claim_whatever_urgent_jobs_arrive(queue: Queue, time_: FakeClock) -> None:
    for number in range(3):
        queue.submit(_request(f"r{number}"))
    time_.time_s += LIMITS.ageing_s
    claims = []
    for number in range(6):
        queue.submit(_request(f"u{number}", priority=Priority.URGENT))
        claims.append(_claimed(queue))
    assert claims == ["u0", "r0", "u1", "r1", "u2", "r2"]


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1))
def test_no_job_waits_longer_than_the_stated_bound(
    seed: int, open_: Open, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """One worker, jobs of a second, and users who submit whenever there is room, mostly urgent jobs."""
    choose, time_ = random.Random(seed), FakeClock()
    limits = QueueLimits(max_queued=8, ageing_s=20.0)
    queue = open_(tmp_path_factory.mktemp("queue"), limits, time_.clock)
    waits, submitted = [], 0
    for _ in range(60):
        while choose.random() < 0.8:
            priority = Priority.URGENT if choose.random() < 0.9 else Priority.ROUTINE
            try:
                queue.submit(_request(str(submitted), choose.choice("abc"), priority, choose.choice(["s", "t"])))
            except QueueFullError:
                break
            submitted += 1
        lease = queue.claim("w")
        if lease is not None:
            job = queue.job(lease.job_id)
            assert job is not None
            waits.append(time_.time_s - job.submitted_s)
            queue.commit(lease, {})
        time_.time_s += 1
    assert max(waits) <= limits.longest_wait_s(1.0, 1)


def test_a_full_queue_refuses_with_a_time_to_come_back_and_loses_nothing(open_queue: Callable[..., Queue]) -> None:
    queue = open_queue(QueueLimits(max_queued=2))
    jobs = [queue.submit(_request(key)) for key in "xy"]
    with pytest.raises(QueueFullError, match="full") as caught:
        queue.submit(_request("z"))
    assert caught.value.retry_after_s >= 1
    assert queue.submit(_request("x")).id == jobs[0].id, "a known job needs no room"
    _claimed(queue)
    assert queue.submit(_request("z")).status == Status.QUEUED


def test_an_expired_lease_goes_to_another_worker_and_the_first_ones_result_is_refused(
    queue: Queue, time_: FakeClock
) -> None:
    job = queue.submit(_request("x"))
    slow = queue.claim("slow")
    assert slow is not None
    time_.time_s += 8
    queue.renew(slow, 0.1, "")
    time_.time_s += 8
    assert queue.claim("other") is None, "it was renewed"
    time_.time_s += 3
    other = queue.claim("other")
    assert other is not None
    assert (other.job_id, other.token > slow.token) == (job.id, True)
    for report in (
        lambda: queue.renew(slow, 0.2, ""),
        lambda: queue.commit(slow, {"by": "slow"}),
        lambda: queue.fail(slow, ""),
        lambda: queue.abandon(slow, ""),
        lambda: queue.release(slow),
    ):
        with pytest.raises(LeaseLostError):
            report()
    queue.commit(other, {"by": "other"})
    with pytest.raises(LeaseLostError):
        queue.commit(other, {"by": "other, again"})
    done = queue.job(job.id)
    assert done is not None
    assert (done.result, done.tries) == ({"by": "other"}, 2)


def test_a_job_that_kills_its_workers_is_quarantined_and_named(queue: Queue) -> None:
    job = queue.submit(_request("x"))
    queue.submit(_request("y"))
    for number in range(LIMITS.max_tries):
        assert _claimed(queue, f"w{number}") == "x", "it goes back to its place"
        queue.report_worker(f"w{number}", "busy")
        queue.worker_died(f"w{number}")
    ended = queue.job(job.id)
    assert ended is not None
    assert ended.status == Status.QUARANTINED
    assert "tried 3 times" in ended.reason
    assert _claimed(queue) == "y"
    assert queue.workers() == []


def test_an_abandoned_job_counts_its_tries_and_a_released_one_does_not(queue: Queue) -> None:
    job = queue.submit(_request("x"))
    for end in (*[queue.release] * 5, *[lambda lease: queue.abandon(lease, "out of memory")] * 3):
        lease = queue.claim("w")
        assert lease is not None
        end(lease)
    ended = queue.job(job.id)
    assert ended is not None
    assert (ended.status, ended.reason) == (
        Status.QUARANTINED,
        "tried 3 times without an end; the last time: out of memory",
    )


def test_cancelling_ends_a_queued_and_a_running_job_and_changes_no_finished_one(queue: Queue) -> None:
    running, queued = (queue.submit(_request(key)) for key in "xy")
    lease = queue.claim("w")
    assert lease is not None
    for job in (running, queued):
        cancelled = queue.cancel(job.id)
        assert cancelled is not None
        assert cancelled.status == Status.CANCELLED
    with pytest.raises(LeaseLostError, match="cancelled"):
        queue.renew(lease, 0.0, "")
    with pytest.raises(LeaseLostError):
        queue.commit(lease, {})
    assert queue.claim("w") is None
    done = queue.submit(_request("z"))
    lease = queue.claim("w")
    assert lease is not None
    queue.commit(lease, {})
    after = queue.cancel(done.id)
    assert after is not None
    assert after.status == Status.DONE
    assert queue.cancel("unknown") is None


def test_it_knows_its_workers_and_counts(queue: Queue, time_: FakeClock) -> None:
    queue.submit(_request("x"))
    queue.submit(_request("y"))
    _claimed(queue)
    queue.report_worker("w", "busy")
    time_.time_s += 3
    [worker] = queue.workers()
    assert (worker.name, worker.state, worker.silent_s) == ("w", "busy", 3)
    stats = queue.stats()
    assert stats.counts == {Status.QUEUED: 1, Status.RUNNING: 1}
    assert stats.oldest_queued_s == 3


def test_the_first_releases_file_opens_and_its_jobs_keep_their_order(tmp_path: Path, time_: FakeClock) -> None:
    database = Database(tmp_path / "queue.db", MIGRATIONS[:1])
    with database.transaction() as connection:
        connection.execute("INSERT INTO turns VALUES ('', 1, 5), ('leeds/a', 1, 7), ('york/b', 1, 6)")
        for key, owner, turn in (("x", "leeds/a", 6), ("y", "leeds/a", 7), ("z", "york/b", 6)):
            connection.execute(
                "INSERT INTO jobs (id, result_key, owner, priority, turn, payload, submitted_s) VALUES (?, ?, ?, 1, ?, ?, 1000)",
                (key, key, owner, turn, f'{{"key": "{key}"}}'),
            )
    database.close()
    queue = SqliteQueue(tmp_path / "queue.db", LIMITS, time_.clock)
    assert queue.submit(_request("x")).id == "x"
    queue.submit(_request("new", "c", site="york"))
    assert [_claimed(queue) for _ in range(4)] == ["x", "new", "y", "z"]


# A worker that writes the token of each attempt to a file before it commits, and again when the commit was accepted.
WORKER = """
import os, sys, time
from pathlib import Path
from crcjax.serve.open_queue import open_queue
from crcjax.serve.queue import LeaseLostError, QueueLimits

folder, name, url = Path(sys.argv[1]), sys.argv[2], sys.argv[3] or None
queue = open_queue(folder, QueueLimits(max_tries=1000, lease_s=0.5), url, patience=20)
while not (folder / "stop").exists():
    lease = queue.claim(name)
    if lease is None:
        time.sleep(0.01)
        continue
    time.sleep(0.02)
    try:
        queue.renew(lease, 0.5, "half")
        line = f"{lease.job_id} {lease.token}\\n"
        with open(folder / "attempts", "a") as attempts, open(folder / "commits", "a") as commits:
            attempts.write(line)
            attempts.flush()
            queue.commit(lease, {"token": lease.token})
            commits.write(line)
    except LeaseLostError:
        pass
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("kills", [8, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("back_end", BACK_ENDS)
def test_every_accepted_job_has_one_result_whatever_is_killed(
    back_end: str, kills: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Kills workers, and every fourth time also Redis, which is started again."""
    redis = request.getfixturevalue("start_redis")(tmp_path) if back_end == "redis" else None
    url = redis.url if redis else None
    queue = open_back_end(tmp_path, QueueLimits(max_tries=1000, lease_s=0.5), url, patience=20)
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}

    def start(number: int) -> subprocess.Popen:
        command = [sys.executable, "-c", WORKER, str(tmp_path), f"w{number}", url or ""]
        return subprocess.Popen(command, env=environment)

    jobs = [queue.submit(_request(f"j{number}")).id for number in range(10 * kills)]
    choose = random.Random(kills)
    workers = {number: start(number) for number in range(2)}
    try:
        killed = 0
        while killed < kills:
            time.sleep(choose.uniform(0.05, 0.4))
            number = choose.choice(list(workers))
            process = workers[number]
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL, "the worker itself failed"
            if choose.random() < 0.5:
                queue.worker_died(f"w{number}")
            killed += 1
            if redis is not None and killed % 4 == 0:
                redis.kill()
                redis.start()
            workers[number] = start(number)
        deadline = time.monotonic() + 60 + kills
        while set(queue.stats().counts) != {Status.DONE}:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        (tmp_path / "stop").touch()
        for process in workers.values():
            process.wait(30)
    ended = [queue.job(job) for job in jobs]
    assert all(job is not None and job.status == Status.DONE and job.result for job in ended)
    results = {(job.id, str(job.result["token"])) for job in ended if job and job.result}
    lines = {name: (tmp_path / name).read_text().splitlines() for name in ("attempts", "commits")}
    assert results <= {tuple(line.split()) for line in lines["attempts"]}
    # A worker that was killed between its commit and its line left no line.
    assert {tuple(line.split()) for line in lines["commits"]} <= results
    assert max(Counter(line.split()[0] for line in lines["commits"]).values()) == 1
