"""Local accounts: invitations, passwords (Argon2id), one-time codes (TOTP) and sessions.

Only hashes of passwords, invitations and session tokens are stored. An account has one role at one site; an administrator or
auditor may be of every site.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import pyotp
from argon2 import PasswordHasher
from argon2.exceptions import VerificationError

from crcjax.errors import CrcjaxError
from crcjax.serve.database import Database
from crcjax.serve.permissions import EVERY_SITE, Role

MIGRATIONS = (
    (
        """CREATE TABLE accounts (
          name TEXT PRIMARY KEY,
          role TEXT NOT NULL,
          site TEXT NOT NULL,
          password TEXT NOT NULL DEFAULT '',
          totp_secret TEXT NOT NULL DEFAULT '',
          totp_pending TEXT NOT NULL DEFAULT '',
          totp_step INTEGER NOT NULL DEFAULT 0,
          failures INTEGER NOT NULL DEFAULT 0,
          blocked_until_s REAL NOT NULL DEFAULT 0,
          disabled INTEGER NOT NULL DEFAULT 0
        )""",
        """CREATE TABLE invitations (
          secret_sha256 TEXT PRIMARY KEY, name TEXT NOT NULL, role TEXT NOT NULL, site TEXT NOT NULL, expires_s REAL NOT NULL
        )""",
        """CREATE TABLE sessions (
          token_sha256 TEXT PRIMARY KEY,
          name TEXT NOT NULL REFERENCES accounts (name) ON DELETE CASCADE,
          expires_s REAL NOT NULL,
          csrf TEXT NOT NULL
        )""",
    ),
    (
        # By name, whether or not there is such an account: a blocked name does not tell.
        """CREATE TABLE sign_in_failures (
          name TEXT PRIMARY KEY, failures INTEGER NOT NULL, blocked_until_s REAL NOT NULL, last_s REAL NOT NULL
        )""",
        """INSERT INTO sign_in_failures SELECT name, failures, blocked_until_s, blocked_until_s FROM accounts WHERE failures > 0""",
        "ALTER TABLE accounts DROP COLUMN failures",
        "ALTER TABLE accounts DROP COLUMN blocked_until_s",
    ),
)
MIN_PASSWORD = 12
_NAME = re.compile(r"[a-z0-9][a-z0-9._@-]{0,63}")
_SITE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SESSION_S = 12 * 3600.0
_SERVICE_TOKEN_S = 90 * 24 * 3600.0
_INVITATION_S = 72 * 3600.0
# Wrong passwords after which an account waits; the wait doubles with each further one, up to the last figure.
_FREE_FAILURES, _FIRST_BLOCK_S, _LONGEST_BLOCK_S = 5, 30.0, 3600.0
# Failures of a name that was not tried again for so long are forgotten.
_FORGET_FAILURES_S = 24 * 3600.0
_TOTP_STEP_S = 30
# Passwords that are hashed at a time: each takes 64 MiB.
_HASHED_AT_ONCE = 4


class SignInError(CrcjaxError):
    """The name, the password, the code, the secret or the token is not valid. The message does not say which."""


class BlockedError(CrcjaxError):
    """Too many wrong passwords; `retry_after_s` is the time after which the next one is looked at."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"too many wrong passwords; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class AccountError(CrcjaxError):
    """An account cannot be made or changed so."""


@dataclass(frozen=True)
class Account:
    """A person or a program; `site` is EVERY_SITE for one that is not bound to a site."""

    name: str
    role: Role
    site: str
    has_totp: bool = False
    is_disabled: bool = False


@dataclass(frozen=True)
class Session:
    """An account that has signed in; `csrf` must come with each change that a page asks for."""

    account: Account
    csrf: str
    expires_s: float


