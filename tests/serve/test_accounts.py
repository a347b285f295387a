"""Accounts: secrets work once, passwords and codes are needed, and guessing is slow."""

from pathlib import Path

import pyotp
import pytest
from argon2 import PasswordHasher

from crcjax.serve.accounts import MIGRATIONS, AccountError, Accounts, BlockedError, SignInError
from crcjax.serve.database import Database
from crcjax.serve.permissions import EVERY_SITE, PERMISSIONS, Action, Reach, Role, may_reach

PASSWORD = "correct horse battery"


class Time:
    """A clock that a test sets."""

    now_s = 1_000_000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def time_() -> Time:
    return Time()


@pytest.fixture
def accounts(tmp_path: Path, time_: Time) -> Accounts:
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    return Accounts(Database(tmp_path / "state.db", MIGRATIONS), hasher, time_)


def _add(accounts: Accounts, name: str = "dr.frost") -> None:
    accounts.redeem(accounts.invite(name, Role.PATHOLOGIST, "leeds"), PASSWORD)


def test_an_invitation_works_once_and_for_three_days(accounts: Accounts, time_: Time) -> None:
    replaced = accounts.invite("dr.frost", Role.PATHOLOGIST, "leeds")
    secret = accounts.invite("dr.frost", Role.PATHOLOGIST, "leeds")
    with pytest.raises(SignInError):
        accounts.redeem(replaced, PASSWORD)
    account = accounts.redeem(secret, PASSWORD)
    assert (account.name, account.role, account.site) == ("dr.frost", Role.PATHOLOGIST, "leeds")
    with pytest.raises(SignInError, match="used before"):
        accounts.redeem(secret, PASSWORD)
    late = accounts.invite("dr.late", Role.PATHOLOGIST, "leeds")
    time_.now_s += 73 * 3600
    with pytest.raises(SignInError, match="expired"):
        accounts.redeem(late, PASSWORD)


@pytest.mark.parametrize(
    ("name", "role", "site", "words"),
    [
        ("Dr Frost", Role.PATHOLOGIST, "leeds", "name must be up to 64"),
        ("a", Role.PATHOLOGIST, EVERY_SITE, "site must be one site for a pathologist"),
        ("a", Role.PATHOLOGIST, "../leeds", "site must be up to 64"),
        ("dr.frost", Role.AUDITOR, "leeds", "which is taken"),
    ],
)
def test_a_name_or_site_that_cannot_be_is_refused(
    name: str, role: Role, site: str, words: str, accounts: Accounts
) -> None:
    _add(accounts)
    with pytest.raises(AccountError, match=words):
        accounts.invite(name, role, site)


def test_a_session_ends_after_twelve_hours_and_by_signing_out_or_disabling(accounts: Accounts, time_: Time) -> None:
    _add(accounts)
    token, session = accounts.sign_in("dr.frost", PASSWORD)
    assert accounts.session(token) == session
    time_.now_s += 12 * 3600 + 1
    with pytest.raises(SignInError):
        accounts.session(token)
    for end in (accounts.sign_out, lambda token: accounts.disable("dr.frost")):
        token, _ = accounts.sign_in("dr.frost", PASSWORD)
        end(token)
        with pytest.raises(SignInError):
            accounts.session(token)
    with pytest.raises(SignInError):
        accounts.sign_in("dr.frost", PASSWORD)


def test_wrong_passwords_have_the_next_ones_wait_longer_and_longer(accounts: Accounts, time_: Time) -> None:
    _add(accounts)
    for _ in range(5):
        with pytest.raises(SignInError):
            accounts.sign_in("dr.frost", "wrong")
    for wait_s in (30, 60, 120):
        with pytest.raises(BlockedError) as caught:
            accounts.sign_in("dr.frost", PASSWORD)
        assert caught.value.retry_after_s == wait_s + 1
        time_.now_s += wait_s + 1
        with pytest.raises(SignInError):
            accounts.sign_in("dr.frost", "wrong")
    time_.now_s += 3600
    accounts.sign_in("dr.frost", PASSWORD)
    with pytest.raises(SignInError):
        accounts.sign_in("dr.frost", "wrong")
    accounts.sign_in("dr.frost", PASSWORD)
    with pytest.raises(SignInError):
        accounts.sign_in("nobody", PASSWORD)


