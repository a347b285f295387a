"""A service over a new state folder, answering HTTPS in this process; workers are started by the tests that need them."""

import json
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tifffile

from crcjax.encryption.keys import Keys
from crcjax.serve.client import Client
from crcjax.serve.permissions import EVERY_SITE, Role
from crcjax.serve.queue import QueueLimits
from crcjax.serve.results import attempt_folder, slide_id
from crcjax.serve.service import Service, open_service

# A TIFF file's shortest beginning that the service accepts: one directory, without an image.
TIFF_START = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0)
PASSWORD = "correct horse battery"

# A worker process whose prediction is the size of the file, and whose heatmap is a grey square. A slide that begins
# with TIFF_START and "die" kills its process, one with "bad" cannot be predicted, and one with "slow" takes long.
WORKER = """
import os, sys, time
from pathlib import Path
from PIL import Image
from crcjax.serve.queue import QueueLimits
from crcjax.serve.results import slide_id
from crcjax.serve.sqlite_queue import SqliteQueue
from crcjax.encryption.keys import open_keys
from crcjax.serve.vault import KEYS, Vault
from crcjax.serve.worker import CaseFailedError, Worker

state, name, drain_s = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def predict(payload, folder, progress):
    rows = []
    for number, slide in enumerate(payload["slides"]):
        progress(number / len(payload["slides"]), f"{number} of {len(payload['slides'])} slides")
        start = Path(slide["path"]).read_bytes()[26:30]
        if start.startswith(b"die"):
            os.abort()
        if start.startswith(b"bad"):
            raise CaseFailedError("corrupt: the file is damaged")
        if start.startswith(b"slow"):
            time.sleep(60)
        (folder / "heatmaps").mkdir(exist_ok=True)
        Image.new("L", (64, 32), 100).save(folder / "heatmaps" / f"{slide_id(slide['content'])}.png")
        size = Path(slide["path"]).stat().st_size
        known = {"slide_id": slide_id(slide["content"]), "case_id": "case", "call": "immune", "probs": [0.25, 0.75]}
        others = {"entropy": 0.56, "vacuity": None, "conformal_set": None, "qc_verdict": "accept", "qc_reasons": ""}
        rows.append({**known, **others, "synthetic": True, "reason": "", "size": size})
    return {"target": "subtype", "classes": ["canonical", "immune"], "bundle_id": "b", "slides": rows}

queue = SqliteQueue(state / "queue.db", QueueLimits(lease_s=1.0))
vault = Vault(state / KEYS, open_keys(sys.argv[4]) if sys.argv[4] else None)
Worker(name, queue, predict, state / "results", drain_s, vault).run()
"""


@dataclass(frozen=True)
class Server:
    """A service that answers HTTPS."""

    url: str
    certificate: Path
    service: Service
    clients: list[Client] = field(default_factory=list)

    def client(self, token: str = "") -> Client:
        """A client, which is closed at the end."""
        self.clients.append(Client(self.url, token, verify=self.certificate))
        return self.clients[-1]

    def sign_in(self, name: str) -> Client:
        """Signs in with PASSWORD."""
        self.clients.append(Client.sign_in(self.url, name, PASSWORD, verify=self.certificate))
        return self.clients[-1]

    def account(self, name: str, role: Role, site: str) -> Client:
        """Makes an account, signs it in, and returns its client."""
        accounts = self.service.accounts
        if role == Role.SERVICE:
            return self.client(accounts.add_service(name, site))
        accounts.redeem(accounts.invite(name, role, site), PASSWORD)
        return self.client(accounts.sign_in(name, PASSWORD)[0])


