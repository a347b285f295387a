"""Promotes, rolls back and predicts at random under load, and checks that every result names the bundle that made it.

    python tools/release_campaign.py --operations 1000

The service, its HTTPS, its queue and the registry are the real ones. The workers are processes whose prediction is the content of
the bundle's weights file, so that a result by another bundle than the one it names would be seen.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from crcjax.errors import CrcjaxError, InputError
from crcjax.lifecycle.registry import add_bundle, promote, roll_back
from crcjax.lifecycle.registry_state import LOG, PROMOTED, ROLLED_BACK, read_registry
from crcjax.monitor.event_log import verify
from crcjax.runs.signature import public_key_of

# A TIFF file's shortest beginning that the service accepts: one directory, without an image.
TIFF_START = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 0)
CLASSES = ("canonical", "immune", "stromal")
PEOPLE = ("A. Frost", "B. Winter")
POLICY = """
[people]
{people}
[shadow]
people = 0
[canary]
share = 0.5
evidence = []
[production]
evidence = []
"""
WORKER = """
import hashlib, sys, time
from pathlib import Path
from crcjax.serve.queue import QueueLimits
from crcjax.serve.results import slide_id
from crcjax.serve.sqlite_queue import SqliteQueue
from crcjax.serve.worker import Worker

state, name = Path(sys.argv[1]), sys.argv[2]

def predict(payload, folder, progress):
    bundle = Path(payload["bundle"])
    time.sleep(0.05)
    rows = [{"slide_id": slide_id(slide["content"]), "case_id": "case", "call": "immune",
             "weights": (bundle / "weights-0.safetensors").read_text()} for slide in payload["slides"]]
    bundle_id = hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    return {"target": "subtype", "classes": ["canonical", "immune", "stromal"], "bundle_id": bundle_id, "slides": rows}

Worker(name, SqliteQueue(state / "queue.db", QueueLimits()), predict, state / "results", 5.0).run()
"""


def write_bundle(folder: Path, seed: int = 0, target: str = "subtype") -> str:
    """Writes a bundle whose files are whole and whose weights are of no model; returns its id."""
    from crcjax.config import get_config
    from crcjax.slides.tiling.plan import TilingParams

    config = get_config()
    config.seed = seed
    settings = {"tiling": TilingParams(("10x",)).to_json(), "members": [{"config": config.to_dict(), "stain": None}]}
    member = {"model_id": f"m{seed}", "seed": seed, "step": 10, "metrics": {"loss": 0.5}}
    files = {
        "settings.json": json.dumps(settings).encode(),
        "training_ids.json": json.dumps({"salt": "s", "train": [], "val": []}).encode(),
        "weights-0.safetensors": f"weights {seed}".encode(),
    }
    names = zip(("settings", "training_ids", "weights"), files, strict=True)
    parts = {name: {"files": [file], "optional": False} for name, file in names}
    manifest = {
        **{"format": "crcjax bundle", "version": 1, "model_id": f"m{seed}", "encoder": None, "parts": parts},
        "target": {"name": target, "classes": CLASSES, "cancer_type": "colorectal"},
        "members": [member | {"config_sha256": "c" * 64, "data_sha256": "d" * 64}],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "made_by": {"crcjax": "0.1.0", "commit": "abc"},
    }
    folder.mkdir(parents=True)
    for name, content in (files | {"bundle.json": json.dumps(manifest).encode()}).items():
        (folder / name).write_bytes(content)
    return hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()


def write_key(path: Path) -> Path:
    """Writes a new private key that only its owner can read."""
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


@dataclass
class Registry:
    """A registry with the keys of its people."""

    path: Path
    folder: Path
    keys: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = {name: write_key(self.folder / f"{name[0]}.pem") for name in PEOPLE}

    def policy(self, text: str = POLICY) -> Path:
        """Writes the policy with the people's public keys."""
        people = "\n".join(f'"{name}" = "{public_key_of(key)}"' for name, key in self.keys.items())
        path = self.folder / "policy.toml"
        path.write_text(text.replace("{people}", people))
        return path

    def add(self, seed: int, **options: Any) -> str:
        """Adds a new bundle, and returns its id."""
        write_bundle(self.folder / f"bundle-{seed}", seed)
        return add_bundle(self.path, self.folder / f"bundle-{seed}", PEOPLE[0], **options).bundle_id

    def promote(self, bundle: str, stage: str, *people: str) -> str:
        """Approves a promotion by people (all by default); returns what is still needed."""
        return [promote(self.path, bundle, stage, name, self.keys[name]) for name in people or PEOPLE][-1].missing


