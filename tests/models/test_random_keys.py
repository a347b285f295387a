import jax
import numpy as np
from flax import nnx

from crcjax.models.random_keys import Purpose, run_key


def _bits(key: jax.Array) -> bytes:
    return np.asarray(jax.random.key_data(key)).tobytes()


def test_initialisation_task_heads_and_steps_never_share_a_key() -> None:
    for seed in (0, 1):
        keys = [run_key(seed, purpose) for purpose in Purpose]
        initialisation, heads = (
            nnx.Rngs(run_key(seed, purpose)) for purpose in (Purpose.INITIALISATION, Purpose.TASK_HEADS)
        )
        keys += [rngs.params() for rngs in (initialisation, heads) for _ in range(200)]
        # The keys of steps, and the keys for augmentation and dropout that a step splits them into.
        steps = [jax.random.fold_in(run_key(seed, Purpose.TRAINING_STEP), step) for step in range(200)]
        keys += steps + [part for step in steps for part in jax.random.split(step)]
        assert len({_bits(key) for key in keys}) == len(keys)
