"""Kills workers, API replicas, Redis and the whole process tree of a service under load, and counts what became of every case.

    python tools/campaign_serve.py OUT --kills 500 [--check]

OUT is a new folder. Two users upload slides and ask for predictions all the time. The workers' loop, queue, leases and results are
the product's; in place of the engine, a prediction is the size of the file after some milliseconds. One slide in ten cannot be
predicted, and one in forty aborts its worker. The command fails if an accepted case has no end, two results, or a wrong one.
With --check, no figures are recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil
from record import Row, record

from crcjax.serve.client import Client, ServiceError

# A TIFF file's shortest beginning that the service accepts: one directory, without an image.
TIFF_START = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0)
PASSWORD = "correct horse battery"
FINAL = ("done", "failed", "quarantined", "cancelled")
# The shares of the kills.
KINDS = {"worker": 9, "replica": 6, "redis": 3, "whole tree": 2}
SERVICE = """
import json, sys
from crcjax.serve import processes, run_service
from crcjax.serve.config import read_config

# Killed processes start again after a second, so that there is always one to be killed.
processes._LONGEST_DELAY_S = 1.0
values, worker = json.loads(sys.argv[1]), sys.argv[2]
run_service._worker_command = lambda settings, name: [sys.executable, "-c", worker, settings.state, name]
sys.exit(run_service.run_service(read_config(None, values), lambda line: print(line, flush=True)))
"""
WORKER = """
import os, random, sys, time
from pathlib import Path
from crcjax.serve.open_queue import REDIS_VARIABLE, open_queue
from crcjax.serve.queue import QueueLimits
from crcjax.serve.results import slide_id
from crcjax.serve.vault import KEYS, Vault
from crcjax.serve.worker import CaseFailedError, Worker, _end_with_the_service

state, name = Path(sys.argv[1]), sys.argv[2]
queue = open_queue(state, QueueLimits(lease_s=2.0, max_tries=5), os.environ.get(REDIS_VARIABLE), 30)
commit = queue.commit

def recorded(lease, result):
    commit(lease, result)
    with open(state / "commits", "a") as file:
        file.write(f"{lease.job_id} {lease.token}\\n")

queue.commit = recorded

def predict(payload, folder, progress):
    [slide] = payload["slides"]
    content = Path(slide["path"]).read_bytes()
    time.sleep(random.uniform(0.01, 0.3))
    if content[26:29] == b"bad":
        raise CaseFailedError("corrupt: the file is damaged")
    if content[26:29] == b"die":
        os.abort()
    row = {"slide_id": slide_id(slide["content"]), "case_id": "case", "call": "immune", "size": len(content)}
    return {"target": "subtype", "classes": ["canonical", "immune"], "bundle_id": "b", "slides": [row]}

_end_with_the_service()
Worker(name, queue, predict, state / "results", 2.0, Vault(state / KEYS, None)).run()
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@dataclass
class Tree:
    """The service and its Redis server, which can be killed in parts."""

    folder: Path
    port: int = field(default_factory=free_port)
    redis_port: int = field(default_factory=free_port)

    def start_redis(self) -> None:
        settings = {"port": self.redis_port, "bind": "127.0.0.1", "dir": self.folder, "save": ""}
        settings |= {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
        words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
        self.redis = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
        while True:
            with suppress(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", self.redis_port)).close()
                return
            time.sleep(0.01)

    def start(self) -> str:
        """Starts the service, and returns the first administrator's secret, if there is one."""
        values = {
            **{"state": str(self.folder / "state"), "bundle": str(self.folder / "bundle"), "port": self.port},
            **{"replicas": 2, "workers": 2, "redis": f"redis://127.0.0.1:{self.redis_port}/0"},
        }
        command = [sys.executable, "-c", SERVICE, json.dumps(values), WORKER]
        with open(self.folder / "service.log", "a") as errors:
            self.service = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert self.service.stdout is not None
        line = self.service.stdout.readline()
        assert line.startswith("serving on"), f"{line}; see {self.folder}/service.log"
        match = re.search(r"secret (\S+)", self.service.stdout.readline())
        return match[1] if match else ""

    def client(self, token: str = "") -> Client:
        return Client(f"https://127.0.0.1:{self.port}", token, self.folder / "state" / "tls" / "certificate.pem")

    def processes(self, word: str) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.service.pid).children() if word in " ".join(child.cmdline())]

    def kill(self, kind: str, choose: random.Random) -> bool:
        """Kills one part; False if none is there at the moment."""
        if kind == "redis":
            self.redis.kill()
            self.redis.wait()
            self.start_redis()
            return True
        if kind == "whole tree":
            tree = psutil.Process(self.service.pid).children(recursive=True)
            self.service.kill()
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            self.redis.kill()
            self.service.wait()
            self.redis.wait()
            self.start_redis()
            self.start()
            return True
        with suppress(psutil.NoSuchProcess):
            processes = self.processes("crcjax.serve.replica" if kind == "replica" else "CaseFailedError")
            if processes:
                choose.choice(processes).kill()
                return True
        return False


