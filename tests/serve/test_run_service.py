"""`crcjax serve` as a user starts it, with the real engine."""

import csv
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crcjax.data.cohort import load_cohort
from crcjax.encryption.frames import is_encrypted
from crcjax.encryption.keys import create_key
from crcjax.runs.bundle_export import export_bundle
from crcjax.serve.client import Client, PredictionFailedError

PASSWORD = "correct horse battery"
ABSENT = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "fastapi":
            raise ImportError("fastapi is not here")

sys.meta_path.insert(0, Absent())
from crcjax.cli import main
sys.argv = ["crcjax", "serve", *sys.argv[1:]]
main()
"""


def test_without_the_extra_it_answers_help_and_names_the_extra(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ABSENT]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--bundle" in done.stdout
    done = subprocess.run([*command, "--bundle", "b", "--state", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'crcjax[serve]'" in done.stderr


def test_what_cannot_be_served_is_one_line(crcjax: Callable, tmp_path: Path, bundle_folder: Path) -> None:
    state = ("--state", tmp_path / "state")
    for arguments, words in (
        (("--bundle", tmp_path, *state), "is not a bundle"),
        (("--bundle", bundle_folder, *state, "--slides", "folder"), "--slides must be SITE=FOLDER"),
        (("--bundle", bundle_folder, *state, "--slides", f"leeds={tmp_path / 'absent'}"), "must be a folder"),
        (("--bundle", bundle_folder, *state, "--key", "k"), "certificate and key must be given together"),
        (("--bundle", bundle_folder, *state, "--host", "192.0.2.1"), "would lie unencrypted"),
        (("--bundle", bundle_folder, *state, "--keys", "disk:k"), "must lie on an encrypted volume"),
        (("--bundle", bundle_folder, *state, "--keys", "disk:k", "--encrypted-volume"), "keys must be file:PATH"),
        (
            ("--bundle", bundle_folder, *state, "--host", "192.0.2.1", "--encrypted-volume"),
            "cannot be listened on",
        ),
    ):
        done = crcjax("serve", *arguments)
        assert done.returncode == 2
        assert words in done.stderr
        assert done.stderr.count("\n") == 1


class Started:
    """A service that was started from the command line."""

    def __init__(self, bundle: Path, state: Path, port: int = 0):
        command = [sys.executable, "-m", "crcjax.cli", "serve", "--bundle", str(bundle), "--state", str(state)]
        keys = state.with_name("site.keys")
        if not keys.exists():
            create_key(keys)
        options = ["--port", str(port), "--drain-s", "5", "--keys", f"file:{keys}", "--encrypted-volume"]
        self.process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        match = re.search(r"serving on (\S+) \(certificate: (.*)\)", line)
        if match is None:
            self.process.kill()
            raise AssertionError(line + self.process.communicate()[1])
        self.url, self.certificate = match[1], Path(match[2])

    def secret(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.readline().split()[-1]

    def end(self) -> None:
        """Kills the service; its workers notice."""
        self.process.kill()
        self.process.wait()
        assert self.process.stderr is not None
        self.process.stderr.close()

    @property
    def workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        others = [Path(f"/proc/{self.process.pid}/task").glob("*/children")]
        return [
            int(pid)
            for pid in {*children, *(p for paths in others for path in paths for p in path.read_text().split())}
        ]


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_bundle([run], tmp_path_factory.mktemp("exported") / "bundle").path


@pytest.fixture
def started(bundle: Path, tmp_path: Path) -> Iterator[Started]:
    service = Started(bundle, tmp_path / "state")
    yield service
    service.end()


@pytest.mark.slow
def test_a_slide_is_predicted_by_the_real_engine_through_a_killed_worker_and_a_killed_service(
    started: Started, bundle: Path, painted: Path, tmp_path: Path, crcjax: Callable
) -> None:
    clients = ExitStack()
    guest = clients.enter_context(Client(started.url, verify=started.certificate))
    guest.request("POST", "/v1/redeem", json={"secret": started.secret(), "password": PASSWORD})
    admin = clients.enter_context(Client.sign_in(started.url, "admin", PASSWORD, verify=started.certificate))
    new = {"name": "dr.frost", "role": "pathologist", "site": "leeds"}
    secret = admin.request("POST", "/v1/accounts", json=new).json()["secret"]
    guest.request("POST", "/v1/redeem", json={"secret": secret, "password": PASSWORD})
    frost = clients.enter_context(Client.sign_in(started.url, "dr.frost", PASSWORD, verify=started.certificate))

    slides = [Path(str(row.path)) for row in load_cohort(painted / "cohort.csv", None).rows[-3:]]
    broken = tmp_path / "broken.svs"
    # One directory, without an image.
    broken.write_bytes(b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0) + bytes(1000))
    ids = {path: frost.predict([frost.upload(path, path.stem)["id"]])["id"] for path in (*slides, broken)}
    deadline = time.monotonic() + 240
    while frost.prediction(ids[slides[0]])["status"] != "done":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for worker in started.workers:
        os.kill(worker, signal.SIGKILL)
    started.end()
    again = Started(bundle, tmp_path / "state")
    try:
        frost = clients.enter_context(Client.sign_in(again.url, "dr.frost", PASSWORD, verify=again.certificate))
        results = {path: frost.wait(ids[path], 240.0) for path in slides}
        with pytest.raises(PredictionFailedError, match=r"failed: (corrupt|unsupported)"):
            frost.wait(ids[broken], 240.0)
        # OpenSlide read them from memory: on the disk, all files of slides and results are encrypted.
        stored = [path for name in ("slides", "results") for path in (tmp_path / "state" / name).rglob("*.*")]
        assert len(stored) >= 3 * len(slides)
        assert all(is_encrypted(path) for path in stored)
        # The command predicts the same, to the digit.
        done = crcjax("predict", "--bundle", bundle, *slides, "--out", tmp_path / "out")
        assert done.returncode == 0
        with open(tmp_path / "out" / "predictions.csv", newline="") as file:
            rows = {row["slide_id"]: row for row in csv.DictReader(file)}
        for path, result in results.items():
            [slide] = result["slides"]
            assert slide["call"] == rows[path.stem]["call"]
            assert list(map(str, slide["probs"])) == [rows[path.stem][f"p_{name}"] for name in result["classes"]]
            assert frost.heatmap(ids[path], slide["id"]).startswith(b"\x89PNG")
            regions = frost.regions(ids[path], slide["id"])
            assert len(regions["features"]) == slide["regions"], "those with tissue"
        # A stop ends all processes.
        again.process.send_signal(signal.SIGTERM)
        workers = again.workers
        assert again.process.wait(60) == 0
        assert not [worker for worker in workers if Path(f"/proc/{worker}").exists()]
    finally:
        clients.close()
        again.end()
