"""Endpoints of accounts: sign-in, invitations, one-time codes, and who has an account."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, Field

from crcjax.serve.access import COOKIE, Caller, Requires, count_address, not_found, record_details, service_of
from crcjax.serve.accounts import Account, AccountError
from crcjax.serve.permissions import EVERY_SITE, Action, Role

# Endpoints that anybody may call: they check a secret of their own.
public = APIRouter(prefix="/v1", tags=["accounts"], dependencies=[Depends(count_address)])
router = APIRouter(prefix="/v1", tags=["accounts"])

Text = Annotated[str, Field(min_length=1, max_length=256)]


class Redemption(BaseModel):
    """The secret of an invitation, and the password that the new account shall have."""

    secret: Text
    password: Annotated[str, Field(min_length=1, max_length=1024)]


class SignIn(BaseModel):
    """Name, password and, where the account has a second factor, its one-time code."""

    name: Annotated[str, Field(max_length=64, examples=["dr.frost"])]
    password: Annotated[str, Field(max_length=1024)]
    code: Annotated[str, Field(max_length=16, description="the one-time code, if the account has a second factor")] = ""
    cookie: Annotated[bool, Field(description="put the token into a cookie that scripts cannot read, for a page")] = (
        False
    )


class NewAccount(BaseModel):
    """An account to be made."""

    name: Annotated[str, Field(max_length=64, examples=["dr.frost"])]
    role: Role
    site: Annotated[str, Field(max_length=64, examples=["leeds"], description=f"{EVERY_SITE}: every site")]


class Code(BaseModel):
    """A one-time code."""

    code: Annotated[str, Field(max_length=16, examples=["123456"])]


class AccountView(BaseModel):
    """An account."""

    name: str
    role: Role
    site: str
    has_totp: bool
    is_disabled: bool


class SessionView(BaseModel):
    """An open session; `token` is empty if it was put into the cookie."""

    token: str
    csrf: str
    expires_s: float
    account: AccountView


class SecretView(BaseModel):
    """What the new account signs in with: a person redeems the secret, a program uses the token."""

    secret: str = ""
    token: str = ""


def _view(account: Account) -> AccountView:
    return AccountView(**vars(account))


@public.post("/redeem", status_code=201)
def redeem(body: Redemption, request: Request) -> AccountView:
    """Makes the account of an invitation; the first administrator's secret is printed when the service starts."""
    account = service_of(request).accounts.redeem(body.secret, body.password)
    request.state.account = account
    return _view(account)


@public.post("/sign-in")
def sign_in(body: SignIn, request: Request, response: Response) -> SessionView:
    """Opens a session of twelve hours."""
    if service_of(request).accounts.account(body.name) is not None:
        # A name without an account may be a password in the wrong field.
        record_details(request, subject=body.name)
    token, session = service_of(request).accounts.sign_in(body.name, body.password, body.code)
    request.state.account = session.account
    if body.cookie:
        response.set_cookie(COOKIE, token, secure=True, httponly=True, samesite="strict", path="/")
        token = ""
    return SessionView(token=token, csrf=session.csrf, expires_s=session.expires_s, account=_view(session.account))


@router.post("/sign-out", status_code=204)
def sign_out(
    request: Request, response: Response, caller: Annotated[Caller, Depends(Requires(Action.OWN_ACCOUNT))]
) -> None:
    """Ends the session."""
    service_of(request).accounts.sign_out(caller.token)
    response.delete_cookie(COOKIE, secure=True, httponly=True, samesite="strict", path="/")


@router.get("/me")
def me(caller: Annotated[Caller, Depends(Requires(Action.OWN_ACCOUNT))], request: Request) -> SessionView:
    """The caller's account, and the session's second secret for a page that was loaded again."""
    session = service_of(request).session(caller.token)
    return SessionView(token="", csrf=session.csrf, expires_s=session.expires_s, account=_view(session.account))


@router.post("/me/totp")
def begin_totp(request: Request, caller: Annotated[Caller, Depends(Requires(Action.OWN_ACCOUNT))]) -> dict[str, str]:
    """Gives out the secret of a second factor, as the URI that authenticator apps read."""
    return {"uri": service_of(request).accounts.begin_totp(caller.account.name)}


@router.post("/me/totp/confirm", status_code=204)
def confirm_totp(
    body: Code, request: Request, caller: Annotated[Caller, Depends(Requires(Action.OWN_ACCOUNT))]
) -> None:
    """Switches the second factor on, by a first code of it."""
    service_of(request).accounts.confirm_totp(caller.account.name, body.code)


@router.get("/accounts")
def accounts(
    request: Request,
    caller: Annotated[Caller, Depends(Requires(Action.ACCOUNT_READ))],
    after: Annotated[str, Query(max_length=64, description="the last name of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> list[AccountView]:
    """The accounts of the caller's site, by name."""
    return [_view(account) for account in service_of(request).accounts.accounts(caller.site, after, limit)]


@router.post("/accounts", status_code=201)
def add_account(
    body: NewAccount, request: Request, caller: Annotated[Caller, Depends(Requires(Action.ACCOUNT_MANAGE))]
) -> SecretView:
    """Invites a person, or makes the account of a program (role `service`)."""
    if caller.site not in (body.site, EVERY_SITE):
        raise AccountError(f"site must be the administrator's own, {caller.site}, got {body.site!r}")
    known = service_of(request).accounts
    record_details(request, subject=body.name, subject_role=body.role, subject_site=body.site)
    if body.role == Role.SERVICE:
        return SecretView(token=known.add_service(body.name, body.site))
    return SecretView(secret=known.invite(body.name, body.role, body.site))


@router.post("/accounts/{name}/disable", status_code=204)
def disable(name: str, request: Request, caller: Annotated[Caller, Depends(Requires(Action.ACCOUNT_MANAGE))]) -> None:
    """Ends an account's sessions, and lets it sign in no more."""
    account = service_of(request).accounts.account(name)
    if account is None:
        raise not_found()
    caller.check(account.site)
    record_details(request, subject=account.name, subject_role=account.role, subject_site=account.site)
    service_of(request).accounts.disable(name)