def test_a_name_without_an_account_answers_as_one_with_an_account_does(accounts: Accounts, time_: Time) -> None:
    _add(accounts)
    answers: dict[str, list[str]] = {}
    for name in ("dr.frost", "nobody"):
        answers[name] = []
        for _ in range(8):
            with pytest.raises((SignInError, BlockedError)) as caught:
                accounts.sign_in(name, "wrong")
            answers[name].append(str(caught.value))
    assert answers["dr.frost"] == answers["nobody"]
    assert "too many wrong passwords" in answers["nobody"][-1]


def test_the_first_releases_accounts_open_and_blocked_ones_stay_blocked(tmp_path: Path, time_: Time) -> None:
    database = Database(tmp_path / "state.db", MIGRATIONS[:1])
    hasher = PasswordHasher(time_cost=1, memory_cost=64, parallelism=1)
    with database.transaction() as connection:
        for name, failures, blocked_until_s in (("dr.frost", 5, time_.now_s + 30), ("dr.snow", 0, 0)):
            connection.execute(
                "INSERT INTO accounts (name, role, site, password, failures, blocked_until_s) VALUES (?, ?, ?, ?, ?, ?)",
                (name, "pathologist", "leeds", hasher.hash(PASSWORD), failures, blocked_until_s),
            )
    database.close()
    accounts = Accounts(Database(tmp_path / "state.db", MIGRATIONS), hasher, time_)
    accounts.sign_in("dr.snow", PASSWORD)
    with pytest.raises(BlockedError):
        accounts.sign_in("dr.frost", PASSWORD)


def test_a_code_counts_once_and_a_new_secret_does_not_weaken_the_old_one(accounts: Accounts, time_: Time) -> None:
    _add(accounts)
    totp = pyotp.parse_uri(accounts.begin_totp("dr.frost"))
    assert isinstance(totp, pyotp.TOTP)
    accounts.sign_in("dr.frost", PASSWORD)
    accounts.confirm_totp("dr.frost", totp.at(time_()))
    for code in ("", "000000", "é", totp.at(time_())):
        with pytest.raises(SignInError):
            accounts.sign_in("dr.frost", PASSWORD, code)
    time_.now_s += 30
    accounts.sign_in("dr.frost", PASSWORD, totp.at(time_()))
    accounts.begin_totp("dr.frost")
    with pytest.raises(SignInError):
        accounts.sign_in("dr.frost", PASSWORD)


def test_the_file_holds_no_password_token_or_invitation(accounts: Accounts, tmp_path: Path) -> None:
    _add(accounts)
    token, _ = accounts.sign_in("dr.frost", PASSWORD)
    secrets = [PASSWORD, token, accounts.invite("b", Role.AUDITOR, "leeds"), accounts.add_service("gateway", "leeds")]
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert not [secret for secret in secrets if secret.encode() in content]


def test_the_table_denies_what_it_does_not_list() -> None:
    assert set(PERMISSIONS) == set(Role)
    clinical = {Action.SLIDE_READ, Action.RESULT_READ, Action.PREDICTION_READ, Action.PREDICTION_REQUEST}
    for role in (Role.ADMINISTRATOR, Role.AUDITOR):
        assert not clinical & set(PERMISSIONS[role])
    for role in Role:
        for action in Action:
            assert not may_reach(role, action, same_site=False, is_owner=True)
            reaches_others = may_reach(role, action, same_site=True, is_owner=False)
            assert reaches_others == (PERMISSIONS[role].get(action) == Reach.SITE)
