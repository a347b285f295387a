"""Opens the queue of a state folder: in a SQLite file, or in Redis."""

from __future__ import annotations

import uuid
from contextlib import suppress
from pathlib import Path

from crcjax.environment import require_extra
from crcjax.errors import writing
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
      InputError: Redis is not usable or has another folder's jobs, or a newer release wrote the file.
      QueueUnavailableError: Redis cannot be reached.
      OutputError: the file cannot be written.
    """
    if redis is None:
        return SqliteQueue(state / "queue.db", limits)
    require_extra("redis", "redis", "a queue in Redis")
    from crcjax.serve.redis_queue import RedisQueue

    queue = RedisQueue(redis, limits, patience)
    queue.belong_to(_id_of(state))
    return queue


def _id_of(state: Path) -> str:
    """The id of a state folder, made at the first call."""
    path = state / "queue_id"
    with writing(path, "choose another --state"), suppress(FileExistsError), open(path, "x") as file:
        file.write(str(uuid.uuid4()))
    return path.read_text()
