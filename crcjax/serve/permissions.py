"""Who may do what: the one table of permissions. Whatever it does not list is denied.

The tests generate the matrix of role, endpoint and site from this table and from the routes of the application.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

# The site of accounts that are not bound to one.
EVERY_SITE = "*"


class Role(StrEnum):
    """The task of an account; the table below lists its permissions."""

    ADMINISTRATOR = "administrator"
    PATHOLOGIST = "pathologist"
    RESEARCHER = "researcher"
    AUDITOR = "auditor"
    SERVICE = "service"


class Action(StrEnum):
    """What an endpoint does."""

    ACCOUNT_MANAGE = "account.manage"
    ACCOUNT_READ = "account.read"
    LOG_READ = "log.read"
    MODEL_READ = "model.read"
    OWN_ACCOUNT = "own_account"
    SLIDE_ADD = "slide.add"
    SLIDE_READ = "slide.read"
    PREDICTION_REQUEST = "prediction.request"
    PREDICTION_URGENT = "prediction.urgent"
    PREDICTION_READ = "prediction.read"
    PREDICTION_CANCEL = "prediction.cancel"
    RESULT_READ = "result.read"
    RESULT_SIGN = "result.sign"


class Reach(StrEnum):
    """The objects that a permission reaches: those of the account's site, or those that the account made there."""

    SITE = "site"
    OWN = "own"


_EVERYONE = {Action.OWN_ACCOUNT: Reach.OWN, Action.MODEL_READ: Reach.SITE}

PERMISSIONS: Mapping[Role, Mapping[Action, Reach]] = {
    # Administrators manage accounts; they see no case and no result.
    Role.ADMINISTRATOR: {**_EVERYONE, Action.ACCOUNT_MANAGE: Reach.SITE, Action.ACCOUNT_READ: Reach.SITE},
    Role.PATHOLOGIST: {
        **_EVERYONE,
        Action.SLIDE_ADD: Reach.SITE,
        Action.SLIDE_READ: Reach.SITE,
        Action.PREDICTION_REQUEST: Reach.SITE,
        Action.PREDICTION_URGENT: Reach.SITE,
        Action.PREDICTION_READ: Reach.SITE,
        Action.PREDICTION_CANCEL: Reach.SITE,
        Action.RESULT_READ: Reach.SITE,
        Action.RESULT_SIGN: Reach.SITE,
    },
    # Researchers work with slides that they added themselves, and have no urgent cases.
    Role.RESEARCHER: {
        **_EVERYONE,
        Action.SLIDE_ADD: Reach.OWN,
        Action.SLIDE_READ: Reach.OWN,
        Action.PREDICTION_REQUEST: Reach.OWN,
        Action.PREDICTION_READ: Reach.OWN,
        Action.PREDICTION_CANCEL: Reach.OWN,
        Action.RESULT_READ: Reach.OWN,
    },
    # Auditors read the log, and who has an account.
    Role.AUDITOR: {**_EVERYONE, Action.LOG_READ: Reach.SITE, Action.ACCOUNT_READ: Reach.SITE},
    # Programs, such as a scanner's gateway.
    Role.SERVICE: {
        **_EVERYONE,
        Action.SLIDE_ADD: Reach.OWN,
        Action.SLIDE_READ: Reach.OWN,
        Action.PREDICTION_REQUEST: Reach.OWN,
        Action.PREDICTION_URGENT: Reach.OWN,
        Action.PREDICTION_READ: Reach.OWN,
        Action.PREDICTION_CANCEL: Reach.OWN,
        Action.RESULT_READ: Reach.OWN,
    },
}


def reach(role: Role, action: Action) -> Reach | None:
    """The objects that a role reaches with an action; None if it may not do it."""
    return PERMISSIONS[role].get(action)


def may_reach(role: Role, action: Action, *, same_site: bool, is_owner: bool) -> bool:
    """Whether a role may apply an action to an object."""
    allowed = reach(role, action)
    return allowed is not None and same_site and (allowed == Reach.SITE or is_owner)
