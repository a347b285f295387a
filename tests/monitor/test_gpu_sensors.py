"""Readings of GPUs through the real pynvml and a stand-in for NVIDIA's library."""

from collections.abc import Callable
from dataclasses import asdict

import pytest

from crcjax.monitor.gpu_sensors import GpuSensors, visible_indices


@pytest.fixture
def read_gpus(write_gpus: Callable[..., None]):
    opened = []

    def read(*changes: dict):
        write_gpus(*changes)
        opened.append(GpuSensors({}))
        return opened[-1].read()

    yield read
    for sensors in opened:
        sensors.close()


def test_every_reading_is_in_the_unit_that_its_name_says(read_gpus: Callable) -> None:
    gpu, other = read_gpus({"throttle": 0x40 | 0x4, "link1": 0, "link_errors": 7, "ecc_corrected": 3}, {})
    assert (gpu.index, gpu.uuid, gpu.name) == (0, "GPU-0000-stub", "stand-in")
    assert (gpu.utilisation, gpu.memory_used_bytes, gpu.memory_total_bytes) == (0.9, 20 << 30, 80 << 30)
    assert (gpu.temperature_c, gpu.power_w, gpu.energy_j) == (55, 350.0, 5000.0)
    assert (gpu.sm_clock_mhz, gpu.max_sm_clock_mhz) == (1900, 1980)
    # The power cap, 0x4, is usual under load.
    assert gpu.throttle_reasons == ("hardware thermal slowdown",)
    assert (gpu.ecc_corrected, gpu.ecc_uncorrected) == (3, 0)
    assert (gpu.nvlinks_active, gpu.nvlinks_inactive, gpu.nvlink_errors) == (1, 1, 21)
    assert (other.index, other.throttle_reasons, other.nvlinks_active) == (1, (), 2)


@pytest.mark.parametrize("code", [2**32 - 1, 0x7FFFFFF0, 0x7FFFFFF1, "!3", "!4", "!15", "!999"])
def test_no_code_for_not_available_is_a_reading(read_gpus: Callable, code: int | str) -> None:
    wide = {2**32 - 1: 2**64 - 1, 0x7FFFFFF0: 0x7FFFFFFFFFFFFFF0, 0x7FFFFFF1: 0x7FFFFFFFFFFFFFF1}.get(code, code)
    of_32_bits = ("utilisation", "temperature", "power_mw", "sm_clock", "sm_clock_max")
    of_64_bits = ("energy_mj", "throttle", "ecc_corrected", "ecc_uncorrected", "link_errors", "memory_used")
    (gpu,) = read_gpus(dict.fromkeys(of_32_bits, code) | dict.fromkeys(of_64_bits, wide))
    values = asdict(gpu)
    for name in ("index", "uuid", "name", "xid_count", "nvlinks_active", "nvlinks_inactive", "memory_total_bytes"):
        del values[name]
    assert set(values.values()) == {None}


def test_a_gpu_that_falls_off_the_bus_has_no_values_and_the_others_still_have_theirs(
    write_gpus: Callable, read_gpus: Callable
) -> None:
    write_gpus({}, {})
    sensors = GpuSensors({})
    write_gpus(dict.fromkeys(("memory_total", "memory_used", "temperature", "utilisation"), "!15"), {})
    lost, other = sensors.read()
    assert (lost.temperature_c, lost.memory_used_bytes, other.temperature_c) == (None, None, 55)
    sensors.close()


def test_an_xid_error_is_reported_with_its_number_and_stays(write_gpus: Callable) -> None:
    write_gpus({}, {})
    sensors = GpuSensors({})
    assert [gpu.xid for gpu in sensors.read()] == [None, None]
    write_gpus({}, {"xid": 79, "xid_number": 1})
    assert [(gpu.xid, gpu.xid_count) for gpu in sensors.read()] == [(None, 0), (79, 1)]
    write_gpus({}, {"xid": 48, "xid_number": 2})
    assert [(gpu.xid, gpu.xid_count) for gpu in sensors.read()] == [(None, 0), (48, 2)]
    assert [(gpu.xid, gpu.xid_count) for gpu in sensors.read()] == [(None, 0), (48, 2)]
    sensors.close()


def test_the_gpus_are_those_that_cuda_shows_to_the_process(write_gpus: Callable) -> None:
    write_gpus({}, {}, {})
    sensors = GpuSensors({"CUDA_VISIBLE_DEVICES": "2,0"})
    assert [gpu.index for gpu in sensors.read()] == [2, 0]
    sensors.close()
    uuids = ["GPU-aa", "GPU-ab", "GPU-b"]
    assert visible_indices(None, uuids) == [0, 1, 2]
    assert visible_indices("", uuids) == []
    assert visible_indices("GPU-b, GPU-ab", uuids) == [2, 1]
    assert visible_indices("1,7,0", uuids) == [1]
    assert visible_indices("1,-1,0", uuids) == [1]
