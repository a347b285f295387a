"""The parts of the service over one state folder.

STATE/state.db    accounts, slides, uploads,              STATE/uploads/   unfinished uploads
                  predictions, signatures
STATE/queue.db    jobs, unless they are in Redis          STATE/slides/    uploaded slides
STATE/log.jsonl   the hash-chained log                    STATE/results/   heatmaps and attention
STATE/tls/        certificate and key                     STATE/audit.pem  the key of the log's checkpoints; audit.pub
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path

from crcjax.audit.audit_log import AuditLog, AuditOptions
from crcjax.encryption.keys import Keys
from crcjax.errors import InputError, writing
from crcjax.lifecycle.policy import STAGES
from crcjax.lifecycle.releases import Choice, Releases, production_of
from crcjax.runs.signature import make_key_pair
from crcjax.serve import accounts, prediction_records, signatures, slide_records
from crcjax.serve.accounts import Accounts, Session
from crcjax.serve.config import OidcConfig
from crcjax.serve.database import Database
from crcjax.serve.oidc import OidcTokens
from crcjax.serve.open_queue import open_queue
from crcjax.serve.permissions import EVERY_SITE, Role
from crcjax.serve.prediction_records import PredictionRecords
from crcjax.serve.queue import Queue, QueueLimits, QueueStats
from crcjax.serve.rate_limits import Rate, RateLimits
from crcjax.serve.signatures import Signatures
from crcjax.serve.slide_records import SlideRecords
from crcjax.serve.uploads import Uploads
from crcjax.serve.vault import KEYS, Vault

LOG = "log.jsonl"
FIRST_ADMINISTRATOR = "admin"
_STATS_S = 1.0
# A worker that is silent for longer is not counted as alive.
_SILENT_S = 10.0


@dataclass(frozen=True)
class BundleFacts:
    """What the API says of the bundle; the workers check its files when they load it."""

    id: str
    target: str
    classes: tuple[str, ...]
    card: str


@dataclass(frozen=True)
class Service:
    """The parts that the endpoints use. `releases` is None if one bundle predicts everything."""

    folder: Path
    fixed_bundle: BundleFacts | None
    releases: Releases | None
    accounts: Accounts
    slides: SlideRecords
    uploads: Uploads
    vault: Vault
    predictions: PredictionRecords
    signatures: Signatures
    queue: Queue
    log: AuditLog
    rates: RateLimits | None = None
    oidc: OidcTokens | None = None
    _stats: list[tuple[float, QueueStats]] = field(default_factory=list)

    def bundles(self) -> dict[str, BundleFacts]:
        """The bundles that predict, by their alias; a single one is in production."""
        if self.fixed_bundle:
            return {"production": self.fixed_bundle}
        assert self.releases is not None
        state = self.releases.state
        return {alias: bundle_facts(state.folder(state.aliases[alias])) for alias in STAGES if alias in state.aliases}

    @property
    def results(self) -> Path:
        """The folder of the results."""
        return self.folder / "results"

    def session(self, token: str) -> Session:
        """The session of a token of this service, or of the identity provider. Raises SignInError and those of oidc.py."""
        # Tokens of this service have no dot, and JSON Web Tokens two.
        if self.oidc is not None and "." in token:
            return self.oidc.session(token)
        return self.accounts.session(token)

    def stats(self) -> QueueStats:
        """The queue's counts, at most a second old."""
        if not self._stats or time.monotonic() - self._stats[-1][0] > _STATS_S:
            self._stats[:] = [(time.monotonic(), self.queue.stats())]
        return self._stats[-1][1]

    def live_workers(self) -> int:
        """The workers that have loaded the bundle and report."""
        return sum(worker.state in ("ready", "busy") and worker.silent_s < _SILENT_S for worker in self.queue.workers())

    def first_administrator(self) -> tuple[str, str] | None:
        """The name and a new one-time secret of the first administrator; None if there is an administrator."""
        if self.accounts.has_administrator():
            return None
        # Earlier administrators may have been disabled; their names stay taken.
        names = chain((FIRST_ADMINISTRATOR,), (f"{FIRST_ADMINISTRATOR}-{number}" for number in count(2)))
        name = next(name for name in names if self.accounts.account(name) is None)
        return name, self.accounts.invite(name, Role.ADMINISTRATOR, EVERY_SITE)


