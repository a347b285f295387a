"""Signatures of results: what is signed, who may sign, and that nothing is overwritten."""

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyotp
import pytest

from crcjax.errors import OutputError
from crcjax.monitor.event_log import read_events
from crcjax.serve import accounts
from crcjax.serve.client import Client, ServiceError
from crcjax.serve.database import Database
from crcjax.serve.permissions import Role
from crcjax.serve.service import _MIGRATIONS, LOG
from crcjax.serve.signatures import MIGRATIONS

PASSWORD = "correct horse battery"
PredictCase = Callable[..., Any]


@pytest.fixture
def codes(server, pathologist: Client) -> Callable[[], str]:
    """codes(): the next one-time code of dr.frost; the service's clock goes on by the 30 s of a code."""
    now = time.time()
    object.__setattr__(server.service.accounts, "_now", lambda: now)
    totp = pyotp.TOTP(pyotp.parse_uri(server.service.accounts.begin_totp("dr.frost")).secret)

    def code() -> str:
        nonlocal now
        now += accounts._TOTP_STEP_S
        return totp.at(now)

    server.service.accounts.confirm_totp("dr.frost", code())
    return code


def test_a_result_is_signed_corrected_and_shown_with_all_its_versions(
    server, pathologist: Client, predict_case: PredictCase, codes: Callable[[], str]
) -> None:
    case = predict_case(pathologist, slides=2)
    assert pathologist.prediction(case.prediction)["signed"] is None
    first = pathologist.sign(case.prediction, PASSWORD, codes())
    assert (first["version"], first["meaning"], first["signer"]) == (1, "agree", "dr.frost")
    assert first["calls"] == ["immune", "immune"]
    assert "agree with the predicted class" in first["statement"]
    assert first["signed_s"] == pytest.approx(time.time(), abs=60)
    result = pathologist.result(case.prediction)
    assert first["result_sha256"] == result["sha256"]

    with pytest.raises(ServiceError, match="422: reason must be given for a correction"):
        pathologist.sign(case.prediction, PASSWORD, codes())
    with pytest.raises(ServiceError, match="422: reason must be given for another call"):
        pathologist.sign(case.prediction, PASSWORD, codes(), call="canonical")
    with pytest.raises(ServiceError, match="422: call must be one of canonical, immune, not evaluable"):
        pathologist.sign(case.prediction, PASSWORD, codes(), call="stromal", reason="glands")
    second = pathologist.sign(case.prediction, PASSWORD, codes(), call="canonical", reason="glands")
    assert (second["version"], second["calls"], second["previous_sha256"]) == (2, ["canonical"], first["sha256"])

    history = pathologist.signatures(case.prediction)
    assert history["is_intact"]
    assert history["versions"] == [first, second], "the first version stays as it was"
    [listed] = pathologist.predictions()
    assert listed["signed"] == {name: second[name] for name in ("version", "meaning", "calls", "signer", "signed_s")}
    events = [event.facts for event in read_events(server.service.folder / LOG) if event.kind == "signature"]
    assert [facts["sha256"] for facts in events] == [first["sha256"], second["sha256"]]
    assert "glands" not in json.dumps(events), "a log forgets nothing, and a reason may name a person"
    assert PASSWORD not in json.dumps(events)