@dataclass
class Users:
    """Accepted cases: the prediction's id, the size of its slide, and what is wrong with it."""

    accepted: dict[str, tuple[int, str]] = field(default_factory=dict)
    stopping: threading.Event = field(default_factory=threading.Event)
    broken_requests: int = 0

    def run(self, tree: Tree, token: str, number: int) -> None:
        choose, case = random.Random(number), 0
        with tree.client(token) as client:
            while not self.stopping.is_set():
                case += 1
                kind = "die" if case % 40 == 0 else "bad" if case % 10 == 0 else "ok "
                path = tree.folder / f"u{number}-{case}.svs"
                path.write_bytes(TIFF_START + kind.encode() + path.name.encode() + choose.randbytes(500 + case))
                while not self.stopping.is_set():
                    try:
                        slide = client.upload(path, path.stem)["id"]
                        prediction = client.predict([slide], choose.random() < 0.2, f"{number}-{case}")["id"]
                        self.accepted[prediction] = (path.stat().st_size, kind)
                        break
                    except (ServiceError, httpx.TransportError):
                        # The same request again, under the same idempotency key, as a user would.
                        self.broken_requests += 1
                        time.sleep(0.2)
                path.unlink()
                time.sleep(0.05)


def run(folder: Path, kills: int) -> tuple[Users, Counter[str], list[str], Counter[str], float]:
    """Runs the campaign, and returns the cases, the kills, the faults, the ends by status, and the seconds of the longest wait."""
    folder.mkdir(parents=True)
    (folder / "bundle").mkdir()
    target = {"name": "subtype", "classes": ["canonical", "immune"]}
    (folder / "bundle" / "bundle.json").write_text(json.dumps({"target": target}))
    tree, users, killed, choose = Tree(folder.resolve()), Users(), Counter[str](), random.Random(0)
    tree.start_redis()
    secret = tree.start()
    with tree.client() as guest:
        guest.request("POST", "/v1/redeem", json={"secret": secret, "password": PASSWORD})
        token = guest.request("POST", "/v1/sign-in", json={"name": "admin", "password": PASSWORD}).json()["token"]
    with tree.client(token) as admin:
        new = {"name": "gateway", "role": "service", "site": "leeds"}
        token = admin.request("POST", "/v1/accounts", json=new).json()["token"]
    threads = [threading.Thread(target=users.run, args=(tree, token, number)) for number in range(2)]
    for thread in threads:
        thread.start()
    plan = [kind for kind, share in KINDS.items() for _ in range(share)]
    choose.shuffle(plan)
    while killed.total() < kills:
        time.sleep(choose.uniform(0.2, 1.0))
        kind = plan[killed.total() % len(plan)]
        killed[kind] += tree.kill(kind, choose)
    users.stopping.set()
    for thread in threads:
        thread.join()
    faults, ends, longest_s = check(tree, users, token)
    tree.service.terminate()
    if tree.service.wait(60) != 0:
        faults.append("the service did not end by itself")
    tree.redis.terminate()
    tree.redis.wait()
    return users, killed, faults, ends, longest_s


def check(tree: Tree, users: Users, token: str) -> tuple[list[str], Counter[str], float]:
    """What is wrong with the ends of the accepted cases, the ends by status, and the longest wait."""
    faults, ends, longest_s, deadline = [], Counter[str](), 0.0, time.monotonic() + 180
    with tree.client(token) as client:
        for prediction, (size, kind) in users.accepted.items():
            while (status := client.prediction(prediction))["status"] not in FINAL and time.monotonic() < deadline:
                time.sleep(0.1)
            ends[status["status"]] += 1
            longest_s = max(longest_s, (status["ended_s"] or time.time()) - status["requested_s"])
            if status["status"] == "done":
                sizes = [row["size"] for row in client.result(prediction)["slides"]]
                if sizes != [size] or kind != "ok ":
                    faults.append(f"{prediction}: has a wrong result, {sizes} in place of {size} ({kind})")
            elif status["status"] not in ("failed", "quarantined") or not status["reason"]:
                faults.append(f"{prediction}: ended as {status['status']} without a reason ({kind})")
    commits = Counter(line.split()[0] for line in (tree.folder / "state" / "commits").read_text().splitlines())
    return (
        faults + [f"{job}: {count} results were committed" for job, count in commits.items() if count > 1],
        ends,
        longest_s,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    users, killed, faults, ends, longest_s = run(options.out, options.kills)
    print("\n".join(faults))
    kinds = ", ".join(f"{count} of {kind}" for kind, count in killed.items())
    print(f"{killed.total()} kills ({kinds}), {len(users.accepted)} cases, {dict(ends)}, {len(faults)} faults")
    if not options.check:
        rows = [Row(f"kills of {kind}", count, "kills") for kind, count in killed.items()]
        rows += [Row("accepted cases", len(users.accepted), "cases")]
        rows += [Row(f"cases that ended {status}", count, "cases") for status, count in ends.items()]
        rows += [
            Row("cases without an end, with two results or a wrong one", len(faults), "cases"),
            Row("requests that a user had to repeat", users.broken_requests, "requests"),
            Row("longest time from a request to its end", longest_s, "s"),
        ]
        about = (
            "A service with Redis, two API replicas and two workers under load, parts of which are killed.\n\n"
            "Kills are SIGKILL at random moments; the whole tree is the service with all its processes and Redis. Queue, workers' "
            "loop and API are the product's, the engine is a stand-in of some milliseconds. One slide in ten cannot be predicted, "
            "and one in forty aborts its worker until it is quarantined."
        )
        record("campaign_serve", f"python tools/campaign_serve.py OUT --kills {options.kills}", rows, about)
    return 1 if faults else 0


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.exit(main())
