"""The audit trail: checkpoints, what verification finds and where, and commands that write to the log."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.audit.audit_log import AuditLog
from crcjax.audit.checkpoint import CHECKPOINT
from crcjax.audit.verification import Verification, verify_audit
from crcjax.errors import OutputError
from crcjax.monitor.event_log import EventLog, read_events, verify
from crcjax.runs.signature import make_key_pair, public_key_digits

# Of `written`: 25 entries with a checkpoint after each tenth, which makes lines 11 and 22 checkpoints.
CHECKPOINT_LINES = (11, 22)


@pytest.fixture(scope="session")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_key_pair(tmp_path_factory.mktemp("key") / "audit.pem")


@pytest.fixture
def written(tmp_path: Path, key: Path) -> Path:
    """A log with two checkpoints, which are anchored in the file `anchors`."""
    audit = AuditLog(tmp_path / "log.jsonl", key, [tmp_path / "anchors"], every=10)
    for number in range(25):
        audit.append("request", number=number)
    return tmp_path / "log.jsonl"


def _checked(log: Path, key: Path, *, anchored: bool = True) -> Verification:
    anchors = [log.with_name("anchors")] if anchored else []
    return verify_audit(log, [public_key_digits(key.with_suffix(".pub"))], anchors)


def _place(log: Path, key: Path, *, anchored: bool = True) -> tuple[str, int]:
    fault = _checked(log, key, anchored=anchored).fault
    assert fault is not None
    return fault.file.name, fault.line


def _write_chain(path: Path, lines: list[bytes], begin: int) -> None:
    """Writes lines, and has those from `begin` on follow from the ones before, as a forger would who knows the format."""
    path.write_bytes(b"".join(lines[:begin]))
    log = EventLog(path)
    for line in lines[begin:]:
        event = json.loads(line)
        log.append(event["kind"], **event["facts"])


def test_a_whole_log_is_verified_with_its_checkpoints_and_anchors(written: Path, key: Path) -> None:
    assert _checked(written, key) == Verification(27, 2, 5)
    kinds = [event.kind for event in read_events(written)]
    assert tuple(number for number, kind in enumerate(kinds, 1) if kind == CHECKPOINT) == CHECKPOINT_LINES
    assert len(written.with_name("anchors").read_text().splitlines()) == 2
    assert "PRIVATE" not in key.with_suffix(".pub").read_text()
    assert key.stat().st_mode & 0o077 == 0


def test_a_changed_byte_a_removed_line_and_exchanged_lines_are_found_at_their_line(written: Path, key: Path) -> None:
    content = written.read_bytes()
    lines = content.splitlines(keepends=True)
    for position in range(0, len(content), 41):
        changed = bytearray(content)
        changed[position] ^= 4
        written.write_bytes(changed)
        assert _place(written, key) == ("log.jsonl", 1 + content[:position].count(b"\n"))
    for number in (0, 7, 10, 20):
        written.write_bytes(b"".join(lines[:number] + lines[number + 1 :]))
        assert _place(written, key) == ("log.jsonl", number + 1)
        exchanged = [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]
        written.write_bytes(b"".join(exchanged))
        assert _place(written, key) == ("log.jsonl", number + 1)


def test_a_tail_that_was_cut_is_found_by_the_anchor_and_the_chain_alone_does_not_show_it(
    written: Path, key: Path
) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    for remaining in (20, 15, 10, 5):
        written.write_bytes(b"".join(lines[:remaining]))
        assert verify(written) is None
        assert _place(written, key) == ("log.jsonl", remaining + 1)
    # Entries behind the last checkpoint are the ones that nothing vouches for; their number is stated.
    written.write_bytes(b"".join(lines[:23]))
    assert _checked(written, key) == Verification(23, 2, 1)


def test_a_log_that_was_written_anew_is_found_by_its_checkpoints_and_by_its_anchors(written: Path, key: Path) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    forged = [line.replace(b'"number": 3', b'"number": 4') for line in lines]
    _write_chain(written, forged, 3)
    assert verify(written) is None
    assert _place(written, key, anchored=False) == ("log.jsonl", CHECKPOINT_LINES[0]), "its hash is another"
    _write_chain(written, [line for line in forged if b'"checkpoint"' not in line], 3)
    assert _place(written, key, anchored=False) == ("log.jsonl", 26), "without checkpoints"
    assert _place(written, key)[1] <= CHECKPOINT_LINES[0]


def test_a_replayed_checkpoint_is_found_in_the_log_and_in_the_anchor_file(
    written: Path, key: Path, tmp_path: Path
) -> None:
    lines = written.read_bytes().splitlines(keepends=True)
    _write_chain(written, [*lines[:24], lines[CHECKPOINT_LINES[0] - 1]], 24)
    fault = _checked(written, key, anchored=False).fault
    assert fault is not None
    assert (fault.line, "replayed" in fault.reason) == (25, True)
    # A checkpoint of another log, by the same key.
    other = AuditLog(tmp_path / "other.jsonl", key, every=10)
    for number in range(10):
        other.append("request", number=number)
    other_checkpoint = (tmp_path / "other.jsonl").read_bytes().splitlines(keepends=True)[10]
    _write_chain(written, [*lines[:10], other_checkpoint], 10)
    assert _place(written, key, anchored=False) == ("log.jsonl", 11)

    written.write_bytes(b"".join(lines))
    anchors = written.with_name("anchors")
    first, second = anchors.read_bytes().splitlines(keepends=True)
    anchors.write_bytes(first + second + first)
    assert _place(written, key) == ("anchors", 3)
    anchors.write_bytes(first)
    assert _place(written, key) == ("log.jsonl", CHECKPOINT_LINES[1]), "the anchor file was cut"
    anchors.write_bytes(first + second.replace(b'"bytes": ', b'"bytes": 1'))
    assert _place(written, key) == ("anchors", 2)


def test_a_checkpoint_by_another_key_does_not_count(written: Path, tmp_path: Path) -> None:
    other = make_key_pair(tmp_path / "other.pem")
    assert _place(written, other, anchored=False) == ("log.jsonl", CHECKPOINT_LINES[0])
    assert _place(written, other) == ("anchors", 1)


def test_a_checkpoint_follows_after_a_while_also_if_nothing_more_is_appended(tmp_path: Path, key: Path) -> None:
    audit = AuditLog(tmp_path / "log.jsonl", key, every=1000, interval_s=0.02)
    audit.checkpoint()
    assert not read_events(tmp_path / "log.jsonl"), "an empty log has nothing to vouch for"
    audit.append("request")
    with audit.timed_checkpoints():
        while len(read_events(tmp_path / "log.jsonl")) < 2:
            pass
    assert [event.kind for event in read_events(tmp_path / "log.jsonl")] == ["request", CHECKPOINT]


def test_an_anchor_that_cannot_be_written_is_an_error_and_the_next_entry_tries_again(tmp_path: Path, key: Path) -> None:
    audit = AuditLog(tmp_path / "log.jsonl", key, [tmp_path / "absent" / "anchors"], every=2)
    audit.append("request")
    for _ in range(2):
        with pytest.raises(OutputError, match="anchors: cannot be written"):
            audit.append("request")
    (tmp_path / "absent").mkdir()
    audit.append("request")
    assert verify_audit(tmp_path / "log.jsonl", anchors=[tmp_path / "absent" / "anchors"]) == Verification(5, 1, 0)


def test_processes_and_threads_share_one_log_with_checkpoints_of_each(tmp_path: Path, key: Path) -> None:
    log, anchors = tmp_path / "log.jsonl", tmp_path / "anchors"
    program = (
        "import sys; from pathlib import Path; from crcjax.audit.audit_log import AuditLog\n"
        "audit = AuditLog(*(Path(path) for path in sys.argv[1:3]), [Path(sys.argv[3])], every=7)\n"
        "for i in range(60): audit.append('by_process', i=i)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", program, log, key, anchors]) for _ in range(2)]
    audit = AuditLog(log, key, [anchors], every=7)
    threads = [threading.Thread(target=lambda: [audit.append("by_thread", i=i) for i in range(30)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait() for process in processes] == [0, 0]
    done = _checked(log, key)
    assert done.fault is None
    assert done.entries - done.checkpoints == 210
    # A thread's entry may be behind the checkpoint that another one's made due.
    assert 15 <= done.checkpoints <= 30


def test_the_commands_verify_show_and_export(written: Path, key: Path, tmp_path: Path, crcjax: Callable) -> None:
    trust = ("--trust", key.with_suffix(".pub"), "--anchor", tmp_path / "anchors")
    done = crcjax("audit", "verify", written, *trust)
    assert (done.returncode, done.stdout) == (
        0,
        f"{written}: 27 entries and 2 checkpoints are whole, 5 entries behind the last one\n",
    )
    assert "give --trust" in crcjax("audit", "verify", written).stdout
    shown = crcjax("audit", "show", written, "--last", "2", "--kind", "request").stdout.splitlines()
    assert [line.split()[0] for line in shown] == ["26", "27"]
    assert "number=24" in shown[1]
    assert crcjax("audit", "export", written, "--out", tmp_path / "log.csv", *trust).returncode == 0
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 28
    assert crcjax("audit", "export", written, "--out", tmp_path / "log.csv").returncode == 2, "exists"
    crcjax("audit", "export", written, "--out", tmp_path / "copy.jsonl", "--format", "jsonl")
    assert (tmp_path / "copy.jsonl").read_bytes() == written.read_bytes()
    crcjax("audit", "export", written, "--out", tmp_path / "none.csv", "--to", "2020-01-01")
    assert len((tmp_path / "none.csv").read_text().splitlines()) == 1

    written.write_bytes(written.read_bytes().replace(b'"number": 3}', b'"number": 5}'))
    done = crcjax("audit", "verify", written, *trust)
    assert done.returncode == 1
    assert done.stderr == f"{written}: line 4 was changed: its hash is not that of its text\n"
    done = crcjax("audit", "export", written, "--out", tmp_path / "broken.csv")
    assert (done.returncode, "not whole" in done.stderr) == (1, True)
    assert crcjax("audit", "verify", tmp_path / "absent").returncode == 2


@pytest.fixture
def named_log(tmp_path: Path, key: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log that the environment names."""
    monkeypatch.setenv("CRCJAX_AUDIT", str(tmp_path / "log.jsonl"))
    monkeypatch.setenv("CRCJAX_AUDIT_KEY", str(key))
    monkeypatch.setenv("CRCJAX_AUDIT_ANCHOR", str(tmp_path / "anchors"))
    return tmp_path / "log.jsonl"


