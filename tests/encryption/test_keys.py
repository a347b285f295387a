"""The site's keys: from a file, the environment and a program."""

import subprocess
import sys
from pathlib import Path

import pytest

from crcjax.encryption.frames import DecryptionError
from crcjax.encryption.keys import create_key, open_keys, retire_keys
from crcjax.encryption.memory import file_system, is_encrypted_volume, memory_folder, remove_abandoned_folders
from crcjax.errors import InputError

KEY, CONTEXT = bytes(range(32)), b"leeds/case/p1"
PROGRAM = """
import base64, json, sys
request = json.load(sys.stdin)
mask = lambda text: base64.b64encode(bytes(b ^ 7 for b in base64.b64decode(text))).decode()
if sys.argv[1] == "wrap":
    json.dump({"key_id": "hsm-1", "wrapped": mask(request["key"])}, sys.stdout)
elif request["key_id"] == "hsm-1":
    json.dump({"key": mask(request["wrapped"])}, sys.stdout)
else:
    sys.exit(1)
"""


def test_a_file_of_keys_wraps_with_the_last_and_unwraps_with_all(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = create_key(path)
    assert path.stat().st_mode & 0o077 == 0
    keys = open_keys(f"file:{path}")
    key_id, wrapped = keys.wrap(KEY, CONTEXT)
    assert (key_id, KEY in wrapped) == (first, False)
    assert keys.unwrap(key_id, wrapped, CONTEXT) == KEY
    for other in (wrapped[:-1] + b"x", wrapped[:5]):
        with pytest.raises(DecryptionError):
            keys.unwrap(key_id, other, CONTEXT)
    with pytest.raises(DecryptionError):
        keys.unwrap(key_id, wrapped, b"york/case/p1")
    second = create_key(path)
    newer = open_keys(f"file:{path}")
    new_id, new_wrapped = newer.wrap(KEY, CONTEXT)
    assert new_id == second
    assert newer.unwrap(first, wrapped, CONTEXT) == KEY
    # A process that was started before reads the file again.
    assert keys.unwrap(new_id, new_wrapped, CONTEXT) == KEY
    assert retire_keys(path) == [first]
    with pytest.raises(DecryptionError, match=f"has no key {first}"):
        open_keys(f"file:{path}").unwrap(first, wrapped, CONTEXT)


def test_the_environment_and_a_program_give_keys_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SITE_KEYS", f"a {'0' * 64}\nb {'1' * 64}\n")
    keys = open_keys("env:SITE_KEYS")
    assert keys.wrap(KEY, CONTEXT)[0] == "b"
    program = tmp_path / "kms.py"
    program.write_text(PROGRAM)
    keys = open_keys(f"command:{sys.executable} {program}")
    key_id, wrapped = keys.wrap(KEY, CONTEXT)
    assert (key_id, keys.unwrap(key_id, wrapped, CONTEXT)) == ("hsm-1", KEY)
    with pytest.raises(DecryptionError, match="must unwrap a key, got status 1"):
        keys.unwrap("other", wrapped, CONTEXT)
    with pytest.raises(DecryptionError, match="FileNotFoundError"):
        open_keys("command:/absent").wrap(KEY, CONTEXT)


def test_keys_that_cannot_be_used_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a 12\n")
    path.chmod(0o600)
    for source, words in (
        (f"file:{path}", "line 1 must be a new id and 64"),
        ("file:/absent", "cannot be read"),
        ("env:ABSENT", "holds no key"),
        ("disk:x", "must be file:PATH"),
        ("file:", "must be file:PATH"),
    ):
        with pytest.raises(InputError, match=words):
            open_keys(source)
    path.chmod(0o644)
    with pytest.raises(InputError, match="others can read the keys"):
        open_keys(f"file:{path}")


def test_a_folder_in_memory_is_removed_at_the_end_and_by_the_next_process_after_a_kill() -> None:
    with memory_folder() as folder:
        assert file_system(folder) == "tmpfs"
        assert is_encrypted_volume(folder), "no disk holds it"
        assert folder.stat().st_mode & 0o077 == 0
        code = "import os; os.mkdir(f'/dev/shm/crcjax-{os.getpid()}-killed'); print(os.getpid())"
        child = int(subprocess.check_output([sys.executable, "-c", code]))
        abandoned = Path("/dev/shm") / f"crcjax-{child}-killed"
        assert abandoned.exists()
        assert remove_abandoned_folders() >= 1
        assert (abandoned.exists(), folder.exists()) == (False, True)
    assert not folder.exists()