class Accounts:
    """The accounts in a database.

    Args:
      database: its tables are those of MIGRATIONS.
      hasher: hashes passwords; the defaults of argon2-cffi are those of RFC 9106's second recommendation.
      now: the Unix time in seconds.
    """

    def __init__(self, database: Database, hasher: PasswordHasher | None = None, now: Callable[[], float] = time.time):
        self._database, self._hasher, self._now = database, hasher or PasswordHasher(), now
        self._hashing = threading.BoundedSemaphore(_HASHED_AT_ONCE)
        # Verified for unknown names, so that the time of the reply does not tell whether an account exists.
        self._nobody = self._hasher.hash(secrets.token_urlsafe())

    def has_administrator(self) -> bool:
        """Whether anyone can manage accounts."""
        return self._database.row("SELECT 1 FROM accounts WHERE role = 'administrator' AND NOT disabled") is not None

    def invite(self, name: str, role: Role, site: str) -> str:
        """Returns a secret by which a person makes the account; it works once, within three days.

        Raises AccountError for a name that is taken or not a valid one, or a site that the role cannot have.
        """
        self._check_new(name, role, site)
        secret = secrets.token_urlsafe(24)
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM invitations WHERE name = ? OR expires_s < ?", (name, self._now()))
            connection.execute(
                "INSERT INTO invitations VALUES (?, ?, ?, ?, ?)",
                (_sha256(secret), name, role, site, self._now() + _INVITATION_S),
            )
        return secret

    def redeem(self, secret: str, password: str) -> Account:
        """Makes the account of an invitation. Raises SignInError, AccountError."""
        if len(password) < MIN_PASSWORD:
            raise AccountError(f"the password must have at least {MIN_PASSWORD} characters, got {len(password)}")
        with self._hashing:
            password_hash = self._hasher.hash(password)
        with self._database.transaction() as connection:
            row = connection.execute(
                "DELETE FROM invitations WHERE secret_sha256 = ? AND expires_s > ? RETURNING name, role, site",
                (_sha256(secret), self._now()),
            ).fetchone()
            if row is None:
                raise SignInError("the secret is unknown, was used before, or has expired; ask for a new invitation")
            try:
                connection.execute(
                    "INSERT INTO accounts (name, role, site, password) VALUES (?, ?, ?, ?)", (*row, password_hash)
                )
            except sqlite3.IntegrityError as error:
                raise AccountError(f"name must be new, got {row['name']!r}, which is taken") from error
        return Account(row["name"], Role(row["role"]), row["site"])

    def add_service(self, name: str, site: str) -> str:
        """Makes the account of a program, and returns its token, which lasts 90 days. Raises AccountError."""
        self._check_new(name, Role.SERVICE, site)
        with self._database.transaction() as connection:
            connection.execute("INSERT INTO accounts (name, role, site) VALUES (?, ?, ?)", (name, Role.SERVICE, site))
        return self._open_session(name, _SERVICE_TOKEN_S)[0]

    def _check_new(self, name: str, role: Role, site: str) -> None:
        if not _NAME.fullmatch(name):
            raise AccountError(f"name must be up to 64 of a-z, 0-9 and . _ @ -, got {name!r}")
        if site == EVERY_SITE and role not in (Role.ADMINISTRATOR, Role.AUDITOR):
            raise AccountError(f"site must be one site for a {role}, got {EVERY_SITE}")
        if site != EVERY_SITE and not _SITE.fullmatch(site):
            raise AccountError(f"site must be up to 64 of A-Z, a-z, 0-9 and . _ -, got {site!r}")
        if self.account(name) is not None:
            raise AccountError(f"name must be new, got {name!r}, which is taken")

    def account(self, name: str) -> Account | None:
        """The account of a name."""
        row = self._database.row("SELECT * FROM accounts WHERE name = ?", name)
        return None if row is None else _account(row)

    def accounts(self, site: str, after: str = "", limit: int = 100) -> list[Account]:
        """The accounts of a site, or of all, by name, from the first one behind `after`."""
        rows = self._database.rows(
            "SELECT * FROM accounts WHERE name > ? AND (? = '*' OR site = ?) ORDER BY name LIMIT ?",
            *(after, site, site, limit),
        )
        return [_account(row) for row in rows]

    def disable(self, name: str) -> None:
        """Ends an account's sessions, and lets it sign in no more."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE accounts SET disabled = 1 WHERE name = ?", (name,))
            connection.execute("DELETE FROM sessions WHERE name = ?", (name,))

    def sign_in(self, name: str, password: str, code: str = "") -> tuple[str, Session]:
        """Opens a session, and returns its token. Raises SignInError, BlockedError."""
        self.prove(name, password, code)
        return self._open_session(name, _SESSION_S)

    def prove(self, name: str, password: str, code: str = "") -> None:
        """Checks who somebody is, by password and one-time code. Raises SignInError, BlockedError."""
        blocked = self._database.row("SELECT blocked_until_s FROM sign_in_failures WHERE name = ?", name)
        if blocked is not None and blocked["blocked_until_s"] > self._now():
            raise BlockedError(int(blocked["blocked_until_s"] - self._now()) + 1)
        row = self._database.row("SELECT * FROM accounts WHERE name = ? AND NOT disabled AND password != ''", name)
        is_right = self._is_password(row["password"] if row is not None else self._nobody, password)
        if row is None or not is_right or not self._accepts_code(name, code):
            self._count_failure(name)
            raise SignInError("name, password or one-time code is wrong")
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM sign_in_failures WHERE name = ?", (name,))

    def _is_password(self, password_hash: str, password: str) -> bool:
        with self._hashing:
            try:
                return self._hasher.verify(password_hash, password)
            except VerificationError:
                return False

    def _count_failure(self, name: str) -> None:
        now = self._now()
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM sign_in_failures WHERE last_s < ?", (now - _FORGET_FAILURES_S,))
            failures = connection.execute(
                """INSERT INTO sign_in_failures VALUES (?, 1, 0, ?)
                ON CONFLICT DO UPDATE SET failures = failures + 1, last_s = excluded.last_s RETURNING failures""",
                (name, now),
            ).fetchone()[0]
            if failures >= _FREE_FAILURES:
                block_s = min(_LONGEST_BLOCK_S, _FIRST_BLOCK_S * 2.0 ** min(failures - _FREE_FAILURES, 20))
                connection.execute(
                    "UPDATE sign_in_failures SET blocked_until_s = ? WHERE name = ?", (now + block_s, name)
                )

    def begin_totp(self, name: str) -> str:
        """Returns the otpauth URI of a new secret, which counts once `confirm_totp` was given one of its codes.

        Raises AccountError for an account of an identity provider.
        """
        secret = pyotp.random_base32()
        if self.account(name) is None:
            raise AccountError("the identity provider manages the second factor of this account")
        with self._database.transaction() as connection:
            connection.execute("UPDATE accounts SET totp_pending = ? WHERE name = ?", (secret, name))
        return pyotp.TOTP(secret).provisioning_uri(name=name, issuer_name="crcjax")

    def confirm_totp(self, name: str, code: str) -> None:
        """Requires a code of the new secret at every sign-in from now on. Raises SignInError."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT totp_pending FROM accounts WHERE name = ?", (name,)).fetchone()
            step = self._step_of(row["totp_pending"], code, 0) if row and row["totp_pending"] else None
            if step is None:
                raise SignInError("the code is not of the secret that was given out; check the time of the device")
            connection.execute(
                "UPDATE accounts SET totp_secret = totp_pending, totp_pending = '', totp_step = ? WHERE name = ?",
                (step, name),
            )

    def _accepts_code(self, name: str, code: str) -> bool:
        """Whether the account needs no code, or this is one of the last minute that was not used before."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT totp_secret, totp_step FROM accounts WHERE name = ?", (name,)).fetchone()
            if not row["totp_secret"]:
                return True
            step = self._step_of(row["totp_secret"], code, row["totp_step"])
            if step is not None:
                connection.execute("UPDATE accounts SET totp_step = ? WHERE name = ?", (step, name))
            return step is not None

    def _step_of(self, secret: str, code: str, after: int) -> int | None:
        """The time step (30 s) of a code, at most one before or behind now and later than `after`; None if it is of none."""
        totp, now = pyotp.TOTP(secret), int(self._now()) // _TOTP_STEP_S
        for step in (now - 1, now, now + 1):
            if step > after and hmac.compare_digest(totp.at(step * _TOTP_STEP_S).encode(), code.encode()):
                return step
        return None

    def _open_session(self, name: str, lifetime_s: float) -> tuple[str, Session]:
        token, csrf, expires_s = secrets.token_urlsafe(32), secrets.token_urlsafe(32), self._now() + lifetime_s
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE expires_s < ?", (self._now(),))
            connection.execute("INSERT INTO sessions VALUES (?, ?, ?, ?)", (_sha256(token), name, expires_s, csrf))
        account = self.account(name)
        assert account is not None
        return token, Session(account, csrf, expires_s)

    def session(self, token: str) -> Session:
        """The session of a token. Raises SignInError."""
        row = self._database.row(
            """SELECT * FROM sessions JOIN accounts USING (name) WHERE token_sha256 = ? AND expires_s > ? AND NOT disabled""",
            *(_sha256(token), self._now()),
        )
        if row is None:
            raise SignInError("the token is not valid, or has expired; sign in again")
        return Session(_account(row), row["csrf"], row["expires_s"])

    def sign_out(self, token: str) -> None:
        """Ends a session."""
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM sessions WHERE token_sha256 = ?", (_sha256(token),))


def _account(row: sqlite3.Row) -> Account:
    return Account(row["name"], Role(row["role"]), row["site"], bool(row["totp_secret"]), bool(row["disabled"]))


def _sha256(secret: str) -> str:
    # Secrets of 24 random bytes and more need no slow hash.
    return hashlib.sha256(secret.encode()).hexdigest()