def _ended(log: Path) -> list[dict]:
    events = [event for event in read_events(log) if event.kind != CHECKPOINT]
    assert [event.kind for event in events] == ["command_begun", "command_ended"] * (len(events) // 2)
    assert [event.facts["run"] for event in events[0::2]] == [event.facts["run"] for event in events[1::2]]
    return [event.facts for event in events[1::2]]


def test_commands_write_to_the_log_that_the_environment_names_and_do_not_begin_without_it(
    tmp_path: Path, key: Path, crcjax: Callable, named_log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert crcjax("export", tmp_path / "PATIENT-NAME", "--out", tmp_path / "out").returncode == 2
    assert crcjax("overview", tmp_path / "absent").returncode == 2, "it is not recorded"
    [ended] = _ended(named_log)
    assert (ended["command"], ended["status"], ended["error"]) == ("export", 2, "InputError")
    assert "PATIENT" not in named_log.read_text()
    assert _checked(named_log, key) == Verification(3, 1, 0)

    (tmp_path / "file").touch()
    monkeypatch.setenv("CRCJAX_AUDIT", str(tmp_path / "file" / "log.jsonl"))
    done = crcjax("tile", tmp_path / "file", "--out", tmp_path / "other")
    assert (done.returncode, "log.jsonl: cannot be written" in done.stderr) == (3, True)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_copies_tiles_predictions_and_trainings_are_in_the_log_with_counts_and_digests(
    tmp_path: Path, key: Path, crcjax: Callable, named_log: Path, run: Path, painted: Path
) -> None:
    from crcjax.main import main

    broken = tmp_path / "PATIENT-NAME.svs"
    broken.write_bytes(b"II*\0" + bytes(100))
    assert crcjax("deidentify", broken, "--out", tmp_path / "copy.svs").returncode == 1
    assert crcjax("tile", broken, "--out", tmp_path / "store", "--workers", "1").returncode == 1
    slide = next(painted.rglob("*.svs"))
    assert crcjax("predict", slide, "--run", run, "--out", tmp_path / "out").returncode == 0
    options = [f"--config.data.store={tmp_path / 'absent'}", f"--config.data.cohort={painted / 'cohort.csv'}"]
    assert main(["--config", "configs/demo.py", "--workdir", str(tmp_path / "run"), *options]) == 2
    copied, tiled, predicted, trained = _ended(named_log)
    assert (copied["status"], copied["slides"], copied["copied"], copied["refused"]) == (1, 1, 0, 1)
    assert (tiled["status"], len(tiled["manifest_sha256"])) == (1, 64)
    assert "PATIENT" not in named_log.read_text()
    assert (predicted["command"], predicted["status"], predicted["slides"]) == ("predict", 0, 1)
    assert len(predicted["predictions_sha256"]) == 64
    assert (trained["command"], trained["status"], trained["error"]) == ("train", 2, "InputError")
    assert _checked(named_log, key).fault is None