def test_nobody_signs_without_proving_once_more_who_it_is(
    server, pathologist: Client, predict_case: PredictCase, codes: Callable[[], str]
) -> None:
    case = predict_case(pathologist)
    for password, code in (("wrong", codes()), (PASSWORD, "000000"), (PASSWORD, "")):
        with pytest.raises(ServiceError, match="403: password or one-time code is wrong"):
            pathologist.sign(case.prediction, password, code)
    assert pathologist.request("GET", "/v1/me"), "the session is still good"
    used = codes()
    pathologist.sign(case.prediction, PASSWORD, used)
    with pytest.raises(ServiceError, match="403"):
        pathologist.sign(case.prediction, PASSWORD, used, reason="again")
    other = server.account("dr.snow", Role.PATHOLOGIST, "leeds")
    with pytest.raises(ServiceError, match="403: signing needs a second factor"):
        other.sign(case.prediction, PASSWORD, "")
    researcher = server.account("researcher", Role.RESEARCHER, "leeds")
    body = {"result_sha256": "0" * 64, "password": PASSWORD, "code": "1"}
    with pytest.raises(ServiceError, match="403: the role researcher"):
        researcher.request("POST", f"/v1/predictions/{case.prediction}/signatures", json=body)
    assert len(other.signatures(case.prediction)["versions"]) == 1
    # As at sign-in, wrong passwords are counted; the used code was the first.
    url = f"/v1/predictions/{case.prediction}/signatures"
    wrong = [pathologist._http.post(url, json=body | {"password": "wrong"}) for _ in range(4)]
    assert [answer.status_code for answer in wrong] == [403] * 4
    assert pathologist._http.post(url, json=body).status_code == 429


def test_a_signature_is_of_the_result_and_the_version_that_were_seen(
    server, pathologist: Client, predict_case: PredictCase, codes: Callable[[], str]
) -> None:
    case = predict_case(pathologist)
    url = f"/v1/predictions/{case.prediction}/signatures"
    seen = {"result_sha256": pathologist.result(case.prediction)["sha256"], "password": PASSWORD, "reason": "r"}
    with pytest.raises(ServiceError, match="409: the result is not the one"):
        pathologist.request("POST", url, json=seen | {"result_sha256": "0" * 64, "code": codes()})
    with pytest.raises(ServiceError, match="409: after_version must be 0"):
        pathologist.request("POST", url, json=seen | {"after_version": 1, "code": codes()})
    pathologist.request("POST", url, json=seen | {"code": codes()})
    with pytest.raises(ServiceError, match="409: after_version must be 1"):
        pathologist.request("POST", url, json=seen | {"code": codes()})
    # A second request for the same slides has signatures of its own.
    again = pathologist.predict(case.slides)["id"]
    assert pathologist.signatures(again)["versions"] == []
    assert pathologist.result(again)["sha256"] != seen["result_sha256"]


def test_what_is_not_in_the_log_is_not_signed_and_a_change_in_the_database_is_noticed(
    server, pathologist: Client, predict_case: PredictCase, codes: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = predict_case(pathologist)

    def fail(*arguments: object, **facts: object) -> None:
        raise OutputError("log.jsonl: cannot be written (No space left on device); free space")

    with monkeypatch.context() as patch:
        patch.setattr(server.service.signatures, "_log", fail)
        body = {"result_sha256": pathologist.result(case.prediction)["sha256"], "password": PASSWORD, "code": codes()}
        answer = pathologist._http.post(f"/v1/predictions/{case.prediction}/signatures", json=body)
        assert answer.status_code == 503
    assert pathologist.signatures(case.prediction) == {"versions": [], "is_intact": True}
    pathologist.sign(case.prediction, PASSWORD, codes())
    pathologist.sign(case.prediction, PASSWORD, codes(), call="canonical", reason="glands")
    with sqlite3.connect(server.service.folder / "state.db") as database:
        with pytest.raises(sqlite3.IntegrityError, match="never changed"):
            database.execute("UPDATE signatures SET content = replace(content, 'glands', 'none')")
        database.execute("DELETE FROM signatures WHERE version = 1")
    assert not pathologist.signatures(case.prediction)["is_intact"]


def test_a_state_folder_from_before_signatures_opens(open_state: Callable, tmp_path: Path) -> None:
    older = _MIGRATIONS[: _MIGRATIONS.index(MIGRATIONS[0])]
    Database(tmp_path / "state" / "state.db", older).close()
    assert open_state().signatures.versions("p") == []
