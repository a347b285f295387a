"""The policy of a model registry: who approves a promotion, which evidence it needs, and what is locked."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from crcjax.errors import InputError

# The stages that a bundle is promoted to, in this order. `candidate`, the alias before them, is the bundle added last.
STAGES = ("shadow", "canary", "production")
Share = Annotated[float, Field(ge=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Shadow(_Table):
    """What promotion to shadow needs: a shadow's predictions reach no user, so it may need nobody."""

    people: Annotated[int, Field(ge=0)] = 1
    evidence: tuple[str, ...] = ()


class Canary(_Table):
    """What promotion to canary needs, the share of cases that it gets, and the sites it is for (none named: all)."""

    people: Annotated[int, Field(ge=2)] = 2
    evidence: tuple[str, ...] = ("validation",)
    share: Share = 0.1
    sites: tuple[str, ...] = ()


class Production(_Table):
    """What promotion to production needs."""

    people: Annotated[int, Field(ge=2)] = 2
    evidence: tuple[str, ...] = ("validation",)


class Policy(_Table):
    """A policy.

    Attributes:
      locked: whether nothing is promoted, as in a trial of one fixed model. Rollbacks stay possible.
      people: who may approve: names with their Ed25519 public keys (hexadecimal digits).
    """

    locked: bool = False
    people: dict[str, Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = {}
    shadow: Shadow = Shadow()
    canary: Canary = Canary()
    production: Production = Production()

    def stage(self, name: str) -> Shadow | Canary | Production:
        """What promotion to a stage needs."""
        stages: dict[str, Shadow | Canary | Production] = {
            "shadow": self.shadow,
            "canary": self.canary,
            "production": self.production,
        }
        return stages[name]


def parse_policy(text: str, source: str | Path) -> Policy:
    """A policy from TOML; `source` is the file that the message names. Raises InputError."""
    try:
        policy = Policy.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{source}: is not TOML ({error}); correct the line") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{source}: {place}: {first['msg']}, got {first['input']!r}; see docs/lifecycle.md for the fields"
        ) from error
    if len(set(policy.people.values())) < len(policy.people):
        raise InputError(f"{source}: people must have different keys, got one key twice; give each person a key")
    return policy


def read_policy(path: Path) -> tuple[str, Policy]:
    """The text of a policy file, and the policy. Raises InputError."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a policy in TOML") from error
    return text, parse_policy(text, path)


def policy_sha256(text: str) -> str:
    """The hash that names a policy."""
    return hashlib.sha256(text.encode()).hexdigest()
