from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from crcjax.config import get_config
from crcjax.errors import InputError
from crcjax.parallel.mesh import _replicate, _shape, device_mesh, local_mesh, on_local_mesh, replicated


@pytest.mark.parametrize(
    ("count", "given", "bags", "shape"),
    [
        (1, (0, 0, 1), 8, (1, 1, 1)),
        (8, (0, 0, 1), 8, (8, 1, 1)),
        (8, (0, 0, 1), 4, (4, 2, 1)),  # more devices than bags: the bags' regions are divided too
        (8, (0, 1, 2), 8, (4, 1, 2)),
        (32, (0, 4, 1), 32, (8, 4, 1)),
        (8, (2, 2, 2), 8, (2, 2, 2)),
    ],
)
def test_axes_are_as_given_or_chosen_by_what_divides(count: int, given: tuple, bags: int, shape: tuple) -> None:
    config = get_config()
    config.mesh.data, config.mesh.bag, config.mesh.model = given
    config.data.batch_size = bags
    assert _shape(config, count) == shape


@pytest.mark.parametrize(
    ("given", "bags", "regions", "message"),
    [
        ((3, 1, 1), 9, 32, "data 3, bag 1, model 1: does not make 8 devices"),
        ((0, 0, 3), 8, 32, "does not make 8 devices"),
        ((8, 1, 1), 4, 32, "data.batch_size 4 is no multiple of 8 devices along data"),
        ((1, 8, 1), 1, 12, "data.regions_per_bag 12 is no multiple of 8 devices along bag"),
        (
            (0, 0, 1),
            6,
            9,
            r"neither config.data.batch_size 6 nor each bag's config.data.regions_per_bag 9: make bags a multiple of 8, or .* of 4",
        ),
        ((-1, 1, 1), 8, 32, "sizes are at least 1, or 0"),
        ((0, 0, 0), 8, 32, "sizes are at least 1, or 0"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused_by_its_numbers(
    given: tuple, bags: int, regions: int, message: str
) -> None:
    config = get_config()
    config.mesh.data, config.mesh.bag, config.mesh.model = given
    config.data.batch_size, config.data.regions_per_bag = bags, regions
    with pytest.raises(InputError, match=message):
        _shape(config, 8)


def test_micro_batches_must_divide_what_each_device_has() -> None:
    config = get_config()
    config.mesh.data, config.train.micro_batches = 4, 4
    with pytest.raises(InputError, match=r"no multiple of 4 devices along data x config\.train\.micro_batches 4"):
        _shape(config, 4)


@dataclass(frozen=True)
class _Device:
    """Stands for a device of a machine that is not here."""

    process_index: int
    id: int
    platform: str = "gpu"


def test_model_and_bag_lie_within_a_host_and_the_log_says_where_they_do_not() -> None:
    from crcjax.parallel.mesh import _arranged, _described

    devices = [_Device(process, 2048 * process + i) for i in range(4) for process in (1, 0)]
    within = _arranged(devices, (2, 2, 2))
    assert [[device.process_index for device in row.flat] for row in within] == [[0] * 4, [1] * 4]
    assert _described(within) == (
        "8 gpu devices of 2 processes as 2 x data (the slides), 2 x bag (each slide's regions), "
        "2 x model (each layer's weights)"
    )
    assert _described(_arranged(devices, (1, 4, 2))).endswith("so that every layer waits for the network")


def test_the_local_mesh_has_this_processes_devices_along_data() -> None:
    import jax

    assert local_mesh().shape == {"data": jax.local_device_count(), "bag": 1, "model": 1}
    assert replicated(device_mesh()).is_fully_replicated
    assert np.size(device_mesh().devices) == jax.device_count()


def test_values_are_copied_to_the_local_mesh_by_one_program_however_often() -> None:
    mesh = device_mesh()
    _replicate.cache_clear()
    for number in range(3):
        copied = on_local_mesh({"a": jnp.full(4, number)}, mesh, local_mesh())
        np.testing.assert_array_equal(copied["a"], np.full(4, number))
    assert _replicate(mesh)._cache_size() == 1