@dataclass(frozen=True)
class Answer:
    """A result that a client received.

    Attributes:
      asked_s, recorded_s: when the client asked, and when the service recorded the request; the bundle is chosen in between.
      ended_s: when the prediction ended, which for one from the cache was before.
      bundle_id, weights: the bundle that it names, and the weights that made it.
    """

    prediction_id: str
    asked_s: float
    recorded_s: float
    ended_s: float
    bundle_id: str
    weights: str


@dataclass
class Outcome:
    """What a campaign saw.

    Attributes:
      answers: every result.
      errors: every failed request, prediction or operation.
      operations: promotions and rollbacks that took place, by kind.
      latest_s: the longest time from a rollback to the end of a prediction by the bundle that was withdrawn.
      faults: results that name another bundle than the one that made them, or one that had not to answer.
    """

    answers: list[Answer] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    operations: dict[str, int] = field(default_factory=dict)
    latest_s: float = 0.0
    faults: list[str] = field(default_factory=list)


@contextmanager
def served(service: Any) -> Iterator[tuple[str, Path]]:
    """Answers HTTPS on a free port until the block ends: the address and the certificate."""
    import uvicorn

    from crcjax.serve.app import create_app
    from crcjax.serve.release_watch import ReleaseWatch
    from crcjax.serve.tls import certificate_files

    certificate, key = certificate_files(service.folder / "tls", "127.0.0.1")
    config = uvicorn.Config(
        create_app(service), ssl_certfile=str(certificate), ssl_keyfile=str(key), log_level="warning"
    )
    server, listener = uvicorn.Server(config), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        with ReleaseWatch(service):
            yield f"https://127.0.0.1:{listener.getsockname()[1]}", certificate
    finally:
        server.should_exit = True
        thread.join()
        listener.close()


