"""The configuration of the service: the options of `crcjax serve`, from its command line and from a TOML file.

Every field states its meaning and unit here. Paths in the file are relative to its folder.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from crcjax.audit.audit_log import AuditOptions
from crcjax.errors import InputError
from crcjax.serve.permissions import EVERY_SITE, Role
from crcjax.serve.queue import QueueLimits
from crcjax.serve.rate_limits import Rate

SiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
# Asymmetric ones alone: with a symmetric one, whoever can verify a token can also make one.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
# Keys that come over plain HTTP could be exchanged on the way.
SecureUrl = Annotated[str, Field(pattern=r"^(https://|http://(localhost|127\.0\.0\.1)(:|/|$))")]


class _Part(BaseModel):
    """A part of the configuration; unknown fields are mistakes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RateLimitConfig(_Part):
    """How often the service is asked before it answers 429.

    Attributes:
      account_per_s, account_burst: requests a second of an account, and how many may come at once.
      address_per_s, address_burst: the same of an address with a wrong password or token, or without one.
    """

    account_per_s: Positive = 200.0
    account_burst: Count = 1000
    address_per_s: Positive = 5.0
    address_burst: Count = 50


class RoleRule(_Part):
    """Gives tokens whose role claim is, or contains, `value` a role at a site; `site` "*" is every site."""

    value: str
    role: Role
    site: Annotated[str, Field(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,63})$")]

    @model_validator(mode="after")
    def _is_bound_to_a_site(self) -> RoleRule:
        if self.site == EVERY_SITE and self.role not in (Role.ADMINISTRATOR, Role.AUDITOR):
            raise ValueError(f"site must be one site for a {self.role}, got {EVERY_SITE}")
        return self


class OidcConfig(_Part):
    """An OpenID Connect provider whose tokens sign in.

    Attributes:
      issuer: the `iss` of its tokens; its keys are found through ISSUER/.well-known/openid-configuration.
      audience: the `aud` of tokens for this service.
      jwks_url: where its keys are, in place of discovery.
      algorithms: signature algorithms that are accepted.
      types: values of the header `typ` that are accepted, in lower case.
      name_claim: the claim that names the account for good.
      role_claim: the claim that the rules look at.
      roles: the rules; the first that applies counts, and without one there is no access.
    """

    issuer: SecureUrl
    audience: Annotated[str, Field(min_length=1)]
    jwks_url: SecureUrl | None = None
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = ["RS256", "ES256"]
    types: list[str] = ["jwt", "at+jwt"]
    name_claim: str = "sub"
    role_claim: str = "groups"
    roles: Annotated[list[RoleRule], Field(min_length=1)]


