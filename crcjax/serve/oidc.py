"""Sign-in with tokens of an OpenID Connect provider: signatures by its published keys, claims mapped to role and site.

The checks follow RFC 8725 (JSON Web Token Best Current Practices): the algorithm is one of the configured ones and fits the key,
keys come from the provider alone, and issuer, audience and times are required.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping
from typing import Any

import jwt

from crcjax.errors import CrcjaxError
from crcjax.serve.accounts import Account, Session, SignInError
from crcjax.serve.config import OidcConfig
from crcjax.serve.permissions import Role

# Names of local accounts have no colon.
PREFIX = "oidc:"
_KEYS_S = 300.0
# Unknown key ids have the keys fetched again, at most once in this time: anybody can make up key ids.
_REFETCH_S = 30.0
# Keys that could not be fetched for so long verify nothing more: the provider may have withdrawn one.
_LONGEST_S = 3600.0
_TIMEOUT_S = 5.0
# Seconds by which the provider's clock may differ.
_LEEWAY_S = 30.0
_MAX_TOKEN = 16_384
_CLAIMS = ["iss", "aud", "exp", "iat", "sub"]


class ProviderUnavailableError(CrcjaxError):
    """The keys of the identity provider cannot be fetched; the same token may be accepted later."""


class NoRoleError(CrcjaxError):
    """The token is valid, but no rule gives it a role."""


class OidcTokens:
    """Verifies bearer tokens of the provider."""

    def __init__(self, config: OidcConfig):
        self._config = config
        self._lock = threading.Lock()
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._fetched_s = self._tried_s = -math.inf
        self._decoder = jwt.PyJWT(options={"enforce_minimum_key_length": True})

    def session(self, token: str) -> Session:
        """The account of a token. Raises SignInError, NoRoleError, ProviderUnavailableError."""
        claims = self._verified(token)
        subject = claims[self._config.name_claim]
        if not isinstance(subject, str) or not subject or len(subject) > 255:
            raise SignInError(f"the token has no text as {self._config.name_claim}")
        values = claims.get(self._config.role_claim, [])
        values = values if isinstance(values, list) else [values]
        for rule in self._config.roles:
            if rule.value in values:
                account = Account(PREFIX + subject, Role(rule.role), rule.site)
                return Session(account, csrf="", expires_s=float(claims["exp"]))
        raise NoRoleError("the identity provider gives this account no role here; ask its administrator")

    def _verified(self, token: str) -> Mapping[str, Any]:
        if len(token) > _MAX_TOKEN:
            raise SignInError("the token is too long")
        try:
            header = jwt.get_unverified_header(token)
            if "crit" in header or header.get("alg") not in self._config.algorithms:
                raise jwt.InvalidAlgorithmError
            if str(header.get("typ", "JWT")).lower() not in self._config.types:
                raise jwt.InvalidTokenError
            return self._decoder.decode(
                token,
                self._key(header.get("kid"), header["alg"]),
                algorithms=[header["alg"]],
                audience=self._config.audience,
                issuer=self._config.issuer,
                leeway=_LEEWAY_S,
                options={"require": [*_CLAIMS, self._config.name_claim], "strict_aud": False},
            )
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError) as error:
            raise SignInError(
                "the token is not valid, or has expired; sign in again at the identity provider"
            ) from error

    def _key(self, key_id: str | None, algorithm: str) -> jwt.PyJWK:
        """The provider's key of an id. A key that states an algorithm is used for no other."""
        with self._lock:
            now = time.monotonic()
            is_old = now - self._fetched_s > _KEYS_S
            if (is_old or key_id not in self._keys) and now - self._tried_s > _REFETCH_S:
                self._tried_s = now
                fetched = self._fetch()
                if fetched is not None:
                    self._keys, self._fetched_s = fetched, now
            if now - self._fetched_s > _LONGEST_S:
                raise ProviderUnavailableError("the identity provider does not answer; try again")
            # A provider with a single key need not name it.
            is_single = key_id is None and len(self._keys) == 1
            key = next(iter(self._keys.values())) if is_single else self._keys.get(key_id)
        if key is None or key.algorithm_name != algorithm:
            raise jwt.InvalidKeyError
        return key

    def _fetch(self) -> dict[str | None, jwt.PyJWK] | None:
        """The provider's keys by their ids; None while it does not answer."""
        import httpx

        try:
            with httpx.Client(timeout=_TIMEOUT_S) as http:
                url = self._config.jwks_url or self._discovered(http)
                keys = http.get(url).raise_for_status().json()["keys"]
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None
        return {key.get("kid"): loaded for key in keys if (loaded := self._loaded(key)) is not None}

    def _discovered(self, http: Any) -> str:
        document = (
            http.get(f"{self._config.issuer.rstrip('/')}/.well-known/openid-configuration").raise_for_status().json()
        )
        if document["issuer"] != self._config.issuer:
            raise ValueError("another issuer")
        return document["jwks_uri"]

    def _loaded(self, key: Any) -> jwt.PyJWK | None:
        """A public key for signatures; None for another, such as a symmetric one."""
        if not isinstance(key, dict) or key.get("kty") == "oct" or key.get("use", "sig") != "sig":
            return None
        # Some providers leave the algorithm out; the first configured one that fits the key is then its only one.
        for algorithm in [key["alg"]] if "alg" in key else self._config.algorithms:
            try:
                return jwt.PyJWK(key, algorithm)
            except (jwt.PyJWTError, ValueError, TypeError, KeyError):
                continue
        return None
