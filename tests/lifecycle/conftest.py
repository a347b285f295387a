"""Registries of small bundles, and people with keys."""

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tool() -> Callable[[str], ModuleType]:
    """tool(name): a module of tools/."""
    return _load


@pytest.fixture(scope="session")
def campaign(tool: Callable[[str], ModuleType]) -> ModuleType:
    """tools/release_campaign.py, whose registries the tests use too."""
    return tool("release_campaign")


@pytest.fixture
def made(tmp_path: Path, campaign: ModuleType):
    """The folder of a registry that has nothing yet, and people with keys."""
    return campaign.Registry(tmp_path / "registry", tmp_path)


@pytest.fixture
def write_policy(made) -> Callable[..., Path]:
    """write_policy(evidence, share, start): the policy of the registry `made`."""

    def write(evidence: tuple[str, ...] = (), share: float = 0.5, start: str = "") -> Path:
        stages = (f"[canary]\nshare = {share}\n", "[production]\n")
        text = "".join(f"{stage}evidence = {list(evidence)}\n" for stage in stages)
        return made.policy(start + "[people]\n{people}\n[shadow]\npeople = 0\n" + text)

    return write


@pytest.fixture
def registry(made, write_policy: Callable[..., Path]) -> Callable:
    """registry(N): a registry of N bundles, the first of which is in production."""

    def make(bundles: int, **policy):
        first = made.add(1, policy=write_policy(**policy))
        assert made.promote(first, "production") == ""
        for number in range(2, bundles + 1):
            made.add(number)
        return made

    return make


@pytest.fixture
def write_evidence(tmp_path: Path) -> Callable[..., Path]:
    """write_evidence(bundle_id, passed, reason): a file of evidence."""

    def write(bundle_id: str, passed: bool = True, reason: str = "") -> Path:
        path = tmp_path / f"evidence-{bundle_id[:6]}-{passed}.json"
        path.write_text(json.dumps({"bundle_id": bundle_id, "passed": passed, "reason": reason}))
        return path

    return write