class ServeConfig(_Part):
    """The whole configuration.

    Attributes:
      state: the folder of everything that the service keeps.
      bundle: the bundle that predicts.
      models: in place of a bundle, the registry of models that says which bundle predicts a case.
      host, port: where it listens; port 0 is any free one.
      workers: worker processes; each loads the bundle.
      replicas: processes that answer HTTP.
      slides: for each site, the folders in which it may name slides by path.
      trust: public keys, one of which must have signed the bundle.
      encoder_weights: the file of a published encoder's weights.
      certificate, key: PEM files of a certificate of your own.
      viewer: the script of the page's zooming viewer; by default where `crcjax install-viewer` put it for this user.
      threads: threads of each worker that decode tiles; by default one per core.
      max_queued: cases that may wait; further requests are answered 429.
      ageing_h: hours after which a waiting case gets every second turn, even before urgent ones.
      drain_s: seconds that running cases get when the service stops.
      redis: the URL of the Redis server that holds the queue, such as redis://HOST:6379/0; by default a file in `state` does.
      audit_key: the private key that signs the log's checkpoints, a PEM file; by default STATE/audit.pem.
      audit_anchor: files on other systems that get a copy of every checkpoint.
      keys: where the keys are that encrypt slides and results: file:PATH, env:NAME or command:PROGRAM.
      encrypted_volume: states that the disk of `state`, and swap, are encrypted below this machine, where it cannot be seen.
      rate_limit: how often the service is asked before it answers 429; only in the file.
      oidc: an OpenID Connect provider whose tokens sign in; only in the file.
    """

    state: Path
    bundle: Path | None = None
    models: Path | None = None
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8443
    workers: Count = 1
    replicas: Count = 1
    slides: dict[SiteName, list[Path]] = {}
    trust: list[Path] = []
    encoder_weights: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    viewer: Path | None = None
    threads: Count | None = None
    max_queued: Count = QueueLimits.max_queued
    ageing_h: Annotated[float, Field(ge=0)] = QueueLimits.ageing_s / 3600
    drain_s: Annotated[float, Field(ge=0)] = 30.0
    redis: str | None = None
    audit_key: Path | None = None
    audit_anchor: list[Path] = []
    keys: str | None = None
    encrypted_volume: bool = False
    rate_limit: RateLimitConfig = RateLimitConfig()
    oidc: OidcConfig | None = None

    @model_validator(mode="after")
    def _has_both_or_neither(self) -> ServeConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key must be given together, or neither")
        return self

    @model_validator(mode="after")
    def _has_one_source_of_models(self) -> ServeConfig:
        if (self.bundle is None) == (self.models is None):
            raise ValueError("bundle or models must be given, and not both: a bundle, or a registry of models")
        return self

    @property
    def limits(self) -> QueueLimits:
        """The limits of the queue."""
        return QueueLimits(max_queued=self.max_queued, ageing_s=3600 * self.ageing_h)

    @property
    def audit(self) -> AuditOptions:
        """The key and the anchors of the log."""
        return AuditOptions(self.audit_key, tuple(self.audit_anchor))

    @property
    def rates(self) -> tuple[Rate, Rate]:
        """The rates of requests of an account, and of an address that is not signed in."""
        limit = self.rate_limit
        return Rate(limit.account_per_s, limit.account_burst), Rate(limit.address_per_s, limit.address_burst)


# Fields that hold paths, which are relative to the folder of the file that names them.
_PATHS = ("state", "bundle", "models", "encoder_weights", "certificate", "key", "viewer", "audit_key", "audit_anchor")


def read_config(path: Path | None, options: Mapping[str, Any]) -> ServeConfig:
    """The configuration of a file, of options of the command line, or of both; options replace fields of the file.

    Raises InputError with a line for each mistake.
    """
    values = {} if path is None else _located(_read(path), path.absolute().parent)
    try:
        return ServeConfig.model_validate(values | dict(options))
    except ValidationError as error:
        mistakes = [_mistake(details, set(options), path is not None) for details in error.errors()]
    place = "" if path is None else f"{path}: "
    if len(mistakes) == 1:
        raise InputError(place + mistakes[0])
    raise InputError(f"{place}{len(mistakes)} mistakes:\n" + "\n".join(f"  {mistake}" for mistake in mistakes))


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); give the TOML file of the service") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path}: is not TOML ({error}); correct it") from error


def _located(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The values of a file with absolute paths; values of a wrong type stay as they are."""

    def located(value: Any) -> Any:
        if isinstance(value, list):
            return [located(item) for item in value]
        return str(folder / value) if isinstance(value, str) else value

    located_values = {name: located(value) if name in (*_PATHS, "trust") else value for name, value in values.items()}
    if isinstance(values.get("slides"), dict):
        located_values["slides"] = {site: located(folders) for site, folders in values["slides"].items()}
    return located_values


def _mistake(details: Any, options: set[str], has_file: bool) -> str:
    """One line for a mistake that pydantic reports: the option or field, what was expected, and what was given."""
    place, kind, value = details["loc"], details["type"], details["input"]
    name = ".".join(map(str, place))
    field = f"--{name.replace('_', '-')}" if not has_file or (place and place[0] in options) else name
    if kind == "missing":
        return f"{field} is missing; {'give it' if field.startswith('--') else 'add it, or give it as an option'}"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), ServeConfig.model_fields, 1)
        known = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(ServeConfig.model_fields)}"
        return f"{field} is no field of the service; {known}"
    if kind == "value_error":
        return f"{field}: {details['ctx']['error']}" if place else str(details["ctx"]["error"])
    return f"{field} must be {details['msg'].removeprefix('Input should be ')}, got {value!r}"
