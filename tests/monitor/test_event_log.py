import contextlib
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crcjax.errors import OutputError
from crcjax.monitor.event_log import REPAIRED, EventLog, events_from, head, read_events, verify

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A log of five entries."""
    log = EventLog(tmp_path / "events.jsonl")
    for step in range(5):
        log.append("saved", step=step, note="Zürich")
    return tmp_path / "events.jsonl"


def test_entries_are_read_from_any_byte_on(written: Path) -> None:
    events = read_events(written)
    ends = [0, *(end for _, end in events_from(written, 0))]
    assert ends[-1] == written.stat().st_size
    for start in range(written.stat().st_size + 2):
        first = next((number for number, begin in enumerate(ends) if begin >= start), 5)
        assert [event for event, _ in events_from(written, start)] == events[first:]
    with open(written, "ab") as file:
        file.write(b'not a line\n{"time": "unfin')
    assert [event for event, _ in events_from(written, 0)] == events
    assert list(events_from(written.with_name("absent"), 0)) == []


def test_entries_come_back_in_order_with_their_facts_and_the_chain_is_whole(written: Path) -> None:
    events = read_events(written)
    assert [(event.kind, event.facts["step"], event.facts["note"]) for event in events] == [
        ("saved", step, "Zürich") for step in range(5)
    ]
    assert [event.previous for event in events[1:]] == [event.hash for event in events[:-1]]
    assert [event.time for event in events] == sorted(event.time for event in events)
    assert verify(written) is None
    assert all(json.loads(line)["kind"] == "saved" for line in written.read_text().splitlines())


def test_a_log_without_a_file_is_empty_and_whole(tmp_path: Path) -> None:
    assert read_events(tmp_path / "absent.jsonl") == []
    assert verify(tmp_path / "absent.jsonl") is None


@settings(max_examples=60, deadline=None)
@given(facts=st.dictionaries(st.text(st.characters(codec="ascii", categories=["L"]), min_size=1), JSON, max_size=3))
def test_any_json_facts_come_back_as_they_were(facts: dict, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("log") / "events.jsonl"
    facts.pop("self", None)
    EventLog(path).append("any", **facts)
    assert verify(path) is None
    assert read_events(path)[0].facts == facts


def test_numbers_that_are_not_finite_and_paths_are_written_as_text(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    event = log.append("diverged", losses=[float("nan"), float("inf"), 0.5], run=tmp_path)
    assert event.facts == {"losses": ["nan", "inf", 0.5], "run": str(tmp_path)}
    assert read_events(tmp_path / "events.jsonl") == [event]


def test_any_changed_byte_is_found_at_its_line(written: Path) -> None:
    content = written.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1
        written.write_bytes(changed)
        broken = verify(written)
        assert broken is not None
        assert broken.line == 1 + content[:position].count(b"\n")


@pytest.mark.parametrize("removed", range(4))
def test_a_removed_line_is_found(written: Path, removed: int) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:removed] + lines[removed + 1 :]))
    broken = verify(written)
    assert broken is not None
    assert (broken.line, broken.is_unfinished) == (removed + 1, False)
    assert "removed" in broken.reason


def test_exchanged_and_repeated_lines_are_found(written: Path) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    for changed in ([lines[0], lines[2], lines[1], *lines[3:]], [*lines[:2], lines[1], *lines[2:]]):
        written.write_bytes(b"".join(changed))
        assert verify(written) is not None


def test_last_lines_that_were_removed_and_a_rewritten_log_are_found_by_a_trusted_head(
    written: Path, tmp_path: Path
) -> None:
    trusted = head(written)
    assert trusted.lines == 5
    EventLog(written).append("saved", step=5)
    assert verify(written, trusted) is None
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:3]))
    assert verify(written) is None
    broken = verify(written, trusted)
    assert broken is not None
    assert broken.line == 4
    written.unlink()
    for step in range(7):
        EventLog(written).append("saved", step=step + 100)
    assert verify(written) is None
    broken = verify(written, trusted)
    assert broken is not None
    assert broken.line == 5


@pytest.mark.parametrize("cut", [1, 2, 40, 100, 150])
def test_a_half_written_last_line_is_recognised_and_the_next_append_replaces_it(written: Path, cut: int) -> None:
    content = written.read_bytes()
    written.write_bytes(content[:-cut])
    broken = verify(written)
    assert broken is not None
    assert (broken.line, broken.is_unfinished) == (5, True)
    assert len(read_events(written)) == 4
    EventLog(written).append("saved", step=9)
    assert verify(written) is None
    events = read_events(written)
    assert [event.kind for event in events] == ["saved"] * 4 + [REPAIRED, "saved"]
    unfinished = content[:-cut].rpartition(b"\n")[2]
    assert events[4].facts["bytes"] == len(unfinished)


def test_a_log_that_another_process_shortened_goes_on_from_what_is_there(written: Path) -> None:
    log = EventLog(written)
    log.append("saved", step=5)
    lines = written.read_bytes().splitlines(keepends=True)
    written.write_bytes(b"".join(lines[:2]))
    log.append("saved", step=6)
    assert verify(written) is None
    assert [event.facts["step"] for event in read_events(written)] == [0, 1, 6]


def test_appending_after_a_damaged_line_goes_on_and_does_not_hide_the_damage(written: Path) -> None:
    content = written.read_bytes()
    written.write_bytes(content.replace(b'"step": 4', b'"step": 7').replace(b'"facts"', b"'facts'"))
    EventLog(written).append("saved", step=5)
    broken = verify(written)
    assert broken is not None
    assert broken.line == 1
    (lines := content.splitlines(keepends=True))[4] = b"no JSON at all\n"
    written.write_bytes(b"".join(lines))
    EventLog(written).append("saved", step=5)
    broken = verify(written)
    assert broken is not None
    assert broken.line == 5


def test_entries_of_several_processes_and_threads_form_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    program = (
        "import sys; from crcjax.monitor.event_log import EventLog\n"
        "log = EventLog(sys.argv[1])\n"
        "for i in range(100): log.append('by_process', writer=sys.argv[2], i=i)\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, str(path), str(writer)]) for writer in range(2)]
    shared = EventLog(path)
    threads = [threading.Thread(target=lambda: [shared.append("by_thread", i=i) for i in range(50)]) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [writer.wait() for writer in writers] == [0, 0]
    assert verify(path) is None
    events = read_events(path)
    assert len(events) == 300
    for writer in ("0", "1"):
        assert [event.facts["i"] for event in events if event.facts.get("writer") == writer] == list(range(100))


def test_a_writer_that_is_killed_again_and_again_leaves_a_log_that_is_whole_after_the_next_append(
    tmp_path: Path,
) -> None:
    path = tmp_path / "events.jsonl"
    program = (
        "import sys; from crcjax.monitor.event_log import EventLog\n"
        "log = EventLog(sys.argv[1])\n"
        "for i in range(10**6):\n"
        "    log.append('saved', text='x' * 50000, i=i)\n"
        "    print(i, flush=True)\n"
    )
    acknowledged = 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout
            for line in writer.stdout:
                if int(line) == 40:
                    writer.kill()
                    break
            later_lines = writer.stdout.read()
        acknowledged += 41 + later_lines.count("\n")
    EventLog(path).append("end")
    assert verify(path) is None
    assert sum(event.kind == "saved" for event in read_events(path)) >= acknowledged


def test_a_full_disk_is_one_error_and_leaves_a_whole_log(small_disk: Path) -> None:
    path = small_disk / "events.jsonl"
    log = EventLog(path)
    log.append("start")
    with open(small_disk / "rest", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    with pytest.raises(OutputError, match=r"events\.jsonl: cannot be written .*free space"):
        log.append("long", text="x" * 100_000)
    assert verify(path) is None
    (small_disk / "rest").unlink()
    log.append("end")
    assert verify(path) is None
    assert [event.kind for event in read_events(path)] == ["start", "end"]
