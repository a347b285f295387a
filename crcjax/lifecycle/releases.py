"""Which bundle predicts a case: production, or the canary for a share of the cases; and which one is its shadow."""

from __future__ import annotations

import hmac
import threading
from dataclasses import dataclass
from pathlib import Path

from crcjax.errors import InputError
from crcjax.lifecycle.registry_state import CANARY_KEY, LOG, RegistryState, read_registry
from crcjax.monitor.logs import log


@dataclass(frozen=True)
class Choice:
    """The bundle that answers for a case, its folder, and the bundle that predicts it as a shadow (None: no shadow)."""

    bundle_id: str
    folder: Path
    shadow_id: str | None = None


def choose(state: RegistryState, key: bytes, site: str, case_id: str) -> Choice:
    """The bundle for a case.

    A case is of the canary if a keyed hash of the canary's id, the site and the case falls into the policy's share. All
    slides and repeated requests of a case therefore have the same bundle, each canary has cases of its own, and a larger
    share adds cases without removing any. Nobody without the key can choose cases for it.

    Args:
      state: the registry.
      key: REGISTRY/canary.key.
      site, case_id: the case.

    Raises:
      InputError: no bundle is in production.
    """
    bundle_id = production_of(state).name
    canary, rule = state.aliases.get("canary"), state.policy.canary
    if canary and (not rule.sites or site in rule.sites) and _fraction(key, canary, site, case_id) < rule.share:
        bundle_id = canary
    return Choice(bundle_id, state.folder(bundle_id), state.aliases.get("shadow"))


def production_of(state: RegistryState) -> Path:
    """The folder of the bundle in production. Raises InputError if there is none."""
    if "production" not in state.aliases:
        raise InputError(
            f"{state.path}: no bundle is in production; promote one with crcjax models promote --to production"
        )
    return state.folder(state.aliases["production"])


def _fraction(key: bytes, bundle_id: str, site: str, case_id: str) -> float:
    """A number in [0, 1) that depends on the case alone."""
    digest = hmac.digest(key, "\0".join((bundle_id, site, case_id)).encode(), "sha256")
    return int.from_bytes(digest[:8]) / 2**64


class Releases:
    """A registry as a service sees it: read again when its log changes.

    A registry that became unreadable keeps its last state, and the log of the process has an error.
    """

    def __init__(self, registry: Path):
        self.path = registry
        self._lock = threading.Lock()
        self._stamp = self._log_stamp()
        self._state = read_registry(registry)
        self._key = (registry / CANARY_KEY).read_bytes()

    @property
    def state(self) -> RegistryState:
        """The registry as it is now."""
        with self._lock:
            stamp = self._log_stamp()
            if stamp != self._stamp:
                try:
                    self._state = read_registry(self.path)
                except (InputError, OSError) as error:
                    log.error(f"the registry cannot be read, and its last state stays in force: {error}")
                self._stamp = stamp
            return self._state

    @property
    def production(self) -> Path:
        """The folder of the bundle in production. Raises InputError if there is none."""
        return production_of(self.state)

    def choose(self, site: str, case_id: str) -> Choice:
        """The bundle for a case. Raises InputError if no bundle is in production."""
        return choose(self.state, self._key, site, case_id)

    def _log_stamp(self) -> tuple[int, int]:
        try:
            status = (self.path / LOG).stat()
        except OSError:
            return (0, 0)
        return (status.st_mtime_ns, status.st_size)