class Redis:
    """A Redis server with its data in a folder; `start` starts it again after `kill`."""

    def __init__(self, folder: Path):
        self._folder = folder
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.port = listener.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        settings = {"port": self.port, "bind": "127.0.0.1", "dir": self._folder, "save": ""}
        settings |= {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self.process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.create_connection(("127.0.0.1", self.port)) as connection:
                    connection.sendall(b"PING\r\n")
                    if connection.recv(5) == b"+PONG":
                        return
            except ConnectionError:
                pass
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def start_redis(required: Callable[[str], bool]) -> Iterator[Callable[[Path], Redis]]:
    """start_redis(folder): a Redis server of its own, with the settings that the queue asks for."""
    if shutil.which("redis-server") is None:
        message = "no redis-server: make redis-packages"
        if required("redis"):
            pytest.fail(message)
        pytest.skip(message)
    servers: list[Redis] = []

    def start(folder: Path) -> Redis:
        servers.append(Redis(folder))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory, start_redis: Callable[[Path], Redis]) -> Redis:
    """A Redis server that tests share."""
    return start_redis(tmp_path_factory.mktemp("redis"))


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the API reads of a bundle."""
    folder = tmp_path_factory.mktemp("bundle")
    target = {"name": "subtype", "classes": ["canonical", "immune"], "cancer_type": "colorectal"}
    (folder / "bundle.json").write_text(json.dumps({"target": target}))
    return folder


@contextmanager
def served(service: Service, viewer_script: bytes | None = None) -> Iterator[Server]:
    """Answers HTTPS on a free port until the block ends."""
    import uvicorn

    from crcjax.serve.app import create_app
    from crcjax.serve.tls import certificate_files

    certificate, key = certificate_files(service.folder / "tls", "127.0.0.1")
    config = uvicorn.Config(
        create_app(service, viewer_script), ssl_certfile=str(certificate), ssl_keyfile=str(key), log_level="warning"
    )
    server = uvicorn.Server(config)
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    running = Server(f"https://127.0.0.1:{listener.getsockname()[1]}", certificate, service)
    try:
        yield running
    finally:
        for client in running.clients:
            client.close()
        server.should_exit = True
        thread.join()
        listener.close()


@pytest.fixture(scope="session")
def worker_code() -> str:
    """The program of a worker whose predictions take no time; its arguments are state folder, name, seconds to drain, keys."""
    return WORKER


@pytest.fixture
def serve() -> Callable[..., AbstractContextManager[Server]]:
    """serve(service, viewer_script=None): a context manager within which the service answers HTTPS."""
    return served


@pytest.fixture
def open_state(tmp_path: Path, bundle_folder: Path) -> Callable[..., Service]:
    """open_state(): the service of this test's state folder; each call opens it once more."""
    folders = {site: [tmp_path / "folders" / site] for site in ("leeds", "york")}
    for of_site in folders.values():
        of_site[0].mkdir(parents=True)
    return lambda limits=None, **options: open_service(tmp_path / "state", bundle_folder, folders, limits, **options)


@pytest.fixture
def site_keys() -> Keys | None:
    """The keys that encrypt the service's files; None: they are plain."""
    return None


@pytest.fixture
def server(open_state: Callable[..., Service], site_keys: Keys | None) -> Iterator[Server]:
    with served(open_state(QueueLimits(lease_s=1.0, max_queued=20), keys=site_keys)) as running:
        yield running


@pytest.fixture
def administrator(server: Server) -> Client:
    return server.account("admin", Role.ADMINISTRATOR, EVERY_SITE)


@pytest.fixture
def pathologist(server: Server) -> Client:
    return server.account("dr.frost", Role.PATHOLOGIST, "leeds")


@pytest.fixture
def start_worker(server: Server) -> Iterator[Callable[..., subprocess.Popen]]:
    """start_worker(name): a worker process of the service (see WORKER)."""
    processes = []

    def start(name: str = "w", drain_s: float = 5.0, keys: str = "") -> subprocess.Popen:
        command = [sys.executable, "-c", WORKER, str(server.service.folder), name, str(drain_s), keys]
        processes.append(subprocess.Popen(command))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.fixture
def write_slide(tmp_path: Path) -> Callable[..., Path]:
    """write_slide(name, kind, size): a file that begins as a TIFF does, with `kind` behind it."""

    def write(name: str = "a.svs", kind: str = "", size: int = 1000) -> Path:
        path = tmp_path / name
        start = TIFF_START + kind.encode() + name.encode()
        path.write_bytes(start + bytes(size - len(start)))
        return path

    return write


# The size of `marked_slide`, its regions' side, and the corner of its black region, in level-0 px.
SLIDE_SIZE, REGION_PX, HOT = (2100, 1500), 100, (1000, 700)


