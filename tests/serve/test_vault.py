"""Encryption at rest of the service: from upload to result, in the raw bytes of its folder, and through a rotation of keys."""

import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from crcjax.encryption.frames import DecryptionError
from crcjax.encryption.keys import Keys, create_key, open_keys
from crcjax.errors import InputError
from crcjax.serve.at_rest import keys_at_rest
from crcjax.serve.permissions import Role
from crcjax.serve.vault import Vault

# A TIFF file's shortest beginning that the service accepts: one directory, without an image.
TIFF_START = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0)
MARK = b"PIXELS-OF-THE-PATIENT"


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    create_key(tmp_path / "site.keys")
    return tmp_path / "site.keys"


@pytest.fixture
def site_keys(key_file: Path) -> Keys:
    return open_keys(f"file:{key_file}")


def files_with(folder: Path, *words: bytes) -> list[str]:
    """The files below a folder whose bytes hold any of the words."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(word in path.read_bytes() for word in words)
    ]


def _slide(path: Path) -> Path:
    path.write_bytes(TIFF_START + MARK * 3000)
    return path


def test_slides_and_results_are_encrypted_from_the_first_chunk_on_and_rotated_under_load(
    server, start_worker: Callable, key_file: Path, tmp_path: Path, crcjax: Callable
) -> None:
    state = server.service.folder
    pathologist = server.account("dr.frost", Role.PATHOLOGIST, "leeds")
    # An upload in chunks of odd lengths, of which one is sent again.
    content = _slide(tmp_path / "a.svs").read_bytes()
    body = {"name": "a.svs", "case_id": "A-017", "bytes": len(content)}
    url = "/v1/uploads/" + pathologist.request("POST", "/v1/uploads", json=body).json()["id"]
    for begin, end in ((0, 1001), (1001, 30_000)):
        headers = {"Upload-Offset": str(begin), "Content-Type": "application/octet-stream"}
        pathologist.request("PATCH", url, content=content[begin:end], headers=headers)
    assert files_with(state, MARK) == []
    part = next((state / "uploads").glob("*.part"))
    part.write_bytes(part.read_bytes() + b"left by a broken connection")
    server.service.uploads._hashes.clear()
    headers["Upload-Offset"] = "30000"
    slide = pathologist.request("PATCH", url, content=content[30_000:], headers=headers).json()["slide"]
    plain = shutil.copy(tmp_path / "a.svs", tmp_path / "folders" / "leeds" / "b.svs")
    reference = pathologist.add_slide(str(plain), "B")
    assert (slide["bytes"], slide["content"]) == (len(content), reference["content"])

    start_worker(keys=f"file:{key_file}")
    prediction = pathologist.predict([slide["id"]])["id"]
    [row] = pathologist.wait(prediction, 30.0)["slides"]
    assert row["size"] == len(content), "the worker reads the slide itself"
    picture = pathologist.heatmap(prediction, slide["id"])
    assert picture.startswith(b"\x89PNG")
    assert files_with(state, MARK, b"\x89PNG") == []
    assert not [path for path in Path("/dev/shm").glob("crcjax-*") if any(path.iterdir())]

    # Rotation: readers and an upload go on while every key is wrapped anew, and the old key is removed.
    failures: list[str] = []
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            if (
                pathologist._http.get(f"/v1/predictions/{prediction}/slides/{slide['id']}/heatmap.png").status_code
                != 200
            ):
                failures.append("a read failed")

    before = {path: path.read_bytes() for path in (state / "slides").iterdir()}
    reader = threading.Thread(target=read)
    reader.start()
    try:
        for _ in range(3):
            arguments = ("--keys", f"file:{key_file}", "--state", state)
            assert crcjax("keys", "rotate", *arguments, "--retire").returncode == 0
            pathologist.upload(tmp_path / "a.svs", "A-018")
    finally:
        stop.set()
        reader.join()
    assert failures == []
    assert len(key_file.read_text().splitlines()) == 1
    assert all(path.read_bytes() == content for path, content in before.items()), "no slide was written again"
    # The worker, which was started before, follows.
    again = pathologist.predict([pathologist.upload(_slide(tmp_path / "c.svs"), "C")["id"]])["id"]
    assert pathologist.wait(again, 30.0)["slides"]

    # Without the key, and with a file put in another's place, nothing is readable.
    path = next((state / "slides").iterdir())
    with pytest.raises(DecryptionError, match="give the keys"):
        Vault(state / "keys.db").open(path, path.stem)
    with pytest.raises(DecryptionError, match="another object's file"):
        server.service.vault.open(path, "another")
    with pytest.raises(DecryptionError, match="another object's file"):
        server.service.vault.open(path, path.stem, "york")
    server.service.vault.destroy([server.service.vault.case_key("leeds", case) for case in ("A-017", "A-018", "C")])
    with pytest.raises(DecryptionError, match="was erased"):
        server.service.vault.open(path, path.stem)


def test_a_start_is_refused_where_something_would_lie_in_the_clear(tmp_path: Path, key_file: Path) -> None:
    keys, disk, memory = f"file:{key_file}", tmp_path / "state", Path("/dev/shm/state")
    with pytest.raises(InputError, match="must lie on an encrypted volume"):
        keys_at_rest(disk, "127.0.0.1", keys, False)
    assert keys_at_rest(disk, "10.0.0.1", keys, True)[0] is not None
    assert keys_at_rest(memory, "10.0.0.1", keys, False)[0] is not None
    with pytest.raises(InputError, match="would lie unencrypted"):
        keys_at_rest(disk, "10.0.0.1", None, False)
    assert keys_at_rest(disk, "10.0.0.1", None, True) == (None, "")
    for host in ("127.0.0.1", "::1", "localhost"):
        assert "not encrypted" in keys_at_rest(disk, host, None, False)[1]


def test_swap_in_the_clear_is_refused_unless_stated(
    tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crcjax.serve.at_rest.unencrypted_swap", lambda: ["/dev/sda2"])
    with pytest.raises(InputError, match="swap on /dev/sda2"):
        keys_at_rest(Path("/dev/shm/state"), "127.0.0.1", f"file:{key_file}", False)
    assert keys_at_rest(Path("/dev/shm/state"), "127.0.0.1", f"file:{key_file}", True)[0] is not None
