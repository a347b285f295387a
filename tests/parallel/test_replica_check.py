import json
import os
import subprocess
import sys

import jax.numpy as jnp
import pytest

from crcjax.parallel.replica_check import first_difference, local_checksums


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_one_changed_bit_changes_the_sum_of_its_leaf_alone(dtype: str) -> None:
    values = {"kernel": jnp.arange(7).astype(dtype), "other": jnp.ones(3)}
    before = local_checksums(values)[0]
    assert list(before) == ["kernel", "other"]
    changed = values["kernel"].view(jnp.uint8 if dtype == "bool" else dtype)
    flipped = (
        jnp.logical_not(changed[2])
        if dtype == "bool"
        else jnp.nextafter(changed[2], jnp.inf * 1.0)
        if "float" in dtype
        else changed[2] + 1
    )
    after = local_checksums(values | {"kernel": values["kernel"].at[2].set(flipped)})[0]
    assert before["kernel"] != after["kernel"]
    assert before["other"] == after["other"]


def test_a_divergence_is_the_odd_process_and_its_first_odd_leaf() -> None:
    good, bad = {"bias": 1, "kernel": 2}, {"bias": 1, "kernel": 3}
    assert first_difference({0: [good, good], 1: [good, good]}) is None
    assert first_difference({0: [good], 1: [good], 2: [bad]}) == (2, "kernel")
    assert first_difference({0: [bad], 1: [good], 2: [good]}) == (0, "kernel")
    assert first_difference({0: [good, good], 1: [good, bad]}) == (1, "kernel")
    assert first_difference({0: [good], 1: [bad]}) == (1, "kernel")  # of two, process 0 is believed


SPLIT = """
import json
import jax, numpy as np
from crcjax.parallel.replica_check import local_checksums

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "bag"))
kernel = np.arange(8, dtype=np.float32)
for axes in ("data", ("data", "bag")):
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axes))
    where = placed.addressable_devices_indices_map((8,))
    copies = [jax.device_put((kernel + (device.id == 3))[index], device) for device, index in where.items()]
    print(json.dumps(local_checksums({"kernel": jax.make_array_from_single_device_arrays((8,), placed, copies)})))
"""


def test_parts_of_a_split_leaf_are_compared_where_several_devices_hold_them() -> None:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run([sys.executable, "-c", SPLIT], env=environment, capture_output=True, text=True, check=True)
    twice, once = (json.loads(line) for line in done.stdout.splitlines())
    assert [list(held) for held in twice] == [["kernel[0:4]"]] * 2 + [["kernel[4:8]"]] * 2
    assert first_difference({0: twice[:2], 1: twice[2:]}) == (1, "kernel[4:8]")
    assert first_difference({0: twice[:3]}) is None
    assert len({name for held in once for name in held}) == 4
    assert first_difference({0: once}) is None
