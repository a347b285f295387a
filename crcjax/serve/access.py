"""Who is calling, and whether the table of permissions lets them."""

# No postponed annotations: FastAPI reads those of `Requires.__call__`.

import hmac
from dataclasses import dataclass

from fastapi import HTTPException, Request

from crcjax.serve.accounts import Account, Session, SignInError
from crcjax.serve.permissions import EVERY_SITE, Action, Reach, may_reach, reach
from crcjax.serve.service import Service

# The prefix has browsers accept the cookie only over HTTPS, from this host, for all of its paths.
COOKIE = "__Host-crcjax"
CSRF_HEADER = "X-CSRF-Token"
_CHANGES_NOTHING = ("GET", "HEAD", "OPTIONS")


@dataclass(frozen=True)
class Caller:
    """An account that may do what it asks for, on the objects within its reach."""

    account: Account
    action: Action
    token: str

    @property
    def site(self) -> str:
        """The caller's site."""
        return self.account.site

    @property
    def reaches_own_only(self) -> bool:
        """Whether the permission ends at the objects that the caller made."""
        return reach(self.account.role, self.action) == Reach.OWN

    def check(self, site: str, owner: str | None = None) -> None:
        """Answers 404 for an object that is not within reach: the caller does not learn whether it exists."""
        same_site = self.site in (site, EVERY_SITE)
        is_owner = owner == self.account.name
        if not may_reach(self.account.role, self.action, same_site=same_site, is_owner=is_owner):
            raise not_found()


class Requires:
    """The dependency of an endpoint: signed in, and permitted the action."""

    def __init__(self, action: Action):
        self.action = action

    def __call__(self, request: Request) -> Caller:
        """Answers 401 without a valid token, 403 without the permission."""
        session, token = signed_in(request)
        request.state.account = session.account
        rates = service_of(request).rates
        if rates is not None:
            rates.count_account(session.account.name)
        if reach(session.account.role, self.action) is None:
            raise HTTPException(403, f"the role {session.account.role} may not do this ({self.action})")
        return Caller(session.account, self.action, token)


def not_found() -> HTTPException:
    """The answer for what does not exist or is not within reach."""
    return HTTPException(404, "there is no such object, or it is not within reach of this account")


def record_details(request: Request, **facts: str) -> None:
    """Adds facts to the request's entry in the log. They must name no patient."""
    request.state.details = facts


def service_of(request: Request) -> Service:
    """The service that the application belongs to."""
    return request.app.state.service


def count_address(request: Request) -> None:
    """Counts a request of an address that is not signed in. Raises TooManyRequestsError."""
    rates = service_of(request).rates
    if rates is not None and request.client is not None:
        rates.count_address(request.client.host)


def signed_in(request: Request) -> tuple[Session, str]:
    """The session of the request's bearer token or cookie, and the token. Raises SignInError, TooManyRequestsError."""
    try:
        return _session(request)
    except SignInError:
        count_address(request)
        raise


def _session(request: Request) -> tuple[Session, str]:
    service = service_of(request)
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return service.session(token.strip()), token.strip()
    cookie = request.cookies.get(COOKIE)
    if not cookie:
        raise SignInError("sign in first: POST /v1/sign-in, then Authorization: Bearer TOKEN")
    session = service.accounts.session(cookie)
    # Another site's page can have the browser send the cookie, but cannot read the session's second secret.
    csrf = request.headers.get(CSRF_HEADER.lower(), "")
    if request.method not in _CHANGES_NOTHING and not hmac.compare_digest(csrf.encode(), session.csrf.encode()):
        raise HTTPException(403, f"{CSRF_HEADER} must be the value that sign-in gave")
    return session, cookie
