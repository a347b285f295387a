"""Opens the queue of a state folder: in a SQLite file, or in Redis."""

from __future__ import annotations

from pathlib import Path

from crcjax.environment import require_extra
from crcjax.serve.queue import Queue, QueueLimits
from crcjax.serve.sqlite_queue import SqliteQueue

# The environment variable by which worker processes receive the URL of Redis, which may hold a password.
REDIS_VARIABLE = "CRCJAX_REDIS"


def open_queue(state: Path, limits: QueueLimits | None = None, redis: str | None = None, patience: int = 1) -> Queue:
    """Opens the queue at the URL `redis`, or else in STATE/queue.db.

    Args:
      state: the state folder.
      limits: the queue's.
      redis: the URL of a Redis server.
      patience: times that a call is tried again while Redis cannot be reached.

    Raises:
      InputError: Redis is not usable, or a newer release wrote the file.
      OutputError: the file cannot be written.
    """
    if redis is None:
        return SqliteQueue(state / "queue.db", limits)
    require_extra("redis", "redis", "a queue in Redis")
    from crcjax.serve.redis_queue import RedisQueue

    return RedisQueue(redis, limits, patience)
