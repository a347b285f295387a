import jax.numpy as jnp
import pytest

from crcjax.train.agreement import disagreement, local_sums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_one_changed_bit_changes_the_sum_of_its_leaf_alone(dtype: str) -> None:
    values = {"kernel": jnp.arange(7).astype(dtype), "other": jnp.ones(3)}
    names, before = local_sums(values)
    assert names == ["kernel", "other"]
    changed = values["kernel"].view(jnp.uint8 if dtype == "bool" else dtype)
    flipped = (
        jnp.logical_not(changed[2])
        if dtype == "bool"
        else jnp.nextafter(changed[2], jnp.inf * 1.0)
        if "float" in dtype
        else changed[2] + 1
    )
    _, after = local_sums(values | {"kernel": values["kernel"].at[2].set(flipped)})
    assert before[0][0] != after[0][0]
    assert before[0][1] == after[0][1]


def test_a_divergence_is_the_odd_process_and_its_first_odd_leaf() -> None:
    names, good, bad = ["bias", "kernel"], [1, 2], [1, 3]
    assert disagreement(names, {0: [good, good], 1: [good, good]}) is None
    assert disagreement(names, {0: [good], 1: [good], 2: [bad]}) == (2, "kernel")
    assert disagreement(names, {0: [bad], 1: [good], 2: [good]}) == (0, "kernel")
    assert disagreement(names, {0: [good, good], 1: [good, bad]}) == (1, "kernel")
    assert disagreement(names, {0: [good], 1: [bad]}) == (1, "kernel")  # of two, process 0 is believed
