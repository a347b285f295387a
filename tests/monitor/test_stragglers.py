from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcjax.monitor.heartbeat import Heartbeat, HeartbeatWriter
from crcjax.monitor.stragglers import stragglers

BEAT = HeartbeatWriter(0, 8, "node-0").current()


def _beats(readings: list[float], probes: list[float | None] | None = None, step_s: float = 1.0) -> list[Heartbeat]:
    probes = probes or [None] * len(readings)
    return [
        replace(BEAT, process=process, host=f"node-{process}", step_s=step_s, reading_s=reading, probe_s=probe)
        for process, (reading, probe) in enumerate(zip(readings, probes, strict=True))
    ]


@given(st.integers(2, 64), st.floats(1.6, 50), st.floats(1e-3, 10), st.data())
def test_the_one_process_with_a_slow_device_is_named_whatever_the_unit_and_the_number_of_peers(
    count: int, factor: float, unit: float, data
) -> None:
    slow = data.draw(st.integers(0, count - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    probes = (unit * (1 + 0.01 * rng.uniform(-1, 1, count))).tolist()
    probes[slow] *= factor
    (straggler,) = stragglers(_beats([0.0] * count, probes))
    assert (straggler.process, straggler.host) == (slow, f"node-{slow}")
    assert straggler.seconds / straggler.peer_seconds == pytest.approx(factor, rel=0.03)


@given(st.integers(1, 64), st.integers(0, 2**32 - 1), st.floats(0.0, 0.02))
def test_processes_that_differ_by_noise_alone_are_no_stragglers(count: int, seed: int, noise: float) -> None:
    rng = np.random.default_rng(seed)
    values = np.exp(noise * np.clip(rng.normal(size=count), -3, 3)).tolist()
    assert stragglers(_beats(values, values)) == []


def test_a_slow_reader_counts_only_if_the_others_wait_for_it() -> None:
    assert stragglers(_beats([0.01, 0.01, 0.01, 0.05])) == []
    (straggler,) = stragglers(_beats([0.01, 0.01, 0.01, 0.3]))
    assert straggler.process == 3
    assert str(straggler) == (
        "process 3 (node-3) is a straggler: reading its bags takes it 0.3 s, 30.0 times the median of its peers (0.01 s)"
    )
    (straggler,) = stragglers(_beats([0.0, 0.0, 0.5]))
    assert "more than the median of its peers (0 s)" in str(straggler)


def test_processes_without_a_measurement_and_a_single_process_are_not_compared() -> None:
    assert stragglers([]) == []
    assert stragglers(_beats([5.0], [5.0])) == []
    assert stragglers(_beats([0.0, 0.0], [5.0, None])) == []
