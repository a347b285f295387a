"""A stand-in for NVIDIA's library, and monitored processes without training."""

import ctypes
import json
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

HEALTHY_GPU = {
    **{"memory_total": 80 << 30, "memory_used": 20 << 30, "utilisation": 90, "temperature": 55, "power_mw": 350_000},
    **{"energy_mj": 5_000_000, "sm_clock": 1900, "sm_clock_max": 1980, "throttle": 0, "ecc_corrected": 0},
    **{"ecc_uncorrected": 0, "link0": 1, "link1": 1, "link_errors": 0},
}


@pytest.fixture(scope="session")
def nvml_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for libnvidia-ml.so.1, compiled from nvml_stub.c; for LD_LIBRARY_PATH, its folder."""
    if shutil.which("gcc") is None:
        pytest.skip("no gcc: the stand-in for libnvidia-ml.so.1 cannot be compiled")
    library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("nvml_stub.c")
    flags = ["-shared", "-fPIC", "-Wl,-soname,libnvidia-ml.so.1"]
    subprocess.run(["gcc", *flags, "-o", str(library), str(source)], check=True)
    return library


@pytest.fixture
def write_gpus(tmp_path: Path, nvml_library: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """write_gpus({"temperature": 90}, {}): the stand-in's GPUs, each a healthy one with these values changed; None removes one."""
    # A library that is loaded under its name is taken by every later search for that name.
    ctypes.CDLL(str(nvml_library), mode=ctypes.RTLD_GLOBAL)
    path = tmp_path / "gpus.txt"
    # The library reads the environment of the process itself, which os.environ sets too.
    monkeypatch.setenv("CRCJAX_NVML_STUB", str(path))

    def write(*changes: dict) -> None:
        lines = [
            f"{index}.{key}={value}\n"
            for index, changed in enumerate(changes)
            for key, value in (HEALTHY_GPU | changed).items()
            if value is not None
        ]
        path.write_text("".join(lines))

    return write


@pytest.fixture
def webhook() -> Iterator[tuple[int, list]]:
    """The port of a webhook on this machine, and the bodies that it received."""
    received: list = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port, received
    server.shutdown()
    server.server_close()
    thread.join()