def forget_results_of_other_bundles(service: Service) -> None:
    """Stops sharing results with later requests when another bundle predicts than at the last start."""
    path, bundle = service.folder / "bundle_id", service.fixed_bundle
    # With a registry, several bundles predict; the key of a result names its bundle.
    if bundle is None or (path.exists() and path.read_text() == bundle.id):
        return
    service.queue.forget_results()
    with writing(path, "choose another --state"):
        path.write_text(bundle.id)


def open_service(
    state: Path,
    bundle: Path | None,
    folders: Mapping[str, Sequence[Path]],
    limits: QueueLimits | None = None,
    redis: str | None = None,
    audit: AuditOptions | None = None,
    keys: Keys | None = None,
    rates: tuple[Rate, Rate] | None = None,
    oidc: OidcConfig | None = None,
    models: Path | None = None,
) -> Service:
    """Opens or creates a state folder.

    Args:
      state: the folder; only its owner can read it.
      bundle: the bundle that predicts everything; None with `models`.
      folders: the folders of each site in which slides may be named by reference.
      limits: the queue's.
      redis: the URL of the Redis server that holds the queue, in place of STATE/queue.db.
      audit: what signs the log's checkpoints, and where they are anchored.
      keys: the site's keys, which encrypt uploads, slides and results; None: they are plain.
      rates: of requests, for every account and for every address that is not signed in; None does not limit them.
      oidc: an identity provider whose tokens sign in.
      models: the registry of models that says which bundle predicts a case.

    Raises:
      InputError: the bundle is none, the registry has none in production, a folder does not exist, Redis is not usable, or a
        newer release wrote the state folder.
      QueueUnavailableError: Redis cannot be reached.
      OutputError: the state folder cannot be written.
    """
    facts, audit = bundle_facts(bundle) if bundle else None, audit or AuditOptions()
    choose, releases = _choice(bundle, facts, models)
    for folder in (folder for of_site in folders.values() for folder in of_site):
        if not folder.is_dir():
            raise InputError(f"--slides {folder}: must be a folder; check the path")
    with writing(state, "choose another --state"):
        state.mkdir(parents=True, exist_ok=True)
        state.chmod(0o700)
        (state / "results").mkdir(exist_ok=True)
    database = Database(state / "state.db", _MIGRATIONS)
    queue = open_queue(state, limits, redis)
    slides = SlideRecords(database, folders)
    vault = Vault(state / KEYS, keys)
    log = AuditLog(state / LOG, audit.key or make_key_pair(state / "audit.pem"), audit.anchors)
    return Service(
        folder=state,
        fixed_bundle=facts,
        releases=releases,
        accounts=Accounts(database),
        slides=slides,
        uploads=Uploads(database, slides, vault, state / "uploads", state / "slides"),
        vault=vault,
        predictions=PredictionRecords(database, queue, choose),
        signatures=Signatures(database, log.append),
        queue=queue,
        log=log,
        rates=RateLimits(state / "rates.db", *rates) if rates else None,
        oidc=OidcTokens(oidc) if oidc else None,
    )


# Version N of the file has the statements of the first N entries; a change of the schema adds an entry.
_MIGRATIONS = (
    (*accounts.MIGRATIONS[0], *slide_records.MIGRATIONS[0], *prediction_records.MIGRATIONS[0]),
    accounts.MIGRATIONS[1],
    signatures.MIGRATIONS[0],
    prediction_records.MIGRATIONS[1],
)


def _choice(
    bundle: Path | None, facts: BundleFacts | None, models: Path | None
) -> tuple[Callable[[str, str], Choice], Releases | None]:
    """The function that chooses a case's bundle, and the registry that it reads."""
    if bundle and facts:
        only = Choice(facts.id, bundle.resolve())
        return lambda site, case_id: only, None
    assert models is not None
    releases = Releases(models.resolve())
    # A registry without a bundle in production is refused at the start, not at the first request.
    production_of(releases.state)
    return releases.choose, releases


def bundle_facts(path: Path) -> BundleFacts:
    """What the API says of a bundle. Raises InputError."""
    try:
        content = (path / "bundle.json").read_bytes()
        target = json.loads(content)["target"]
        card = path / "model_card.md"
        return BundleFacts(
            hashlib.sha256(content).hexdigest(),
            target["name"],
            tuple(target["classes"]),
            card.read_text() if card.exists() else "",
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not a bundle (no readable bundle.json); give the folder that crcjax checkpoints export wrote"
        ) from error