def run_campaign(
    folder: Path, operations: int, seed: int, clients: int = 4, workers: int = 2, bundles: int = 4
) -> Outcome:
    """Runs a campaign in a new folder; three of five operations are predictions."""
    from crcjax.serve.client import Client
    from crcjax.serve.service import open_service

    registry = Registry(folder / "registry", folder)
    seed_of = {registry.add(1, policy=registry.policy()): 1}
    seed_of |= {registry.add(number): number for number in range(2, bundles + 1)}
    registry.promote("1", "production")
    service = open_service(folder / "state", None, {}, models=registry.path)
    outcome, rng, lock = Outcome(), random.Random(seed), threading.Lock()
    predictions = operations * 3 // 5
    command = [sys.executable, "-c", WORKER, str(service.folder)]
    processes = [subprocess.Popen([*command, f"worker-{number}"]) for number in range(workers)]
    try:
        with served(service) as (url, certificate):
            tokens = [service.accounts.add_service(f"gateway-{number}", "leeds") for number in range(clients)]
            each = [predictions // clients + (number < predictions % clients) for number in range(clients)]
            threads = [
                threading.Thread(
                    target=_predict, args=(Client(url, token, certificate), count, outcome, lock, folder, number)
                )
                for number, (token, count) in enumerate(zip(tokens, each, strict=True))
            ]
            for thread in threads:
                thread.start()
            _operate(registry, operations - predictions, rng, outcome)
            for thread in threads:
                thread.join()
    finally:
        for process in processes:
            process.kill()
            process.wait()
    _check(registry.path, service.folder / "log.jsonl", seed_of, outcome)
    return outcome


def _predict(client: Any, count: int, outcome: Outcome, lock: threading.Lock, folder: Path, number: int) -> None:
    """A gateway that asks for the same eight cases again and again."""
    rng, slides = random.Random(number), []
    with client:
        for case in range(8):
            path = folder / f"slide-{number}-{case}.svs"
            path.write_bytes(TIFF_START + path.name.encode() + bytes(900))
            slides.append(client.upload(path, f"case-{case}")["id"])
        for _ in range(count):
            asked_s = time.time()
            try:
                prediction = client.predict([rng.choice(slides)])
                result = client.wait(prediction["id"], 60.0)
                ended_s = client.prediction(prediction["id"])["ended_s"]
                times = (asked_s, prediction["requested_s"], ended_s)
                answer = Answer(prediction["id"], *times, result["bundle_id"], result["slides"][0]["weights"])
                with lock:
                    outcome.answers.append(answer)
            except CrcjaxError as error:
                with lock:
                    outcome.errors.append(f"prediction: {error}")


def _operate(registry: Registry, count: int, rng: random.Random, outcome: Outcome) -> None:
    """Random promotions and rollbacks; one that the registry refuses, such as a rollback without a predecessor, is replaced."""
    while count:
        kind = rng.choice(("promote", "roll back"))
        stage = rng.choice(("canary", "production", "shadow") if kind == "promote" else ("canary", "production"))
        before = len(read_registry(registry.path).events)
        with suppress(InputError):
            if kind == "promote":
                registry.promote(str(rng.randint(1, len(read_registry(registry.path).versions))), stage)
            else:
                roll_back(registry.path, stage, "campaign", "a random operation")
        if len(read_registry(registry.path).events) > before:
            outcome.operations[kind] = outcome.operations.get(kind, 0) + 1
            count -= 1
            time.sleep(rng.uniform(0, 0.2))


def _check(registry: Path, log: Path, seed_of: dict[str, int], outcome: Outcome) -> None:
    from datetime import datetime

    state = read_registry(registry)
    changes: dict[str, list[tuple[float, bool]]] = {bundle_id: [] for bundle_id in seed_of}
    for event in state.events:
        if event.kind not in (PROMOTED, ROLLED_BACK):
            continue
        at_s = datetime.fromisoformat(event.time).timestamp()
        is_answering = event.kind == PROMOTED and event.facts["alias"] != "shadow"
        changes[event.facts["bundle_id"]].append((at_s, is_answering))
        if event.facts.get("to"):
            changes[event.facts["to"]].append((at_s, True))
    for answer in outcome.answers:
        if answer.bundle_id not in seed_of or answer.weights != f"weights {seed_of[answer.bundle_id]}":
            outcome.faults.append(f"{answer} was not made by the bundle that it names")
            continue
        # The last withdrawal before the result, unless the bundle answered again in between. A result from the cache, which
        # had ended before it was asked for, counts when the request was recorded.
        at_s = max(answer.ended_s, answer.recorded_s)
        last = [change for change in changes[answer.bundle_id] if change[0] <= at_s][-1:]
        if last and not last[0][1]:
            outcome.latest_s = max(outcome.latest_s, at_s - last[0][0])
            if answer.asked_s > last[0][0]:
                outcome.faults.append(f"{answer} was asked for after its bundle was withdrawn")
    for path in (registry / LOG, log):
        if broken := verify(path):
            outcome.faults.append(f"{path.name}: line {broken.line} {broken.reason}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a campaign and records it."""
    from record import Row, record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_campaign(Path(folder), options.operations, options.seed)
    for line in (*outcome.errors[:20], *outcome.faults[:20]):
        print(line, file=sys.stderr)
    rows = [
        Row("predictions, each with its bundle", len(outcome.answers), "results"),
        *(Row(f"{kind}, under load", count, "times") for kind, count in sorted(outcome.operations.items())),
        Row("requests that failed", len(outcome.errors), "requests"),
        Row("results by another bundle than named or in force; broken chains", len(outcome.faults), "faults"),
        Row("from a rollback to the last result of the withdrawn bundle, at most", outcome.latest_s, "s"),
    ]
    record("release", f"python tools/release_campaign.py --operations {options.operations}", rows, ABOUT)
    return 1 if outcome.errors or outcome.faults else 0


ABOUT = (
    "Random promotions, rollbacks and predictions under load: which bundle made each result.\n\n"
    "* The registry, two signatures for each promotion, the HTTPS service, its queue and the watch of the registry are the real ones, with"
    " four clients that repeat 32 cases, so that most requests meet a cache.\n"
    "* Workers are two processes that take 0.05 s a case. Their prediction is the content of the bundle's weights file: the engine is not"
    " measured here.\n"
    "* Target: every result's bundle is known, no request fails, the chains verify, and a rollback takes effect within 2 s."
)


if __name__ == "__main__":
    sys.exit(main())