@pytest.fixture(scope="session")
def marked_slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pyramid of JPEG tiles (levels 1, 2 and 4): pale pink, with a black region at HOT, in its middle."""
    path = tmp_path_factory.mktemp("slides") / "marked.tiff"
    width, height = SLIDE_SIZE
    pixels = np.full((height, width, 3), (240, 215, 225), np.uint8)
    x, y = HOT
    pixels[y : y + REGION_PX, x : x + REGION_PX] = 0
    options = {"tile": (256, 256), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": 95}}
    with tifffile.TiffWriter(path) as tiff:
        for shrink in (1, 2, 4):
            level = cv2.resize(pixels, (width // shrink, height // shrink), interpolation=cv2.INTER_AREA)
            resolution = {"resolution": (20_000 / shrink, 20_000 / shrink), "resolutionunit": "CENTIMETER"}
            tiff.write(level, subfiletype=int(shrink > 1), metadata=None, **resolution, **options)
    return path


@dataclass(frozen=True)
class PredictedCase:
    """A case that is done: its prediction and its slides, which are `marked_slide`.

    Attributes:
      size: width and height of the slides (px).
      region_px: the side of a region.
      hot: left and top of the region that has the attention.
    """

    prediction: str
    slides: list[str]
    size: tuple[int, int] = SLIDE_SIZE
    region_px: int = REGION_PX
    hot: tuple[int, int] = HOT


@pytest.fixture
def predict_case(server: Server, marked_slide: Path, commit_result: Callable[[], None]) -> Callable[..., PredictedCase]:
    """predict_case(client, case, slides=1): adds slides and commits their result as a worker would; HOT has all attention."""

    def predict(client: Client, case: str = "A-017", slides: int = 1) -> PredictedCase:
        ids = []
        for number in range(slides):
            copy = server.service.folder.parent / "folders" / "leeds" / f"{case}-{number}.tiff"
            copy.parent.mkdir(parents=True, exist_ok=True)
            # Slides of a case differ in their bytes.
            copy.write_bytes(marked_slide.read_bytes() + bytes(number))
            ids.append(client.add_slide(str(copy), case)["id"])
        prediction = client.predict(ids)["id"]
        commit_result()
        return PredictedCase(prediction, ids)

    return predict


@pytest.fixture
def commit_result(server: Server) -> Callable[[], None]:
    """commit_result(): claims the next job and commits a result for it."""

    def commit() -> None:
        lease = server.service.queue.claim("test")
        assert lease is not None
        rows = []
        for slide in lease.payload["slides"]:
            name, folder = slide_id(slide["content"]), attempt_folder(server.service.results, lease)
            path = folder / "attention" / f"{name}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **attention_arrays())
            call = {"slide_id": name, "case_id": "case", "call": "immune", "probs": [0.25, 0.75], "reason": ""}
            doubt = {"entropy": 0.56, "vacuity": 0.2, "conformal_set": ["immune"]}
            rows.append({**call, **doubt, "qc_verdict": "accept", "qc_reasons": "", "synthetic": True})
        result = {"target": "subtype", "classes": ["canonical", "immune"], "bundle_id": "b", "slides": rows}
        server.service.queue.commit(lease, result | {"token": lease.token})

    return commit


def attention_arrays() -> dict[str, Any]:
    """Regions over the whole slide, of which the first column was not used; HOT has most of the attention for class 1."""
    columns, rows = SLIDE_SIZE[0] // REGION_PX, SLIDE_SIZE[1] // REGION_PX
    origin = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2) * REGION_PX
    mask = origin[:, :1] > 0
    hot = (origin == HOT).all(axis=1)
    attention = np.where(mask[:, 0], 1e-4, 0)
    attention[hot] = 0.9
    by_class = np.stack([np.where(mask[:, 0], 1e-3, 0), attention], axis=-1)[:, None]
    return {
        "origin": origin,
        "region_px": float(REGION_PX),
        "slot_boxes": np.asarray([[0, 0, 1]], np.float32),
        "mask": mask,
        "method": "gradient",
        "maps": ["canonical", "immune"],
        "attention": attention,
        "slot_attention": attention[:, None],
        "class_attention": by_class,
        "attribution_maps": by_class * [-1, 1],
        "attribution": by_class[..., 1],
    }
