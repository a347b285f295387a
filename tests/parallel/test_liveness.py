import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcjax.monitor.heartbeat import COMPUTING, READING
from crcjax.parallel.liveness import LOST, STALLED, Liveness

NAMES = [f"process {process} (node-{process})" for process in range(4)]


def _liveness(process: int = 0, names: list[str] = NAMES) -> Liveness:
    return Liveness(names, process, 10.0, 900.0, 100.0)


@given(st.integers(0, 3), st.floats(0.0, 50.0), st.lists(st.floats(0.1, 9.0), max_size=8))
def test_a_process_is_lost_once_it_was_silent_for_the_timeout_and_never_before(
    observer: int, silent_s: float, gaps_s: list[float]
) -> None:
    liveness, now = _liveness(observer), 100.0
    watched = [0] if observer else [1, 2, 3]
    for gap_s in gaps_s:
        now += gap_s
        for process in watched:
            liveness.heard(process, 5, COMPUTING, now)
        assert liveness.fault(5, COMPUTING, 0.0, now) is None
    # All but one go on.
    end = now + silent_s
    while now < end:
        now = min(now + 1.0, end)
        for process in watched[1:]:
            liveness.heard(process, 5, COMPUTING, now)
    fault = liveness.fault(5, COMPUTING, 0.0, now)
    assert (fault is not None) == (silent_s > 10.0 + 1e-6) or abs(silent_s - 10.0) < 1e-6
    if fault:
        assert (fault.kind, fault.processes) == (LOST, (watched[0],))
        assert f"{NAMES[watched[0]]} was lost: no heartbeat for" in fault.reason


def test_a_process_that_never_sent_a_heartbeat_is_lost_too_and_one_that_finished_is_not() -> None:
    liveness = _liveness()
    liveness.heard(2, 1, READING, 110.0)
    liveness.finished(3)
    fault = liveness.fault(1, READING, 0.0, 111.0)
    assert fault is not None
    assert fault.processes == (1,)
    assert "starting in step 0" in fault.reason


def test_a_process_that_was_stopped_itself_forgives_the_others_for_that_time() -> None:
    liveness = _liveness(1)
    liveness.forgive(60.0)
    assert liveness.fault(5, COMPUTING, 0.0, 165.0) is None
    assert liveness.fault(5, COMPUTING, 0.0, 171.0) is not None


def test_a_standstill_names_those_that_the_others_wait_for() -> None:
    liveness = _liveness()
    for process in (1, 2, 3):
        liveness.heard(process, 7, READING if process == 2 else COMPUTING, 1000.0)
    assert liveness.fault(7, COMPUTING, 899.0, 1000.0) is None
    fault = liveness.fault(7, COMPUTING, 901.0, 1000.0)
    assert fault is not None
    assert (fault.kind, fault.processes) == (STALLED, (2,))
    assert fault.reason == "no step was finished for 901 s: process 2 (node-2) is reading its bags, step 7"
    # If all compute together, nobody is to blame.
    liveness.heard(2, 7, COMPUTING, 1000.0)
    fault = liveness.fault(7, COMPUTING, 901.0, 1000.0)
    assert fault is not None
    assert fault.processes == ()
    assert all(name in fault.reason for name in NAMES)


@pytest.mark.parametrize(("process", "reason"), [(0, "is computing, step 7"), (1, "does not report why")])
def test_a_process_that_stands_still_ends_with_or_without_process_0(process: int, reason: str) -> None:
    liveness = _liveness(process)
    for other in [0] if process else [1, 2, 3]:
        liveness.heard(other, 7, COMPUTING, 1000.0)
    fault = liveness.fault(7, COMPUTING, 911.0, 1000.0)
    assert fault is not None
    assert reason in fault.reason


def test_a_single_process_can_only_stand_still() -> None:
    liveness = _liveness(0, NAMES[:1])
    assert liveness.fault(7, COMPUTING, 899.0, 1e6) is None
    fault = liveness.fault(7, COMPUTING, 901.0, 1e6)
    assert fault is not None
    assert (fault.kind, fault.processes) == (STALLED, ())
