"""The API over HTTPS: from sign-in to result, and who may do what."""

import json
import re
import ssl
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from crcjax.errors import OutputError
from crcjax.monitor.event_log import read_events, verify
from crcjax.serve import routes_accounts
from crcjax.serve.access import COOKIE, CSRF_HEADER, Requires
from crcjax.serve.app import ROUTERS
from crcjax.serve.client import Client, PredictionFailedError, ServiceError
from crcjax.serve.permissions import PERMISSIONS, Action, Reach, Role
from crcjax.serve.service import LOG, forget_results_of_other_bundles

_SCRIPTS = ("page.css", "page.js", "server.js", "worklist.js", "result.js", "viewer.js", "sign.js", "accounts.js")
PASSWORD = "correct horse battery"
StartWorker = Callable[..., subprocess.Popen]
WriteSlide = Callable[..., Path]


def _refused(status: int, call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(ServiceError) as caught:
        call(*arguments, **options)
    assert caught.value.status == status, str(caught.value)
    return str(caught.value)


def test_a_slide_goes_from_upload_over_the_queue_to_result_and_heatmap(
    server, pathologist: Client, start_worker: StartWorker, write_slide: WriteSlide
) -> None:
    path = write_slide("a.svs", size=40_000)
    slide = pathologist.upload(path, "A-017")
    assert (slide["name"], slide["bytes"], slide["case_id"]) == ("a.svs", 40_000, "A-017")
    queued = pathologist.predict([slide["id"]])
    assert (queued["status"], queued["position"]) == ("queued", 0)
    start_worker()
    statuses: list[dict[str, Any]] = []
    result = pathologist.wait(queued["id"], 30.0, statuses.append)
    assert statuses[-1]["calls"] == ["immune"]
    [row] = result["slides"]
    assert (row["id"], row["call"], row["size"]) == (slide["id"], "immune", 40_000)
    assert pathologist.heatmap(queued["id"], slide["id"]).startswith(b"\x89PNG")
    listed = list(pathologist.predictions())
    assert [item["id"] for item in listed] == [queued["id"]]

    # The client's copy is still good; a changed one is not.
    url = f"/v1/predictions/{queued['id']}/result"
    etag = pathologist.request("GET", url).headers["etag"]
    assert pathologist.request("GET", url, headers={"If-None-Match": etag}).status_code == 304
    assert pathologist.request("GET", url, headers={"If-None-Match": '"other"'}).status_code == 200
    # The same slide once more is answered by the result that there is.
    again = pathologist.predict([pathologist.upload(path, "A-017")["id"]])
    assert (again["status"], again["id"] == queued["id"]) == ("done", False)


def test_results_are_shared_within_a_site_until_another_bundle_predicts(
    server, pathologist: Client, start_worker: StartWorker, write_slide: WriteSlide
) -> None:
    other_site = server.account("dr.york", Role.PATHOLOGIST, "york")
    path = write_slide()
    first = pathologist.predict([pathologist.upload(path, "A")["id"]])["id"]
    start_worker()
    pathologist.wait(first, 30.0)
    colleague = server.account("dr.snow", Role.RESEARCHER, "leeds")
    hit = colleague.predict([colleague.upload(path, "A")["id"]])
    assert hit["status"] == "done"
    # The hit is the researcher's own prediction; the one that computed it is still another's.
    assert colleague.result(hit["id"])["slides"][0]["call"] == "immune"
    _refused(404, colleague.result, first)
    _refused(404, other_site.result, hit["id"])
    asked = other_site.predict([other_site.upload(path, "A")["id"]])
    assert asked["status"] != "done", "sites share no results"
    other_site.wait(asked["id"], 30.0)
    forget_results_of_other_bundles(server.service)
    assert colleague.predict([colleague.upload(path, "A")["id"]])["status"] != "done"
    assert colleague.result(hit["id"])["slides"][0]["call"] == "immune", "results themselves stay"


def test_events_tell_every_change_to_the_end(
    server, pathologist: Client, start_worker: StartWorker, write_slide: WriteSlide
) -> None:
    prediction = pathologist.predict([pathologist.upload(write_slide(), "A")["id"]])
    statuses = []
    with pathologist._http.stream("GET", f"/v1/predictions/{prediction['id']}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        for line in response.iter_lines():
            if line.startswith("data: "):
                statuses.append(json.loads(line.removeprefix("data: "))["status"])
                if len(statuses) == 1:
                    start_worker()
    assert statuses[0] == "queued"
    assert statuses[-1] == "done"


def test_a_damaged_slide_fails_by_name_one_that_kills_workers_is_quarantined_and_the_next_is_predicted(
    server, pathologist: Client, start_worker: StartWorker, write_slide: WriteSlide
) -> None:
    ids = {
        kind: pathologist.predict([pathologist.upload(write_slide(f"{kind}.svs", kind), kind)["id"]])["id"]
        for kind in ("die", "bad", "good")
    }
    processes = [start_worker(f"w{number}") for number in range(4)]
    assert pathologist.wait(ids["good"], 30.0)["slides"][0]["call"] == "immune"
    with pytest.raises(PredictionFailedError, match="failed: corrupt: the file is damaged"):
        pathologist.wait(ids["bad"], 30.0)
    with pytest.raises(PredictionFailedError, match="quarantined: tried 3 times"):
        pathologist.wait(ids["die"], 30.0)
    assert sum(process.poll() is not None for process in processes) == 3


def test_a_running_prediction_is_cancelled_and_its_worker_goes_on(
    server, pathologist: Client, start_worker: StartWorker, write_slide: WriteSlide
) -> None:
    slow = pathologist.predict([pathologist.upload(write_slide("s.svs", "slow"), "S")["id"]])["id"]
    good = pathologist.predict([pathologist.upload(write_slide("g.svs"), "G")["id"]])["id"]
    start_worker()
    while pathologist.prediction(slow)["status"] == "queued":
        pass
    assert pathologist.cancel(slow)["status"] == "cancelled"
    assert pathologist.wait(good, 20.0)["slides"]
    assert _refused(409, pathologist.result, slow)


def test_a_worker_that_is_stopped_gives_its_case_back_untried(
    server, pathologist: Client, start_worker: StartWorker, write_slide: WriteSlide
) -> None:
    slow = pathologist.predict([pathologist.upload(write_slide("s.svs", "slow"), "S")["id"]])["id"]
    process = start_worker(drain_s=0.2)
    while pathologist.prediction(slow)["status"] == "queued":
        pass
    process.terminate()
    assert process.wait(10) == 0
    status = pathologist.prediction(slow)
    assert (status["status"], status["tries"]) == ("queued", 0)


def test_a_key_repeats_a_request_and_a_full_queue_answers_429(
    server, pathologist: Client, write_slide: WriteSlide, monkeypatch: pytest.MonkeyPatch
) -> None:
    slides = [pathologist.upload(write_slide(f"{number}.svs"), str(number))["id"] for number in range(21)]
    first = pathologist.predict(slides[:1], idempotency_key="k")
    assert pathologist.predict(slides[:1], idempotency_key="k")["id"] == first["id"]
    assert "Idempotency-Key" in _refused(422, pathologist.predict, slides[1:2], idempotency_key="k")
    assert "one case" in _refused(422, pathologist.predict, slides[:2])
    positions = [pathologist.predict([slide])["position"] for slide in slides[1:20]]
    assert positions == list(range(1, 20))
    response = pathologist._http.post("/v1/predictions", json={"slides": slides[20:]})
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert response.headers["content-type"] == "application/problem+json"
    assert pathologist.predict(slides[5:6], urgent=True)["position"] == 0, "a queued case becomes urgent"


def test_slides_by_reference_lie_in_a_folder_of_the_site(
    server, pathologist: Client, write_slide: WriteSlide, tmp_path: Path
) -> None:
    inside = write_slide("folders/leeds/a.svs")
    slide = pathologist.add_slide(str(inside), "A")
    assert (slide["name"], slide["bytes"]) == ("a.svs", 1000)
    assert "path" not in slide
    outside = write_slide("outside.svs")
    link = inside.with_name("link.svs")
    link.symlink_to(outside)
    for path in (outside, link, write_slide("folders/york/b.svs"), inside.parent / "../../outside.svs", "/etc/passwd"):
        assert "path must lie in a folder" in _refused(422, pathologist.add_slide, str(path), "A")
    empty = inside.with_name("empty.svs")
    empty.touch()
    assert "is empty" in _refused(422, pathologist.add_slide, str(empty), "A")
    cyclic = inside.with_name("cyclic.svs")
    cyclic.write_bytes(b"II*\0" + struct.pack("<IHHHIII", 8, 1, 305, 1, 1, 0, 8))
    assert "leads back to itself" in _refused(422, pathologist.add_slide, str(cyclic), "A")


def test_the_first_administrator_invites_others_and_a_second_factor_is_asked_for(server, tmp_path: Path) -> None:
    import pyotp

    name, secret = server.service.first_administrator()
    assert name == "admin"
    guest = server.client()
    body = {"secret": secret, "password": "short"}
    assert "at least 12 characters" in _refused(422, guest.request, "POST", "/v1/redeem", json=body)
    body["password"] = PASSWORD
    assert guest.request("POST", "/v1/redeem", json=body).json()["role"] == "administrator"
    assert server.service.first_administrator() is None
    _refused(401, guest.request, "POST", "/v1/redeem", json=body)
    admin = server.sign_in("admin")
    new = {"name": "dr.frost", "role": "pathologist", "site": "leeds"}
    invited = admin.request("POST", "/v1/accounts", json=new).json()["secret"]
    guest.request("POST", "/v1/redeem", json={"secret": invited, "password": PASSWORD})
    frost = server.sign_in("dr.frost")
    uri = frost.request("POST", "/v1/me/totp").json()["uri"]
    totp = pyotp.parse_uri(uri)
    assert isinstance(totp, pyotp.TOTP)
    _refused(401, frost.request, "POST", "/v1/me/totp/confirm", json={"code": "000000"})
    frost.request("POST", "/v1/me/totp/confirm", json={"code": totp.now()})
    assert "is wrong" in _refused(401, server.sign_in, "dr.frost")
    names = [account["name"] for account in admin.request("GET", "/v1/accounts").json()]
    assert names == ["admin", "dr.frost"]
    admin.request("POST", "/v1/accounts/dr.frost/disable")
    _refused(401, frost.request, "GET", "/v1/me")
    admin.request("POST", "/v1/accounts/admin/disable")
    assert server.service.first_administrator()[0] == "admin-2", "the last administrator may disable itself"


def test_a_page_signs_in_by_cookie_and_changes_nothing_without_the_second_secret(server, pathologist: Client) -> None:
    with httpx.Client(base_url=server.url, verify=ssl.create_default_context(cafile=server.certificate)) as browser:
        sign_in = {"name": "dr.frost", "password": PASSWORD, "cookie": True}
        response = browser.post("/v1/sign-in", json=sign_in)
        assert response.json()["token"] == ""
        cookie = response.headers["set-cookie"]
        for attribute in (COOKIE, "HttpOnly", "Secure", "SameSite=strict", "Path=/"):
            assert attribute in cookie
        assert browser.get("/v1/me").json()["csrf"] == response.json()["csrf"]
        body = {"name": "a.svs", "case_id": "A", "bytes": 10}
        assert browser.post("/v1/uploads", json=body).status_code == 403
        headers = {CSRF_HEADER: response.json()["csrf"]}
        assert browser.post("/v1/uploads", json=body, headers=headers).status_code == 201
        assert browser.post("/v1/sign-out", headers=headers).status_code == 204
        assert browser.get("/v1/me").status_code == 401


def test_health_metrics_page_and_headers_need_no_account_and_name_nobody(
    server, pathologist: Client, start_worker: StartWorker
) -> None:
    guest = server.client()
    assert guest.request("GET", "/livez").json() == {"status": "alive"}
    assert guest._http.get("/readyz").status_code == 503
    start_worker()
    while guest._http.get("/readyz").status_code == 503:
        pass
    text = guest.request("GET", "/metrics").text
    assert 'crcjax_jobs{status="queued"} 0.0' in text
    assert "crcjax_workers 1.0" in text
    assert 'endpoint="/readyz"' in text
    assert "frost" not in text
    page = guest.request("GET", "/")
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "max-age" in page.headers["strict-transport-security"]
    for name in re.findall(r'(?:src|href)="/([^"]+)"', page.text):
        assert guest.request("GET", f"/{name}").text
    sources = page.text + "".join(guest.request("GET", f"/{name}").text for name in _SCRIPTS)
    assert not re.findall(r"https?://", sources), "the page loads nothing from elsewhere"
    _refused(404, guest.request, "GET", "/other")


def test_without_a_token_every_path_of_the_api_answers_401_and_with_one_unknown_paths_answer_404(
    server, pathologist: Client
) -> None:
    guest = server.client()
    routes = _routes()
    checked = 0
    for route in routes:
        if route.path.startswith("/v1/") and route.path not in {r.path for r in routes_accounts.public.routes}:
            for method in route.methods:
                response = guest._http.request(method, re.sub(r"\{.*?\}", "x", route.path))
                assert response.status_code == 401, route.path
                assert response.headers["www-authenticate"] == "Bearer"
                checked += 1
    assert checked > 20
    for value in ("Bearer", "Bearer x", "Bearer x y", "Basic YTpi", "Bearer é"):
        response = guest._http.get("/v1/me", headers={"Authorization": value.encode()})
        assert response.status_code == 401
    _refused(404, pathologist.request, "GET", "/v1/nothing")
    # The openapi document describes all of it.
    document = guest.request("GET", "/openapi.json").json()
    assert document["openapi"].startswith("3.1")
    assert {route.path for route in routes if route.include_in_schema and route.path.startswith("/v1")} <= set(
        document["paths"]
    )


def test_a_body_that_is_larger_than_any_request_is_refused_before_it_fills_the_memory(server) -> None:
    guest = server.client()
    response = guest._http.post("/v1/sign-in", content=b" " * (2 << 20), headers={"Content-Type": "application/json"})
    assert response.status_code == 413

    def stream():
        for _ in range(3):
            yield b" " * (1 << 20)

    response = guest._http.post("/v1/sign-in", content=stream(), headers={"Content-Type": "application/json"})
    assert response.status_code == 413


class Case:
    """An endpoint of the matrix: how a caller reaches an object of `owner` with it."""

    def __init__(self, method: str, path: str, body: dict[str, Any] | None = None, headers: dict | None = None):
        self.method, self.path, self.body, self.headers = method, path, body, headers


_SIGNATURE = {"result_sha256": "0" * 64, "password": PASSWORD, "code": "1"}
_ON_SLIDE = "/v1/predictions/{prediction_id}/slides/{slide_id}"


# For each endpoint with an object: the request on the object of another account, from that object's ids.
def _cases(ids: dict[str, str]) -> dict[tuple[str, str], Case]:
    prediction, slide = f"/v1/predictions/{ids['prediction']}", ids["slide"]
    return {
        ("POST", "/v1/accounts/{name}/disable"): Case("POST", f"/v1/accounts/{ids['account']}/disable"),
        ("GET", "/v1/uploads/{upload_id}"): Case("GET", f"/v1/uploads/{ids['upload']}"),
        ("PATCH", "/v1/uploads/{upload_id}"): Case(
            "PATCH", f"/v1/uploads/{ids['upload']}", headers={"Upload-Offset": "0"}
        ),
        ("DELETE", "/v1/uploads/{upload_id}"): Case("DELETE", f"/v1/uploads/{ids['upload']}"),
        ("GET", "/v1/slides/{slide_id}"): Case("GET", f"/v1/slides/{slide}"),
        ("POST", "/v1/predictions"): Case("POST", "/v1/predictions", {"slides": [slide]}),
        ("GET", "/v1/predictions/{prediction_id}"): Case("GET", prediction),
        ("GET", "/v1/predictions/{prediction_id}/events"): Case("GET", f"{prediction}/events"),
        ("GET", "/v1/predictions/{prediction_id}/result"): Case("GET", f"{prediction}/result"),
        ("GET", "/v1/predictions/{prediction_id}/slides/{slide_id}/heatmap.png"): Case(
            "GET", f"{prediction}/slides/{slide}/heatmap.png"
        ),
        ("GET", "/v1/predictions/{prediction_id}/slides/{slide_id}/regions.geojson"): Case(
            "GET", f"{prediction}/slides/{slide}/regions.geojson"
        ),
        ("POST", "/v1/predictions/{prediction_id}/signatures"): Case("POST", f"{prediction}/signatures", _SIGNATURE),
        ("GET", "/v1/predictions/{prediction_id}/signatures"): Case("GET", f"{prediction}/signatures"),
        ("GET", "/v1/slides/{slide_id}/image"): Case("GET", f"/v1/slides/{slide}/image"),
        ("GET", "/v1/slides/{slide_id}/image.dzi"): Case("GET", f"/v1/slides/{slide}/image.dzi"),
        ("GET", "/v1/slides/{slide_id}/image_files/{level}/{column}_{row}.jpeg"): Case(
            "GET", f"/v1/slides/{slide}/image_files/0/0_0.jpeg"
        ),
        ("GET", "/v1/slides/{slide_id}/thumbnail.jpeg"): Case("GET", f"/v1/slides/{slide}/thumbnail.jpeg"),
        ("GET", "/v1/slides/{slide_id}/square.jpeg"): Case("GET", f"/v1/slides/{slide}/square.jpeg?x=0&y=0&side=9"),
        ("GET", f"{_ON_SLIDE}/maps"): Case("GET", f"{prediction}/slides/{slide}/maps"),
        ("GET", f"{_ON_SLIDE}/maps/{{map_id}}.png"): Case("GET", f"{prediction}/slides/{slide}/maps/attention.png"),
        ("GET", f"{_ON_SLIDE}/maps/{{map_id}}/top-tiles"): Case(
            "GET", f"{prediction}/slides/{slide}/maps/attention/top-tiles"
        ),
        ("POST", "/v1/predictions/{prediction_id}/cancel"): Case("POST", f"{prediction}/cancel"),
    }


# Endpoints without an object of their own: what they make or list is of the caller's site.
_WITHOUT_OBJECT: dict[tuple[str, str], Case] = {
    ("POST", "/v1/sign-out"): Case("POST", "/v1/sign-out"),
    ("GET", "/v1/me"): Case("GET", "/v1/me"),
    ("POST", "/v1/me/totp"): Case("POST", "/v1/me/totp"),
    ("POST", "/v1/me/totp/confirm"): Case("POST", "/v1/me/totp/confirm", {"code": "1"}),
    ("GET", "/v1/accounts"): Case("GET", "/v1/accounts"),
    ("POST", "/v1/accounts"): Case("POST", "/v1/accounts", {"name": "new", "role": "auditor", "site": "nowhere"}),
    ("POST", "/v1/uploads"): Case("POST", "/v1/uploads", {"name": "a.svs", "case_id": "A", "bytes": 9}),
    ("POST", "/v1/slides"): Case("POST", "/v1/slides", {"path": "/etc/passwd", "case_id": "A"}),
    ("GET", "/v1/predictions"): Case("GET", "/v1/predictions"),
    ("GET", "/v1/models"): Case("GET", "/v1/models"),
    ("GET", "/v1/log"): Case("GET", "/v1/log"),
}


def _routes() -> list[APIRoute]:
    return [route for router in ROUTERS for route in router.routes if isinstance(route, APIRoute)]


def _actions() -> dict[tuple[str, str], Action]:
    """The action of every endpoint, from the application itself."""
    actions = {}
    for route in _routes():
        if route.path.startswith("/v1/") and route.include_in_schema:
            required = [dep.call.action for dep in route.dependant.dependencies if isinstance(dep.call, Requires)]
            if route.path in {public.path for public in routes_accounts.public.routes}:
                assert not required
                continue
            assert len(required) == 1, f"{route.path} must declare the action that it needs"
            actions |= {(method, route.path): required[0] for method in route.methods}
    return actions


def test_every_role_reaches_at_every_endpoint_what_the_table_says_and_nothing_of_another_site(
    server, write_slide: WriteSlide, start_worker: StartWorker
) -> None:
    clients = {
        (role, site): server.account(f"{role}.{site}", role, site) for role in Role for site in ("leeds", "york")
    }
    owner = clients[Role.PATHOLOGIST, "leeds"]
    # An idle account, which administrators may disable; objects of a pathologist in leeds.
    server.account("idle", Role.AUDITOR, "leeds")
    start_worker()
    slide = owner.upload(write_slide(), "A")["id"]
    prediction = owner.predict([slide])["id"]
    owner.wait(prediction, 30.0)
    actions, upload = _actions(), ""
    checked = 0
    for endpoint, action in actions.items():
        for (role, site), client in clients.items():
            body = {"name": "b.svs", "case_id": "A", "bytes": 9}
            if "{upload_id}" in endpoint[1]:
                upload = owner.request("POST", "/v1/uploads", json=body).json()["id"]
            objects = _cases({"account": "idle", "upload": upload, "slide": slide, "prediction": prediction})
            assert set(objects) | set(_WITHOUT_OBJECT) == set(actions), "an endpoint is not in the matrix"
            has_object = endpoint in objects
            case = objects[endpoint] if has_object else _WITHOUT_OBJECT[endpoint]
            if endpoint == ("POST", "/v1/sign-out"):
                continue
            response = client._http.request(case.method, case.path, json=case.body, headers=case.headers)
            allowed = PERMISSIONS[role].get(action)
            is_owner = client is owner
            if allowed is None:
                expected = {403}
            elif has_object and (site != "leeds" or (allowed == Reach.OWN and not is_owner)):
                expected = {404}
            elif "regions.geojson" in endpoint[1] or "/maps" in endpoint[1]:
                expected = {404}  # this worker writes no attention; that answer has words of its own
                assert "has no prediction" in response.json()["detail"]
            elif endpoint[1].endswith("/signatures") and case.method == "POST":
                expected = {403}  # the account has no second factor; that answer has words of its own
                assert "second factor" in response.json()["detail"]
            else:
                expected = {200, 201, 202, 204, 422, *({401} if case.path.endswith("confirm") else set())}
            assert response.status_code in expected, (endpoint, role, site, response.text)
            checked += 1
    assert checked == (len(actions) - 1) * len(clients)
    # Lists hold objects within reach alone: the researcher and the pathologist of york added none of the slide.
    for role, site in ((Role.RESEARCHER, "leeds"), (Role.SERVICE, "leeds"), (Role.PATHOLOGIST, "york")):
        assert list(clients[role, site].predictions()) == []
    assert [item["id"] for item in owner.predictions()][-1] == prediction


def test_each_request_is_in_the_log_before_its_answer_and_without_the_log_nothing_is_answered(
    server, pathologist: Client, administrator: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    auditor = server.account("auditor", Role.AUDITOR, "leeds")
    york = server.account("york.auditor", Role.AUDITOR, "york")
    _refused(401, server.client().request, "POST", "/v1/sign-in", json={"name": "dr.frost", "password": "wrong"})
    upload = pathologist.request("POST", "/v1/uploads", json={"name": "a.svs", "case_id": "A", "bytes": 9}).json()
    pathologist.request("DELETE", f"/v1/uploads/{upload['id']}")
    page = auditor.request("GET", "/v1/log").json()
    last = page["items"][-1]["facts"]
    assert (last["account"], last["endpoint"], last["status"]) == ("dr.frost", "/v1/uploads/{upload_id}", 204)
    assert last["objects"] == {"upload_id": upload["id"]}
    assert {item["facts"]["site"] for item in page["items"]} == {"leeds"}
    # Each request for a page is itself an entry, so that the pages never end while they are asked for.
    paged, after = [], 0
    while len(paged) < len(page["items"]):
        single = auditor.request("GET", "/v1/log", params={"limit": 1, "after": after}).json()
        paged, after = paged + single["items"], single["next"]
    assert paged == page["items"]
    assert all(item["facts"]["site"] == "york" for item in york.request("GET", "/v1/log").json()["items"])
    new = {"name": "dr.new", "role": "researcher", "site": "leeds"}
    administrator.request("POST", "/v1/accounts", json=new)
    _refused(404, pathologist.request, "GET", "/v1/slides/PATIENT-NAME")
    _refused(404, pathologist.request, "GET", "/v1/PATIENT-NAME")
    added = [event.facts for event in read_events(server.service.folder / LOG) if "subject_role" in event.facts]
    assert [added[-1][f"subject{name}"] for name in ("", "_role", "_site")] == ["dr.new", "researcher", "leeds"]
    assert verify(server.service.folder / LOG) is None
    text = (server.service.folder / LOG).read_text()
    assert '"subject": "dr.frost"' in text, "whose password was wrong"
    assert "PATIENT" not in text
    assert "wrong" not in text
    assert PASSWORD not in text

    def fail(*arguments: object, **facts: object) -> None:
        raise OutputError("log.jsonl: cannot be written (No space left on device); free space")

    monkeypatch.setattr(server.service.log, "append", fail)
    response = pathologist._http.post("/v1/uploads", json={"name": "b.svs", "case_id": "B", "bytes": 9})
    assert response.status_code == 503
    assert "log" in response.json()["detail"]


def test_the_process_that_answers_does_not_load_jax() -> None:
    code = "import sys, crcjax.serve.app; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
