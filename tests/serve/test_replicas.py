"""Several API processes over one state folder: whichever answers, nothing is lost, and one that is killed harms no request."""

import hashlib
import json
import os
import random
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anyio
import pytest

from crcjax.serve.client import Client
from crcjax.serve.service import Service
from crcjax.serve.slide_records import NewSlide, SlideRecord
from crcjax.serve.uploads import OffsetError, Upload, Uploads

# A TIFF file's shortest beginning that the service accepts: one directory, without an image.
TIFF_START = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0)
PASSWORD = "correct horse battery"
# The service as the command starts it, with workers whose predictions take no time.
SERVICE = """
import json, sys
from crcjax.serve import run_service
from crcjax.serve.config import read_config

values, worker = json.loads(sys.argv[1]), sys.argv[2]
run_service._worker_command = lambda settings, name: [sys.executable, "-c", worker, settings.state, name, "5", ""]
sys.exit(run_service.run_service(read_config(None, values), lambda line: print(line, flush=True)))
"""


def _children(pid: int) -> dict[int, str]:
    """The replicas of a service, with their command lines."""
    children = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    commands = {int(child): Path(f"/proc/{child}/cmdline").read_text() for row in children for child in row}
    return {child: command for child, command in commands.items() if "crcjax.serve.replica" in command}


def _use(url: str, certificate: str, name: str, folder: Path, cases: int) -> int:
    """Uploads slides in two chunks, has them predicted, and checks every answer."""
    checked = 0
    with Client.sign_in(url, name, PASSWORD, verify=certificate) as client:
        for number in range(cases):
            path = folder / f"{name}-{number}.svs"
            content = TIFF_START + path.name.encode() + os.urandom(3000 + 7 * number)
            path.write_bytes(content)
            slide = client.upload(path, path.stem)
            assert (slide["bytes"], slide["case_id"]) == (len(content), path.stem)
            prediction = client.predict([slide["id"]])["id"]
            result = client.wait(prediction, 60.0)
            assert [row["size"] for row in result["slides"]] == [len(content)]
            assert client.heatmap(prediction, slide["id"]).startswith(b"\x89PNG")
            checked += 1
        assert len(list(client.predictions())) >= checked
    return checked


@pytest.mark.slow
@pytest.mark.multiprocess
def test_replicas_that_are_killed_under_load_leave_every_request_answered_rightly(
    tmp_path: Path, bundle_folder: Path, worker_code: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crcjax.serve.client._CHUNK_BYTES", 2000)
    values = {"state": str(tmp_path / "state"), "bundle": str(bundle_folder), "port": 0, "replicas": 2, "workers": 2}
    command = [sys.executable, "-c", SERVICE, json.dumps(values), worker_code]
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        match = re.search(r"serving on (\S+) \(certificate: (.*)\)", service.stdout.readline())
        assert match is not None
        url, certificate, secret = match[1], match[2], service.stdout.readline().split()[-1]
        users = [f"dr.{number}" for number in range(3)]
        with Client(url, verify=certificate) as guest:
            guest.request("POST", "/v1/redeem", json={"secret": secret, "password": PASSWORD})
            with Client.sign_in(url, "admin", PASSWORD, verify=certificate) as admin:
                for name in users:
                    new = {"name": name, "role": "pathologist", "site": "leeds"}
                    invitation = admin.request("POST", "/v1/accounts", json=new).json()["secret"]
                    guest.request("POST", "/v1/redeem", json={"secret": invitation, "password": PASSWORD})
        ended, killed, choose = threading.Event(), 0, random.Random(0)
        with ThreadPoolExecutor(3) as threads:
            jobs = [threads.submit(_use, url, certificate, name, tmp_path, 12) for name in users]
            while not all(job.done() for job in jobs):
                ended.wait(choose.uniform(0.5, 1.5))
                replicas = _children(service.pid)
                # One answers while the other starts again.
                if len(replicas) == 2 and killed < 6 and min(_age_s(pid) for pid in replicas) > 4:
                    os.kill(choose.choice(list(replicas)), signal.SIGKILL)
                    killed += 1
            assert sum(job.result() for job in jobs) == 36
        assert killed >= 2
        with Client(url, verify=certificate) as guest:
            # Counts of all replicas, those that were killed included.
            text = guest.request("GET", "/metrics").text
            counts = re.findall(
                r'crcjax_requests_total\{endpoint="/v1/predictions",method="POST",status="202"\} (\S+)', text
            )
            assert sum(map(float, counts)) >= 36
            assert 'crcjax_jobs{status="done"} 36.0' in text
        replicas = _children(service.pid)
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
        assert not [pid for pid in replicas if Path(f"/proc/{pid}").exists()]
    finally:
        service.terminate()
        service.wait(60)
        if service.stdout is not None:
            service.stdout.close()


def _age_s(pid: int) -> float:
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _append(uploads: Uploads, upload: Upload, offset: int, content: bytes) -> Upload | SlideRecord:
    async def append() -> Upload | SlideRecord:
        async def chunk():
            yield content

        return await uploads.append(upload, offset, chunk())

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(anyio.run, append).result()


def test_chunks_of_an_upload_may_reach_any_replica_but_not_two_at_once(open_state: Callable[..., Service]) -> None:
    content = TIFF_START + bytes(range(256)) * 40
    first, second = open_state().uploads, open_state().uploads
    new = NewSlide("leeds", "dr.frost", "A-017", "a.svs")
    upload = first.begin(new, len(content), hashlib.sha256(content).hexdigest())
    for number, start in enumerate(range(0, 9000, 1000)):
        _append((first, second)[number % 3 == 1], upload, start, content[start : start + 1000])
    with second._locked(upload, 9000), pytest.raises(OffsetError):
        _append(first, upload, 9000, content[9000:])
    slide = _append(first, upload, 9000, content[9000:])
    assert isinstance(slide, SlideRecord)
    assert slide.path.read_bytes() == content


def test_a_replica_that_was_killed_before_it_added_the_slide_is_relieved_by_another(
    open_state: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = TIFF_START + bytes(1000)
    first, second = open_state().uploads, open_state()
    upload = first.begin(NewSlide("leeds", "dr.frost", "A-017", "a.svs"), len(content), "")

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(first, "_add", killed)
    with pytest.raises(KeyboardInterrupt):
        _append(first, upload, 0, content)
    slide = _append(second.uploads, upload, len(content), b"")
    assert second.slides.slide(upload.id) == slide
