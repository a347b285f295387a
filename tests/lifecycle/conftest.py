"""Registries of small bundles, and people with keys."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from crcjax.lifecycle.registry import add_bundle, promote
from crcjax.runs.signature import public_key_of

CLASSES = ("canonical", "immune", "stromal")
PEOPLE = ("A. Frost", "B. Winter")
POLICY = """
[people]
{people}
[shadow]
people = 0
[canary]
share = {share}
evidence = {evidence}
[production]
evidence = {evidence}
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
    parts = {
        name: {"files": [file], "optional": False}
        for name, file in zip(("settings", "training_ids", "weights"), files, strict=True)
    }
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
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    return path


@dataclass(frozen=True)
class Made:
    """A registry with the keys of its people."""

    path: Path
    folder: Path
    keys: dict[str, Path]

    def add(self, seed: int, **options) -> str:
        """Adds a bundle, and returns its id."""
        write_bundle(self.folder / f"bundle-{seed}", seed)
        return add_bundle(self.path, self.folder / f"bundle-{seed}", "A. Frost", **options).bundle_id

    def promote(self, bundle: str, stage: str, *people: str) -> str:
        """Approves a promotion by people; returns what is still needed."""
        return [promote(self.path, bundle, stage, name, self.keys[name]) for name in people or PEOPLE][-1].missing

    def evidence(self, bundle_id: str, passed: bool = True, reason: str = "") -> Path:
        """A file of evidence."""
        path = self.folder / f"evidence-{bundle_id[:6]}-{passed}.json"
        path.write_text(json.dumps({"bundle_id": bundle_id, "passed": passed, "reason": reason}))
        return path

    def policy(self, evidence: tuple[str, ...] = (), share: float = 0.5, start: str = "") -> Path:
        people = "\n".join(f'"{name}" = "{public_key_of(key)}"' for name, key in self.keys.items())
        path = self.folder / "policy.toml"
        path.write_text(start + POLICY.format(people=people, evidence=list(evidence), share=share))
        return path


@pytest.fixture
def bundle_writer() -> Callable[..., str]:
    """bundle_writer(folder, seed, target): write_bundle, for tests."""
    return write_bundle


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """The folder of a registry that has nothing yet."""
    keys = {name: write_key(tmp_path / f"{name[0]}.pem") for name in PEOPLE}
    return Made(tmp_path / "registry", tmp_path, keys)


@pytest.fixture
def registry(made: Made) -> Callable[..., Made]:
    """registry(N): a registry of N bundles, the first of which is in production."""

    def make(bundles: int, **policy) -> Made:
        first = made.add(1, policy=made.policy(**policy))
        assert made.promote(first, "production") == ""
        for number in range(2, bundles + 1):
            made.add(number)
        return made

    return make
