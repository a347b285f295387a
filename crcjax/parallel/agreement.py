"""Agreement between the processes of a run through JAX's coordination service, from any thread.

The collectives of `jax.experimental.multihost_utils` run on the devices, where those of a background thread and of the
training step would meet in different orders in different processes.
"""

from __future__ import annotations

import json

import jax
from jax._src import distributed


def exchange(key: str, value: str, timeout_s: float) -> list[str]:
    """Returns the values of all processes, in their order. Every process calls this with the same `key`, once in a run's life.

    Raises TimeoutError in a process that does not have all values within `timeout_s`.
    """
    if jax.process_count() == 1:
        return [value]
    # JAX has no public interface to its client; Orbax uses it in the same way.
    client, timeout_ms = distributed.global_state.client, round(timeout_s * 1000)
    assert client is not None
    try:
        if jax.process_index():
            client.key_value_set(f"{key}/{jax.process_index()}", value)
            return json.loads(client.blocking_key_value_get(f"{key}/all", timeout_ms))
        others = range(1, jax.process_count())
        values = [value, *(client.blocking_key_value_get(f"{key}/{process}", timeout_ms) for process in others)]
        client.key_value_set(f"{key}/all", json.dumps(values))
        return values
    except jax.errors.JaxRuntimeError as error:
        raise TimeoutError(f"not all processes answered within {timeout_s:.0f} s ({key})") from error
