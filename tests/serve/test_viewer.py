"""The viewer's endpoints over HTTPS: tiles, maps and the tiles with the largest values."""

import io
import time
from collections.abc import Callable
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from crcjax.monitor.event_log import read_events
from crcjax.serve import routes_viewer
from crcjax.serve.client import Client, ServiceError
from crcjax.serve.permissions import Role
from crcjax.serve.service import LOG

PredictCase = Callable[..., Any]


def test_tiles_come_with_an_etag_for_which_no_file_is_read(
    server, pathologist: Client, predict_case: PredictCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = predict_case(pathologist)
    [slide] = case.slides
    image = pathologist.request("GET", f"/v1/slides/{slide}/image").json()
    assert (image["width"], image["height"]) == case.size
    url = f"/v1/slides/{slide}/image_files/{image['max_level']}/1_0.jpeg"
    answer = pathologist.request("GET", url)
    assert answer.headers["content-type"] == "image/jpeg"
    assert simplejpeg.decode_jpeg_header(answer.content)[:2] == (image["tile_px"], image["tile_px"])
    assert pathologist.request("GET", url).content == answer.content
    others = {pathologist.request("GET", url.replace("1_0", name)).headers["etag"] for name in ("0_0", "0_1")}
    assert answer.headers["etag"] not in others
    for name in ("99_0", "0_99"):
        with pytest.raises(ServiceError, match="404"):
            pathologist.request("GET", url.replace("1_0", name))
    description = ElementTree.fromstring(pathologist.request("GET", f"/v1/slides/{slide}/image.dzi").content)
    assert [int(value) for value in description[0].attrib.values()] == list(case.size)
    monkeypatch.setattr(routes_viewer.SlideTiles, "tile", None)
    monkeypatch.setattr(routes_viewer.SlideTiles, "cached_tile", None)
    again = pathologist.request("GET", url, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["cache-control"] == "private, no-cache"


def test_a_tile_in_memory_is_refused_to_another_site_and_to_a_session_that_has_ended(
    server, pathologist: Client, predict_case: PredictCase
) -> None:
    [slide] = predict_case(pathologist).slides
    url = f"/v1/slides/{slide}/image_files/11/0_0.jpeg"
    etag = pathologist.request("GET", url).headers["etag"]
    for client, status in (
        (server.account("york", Role.PATHOLOGIST, "york"), 404),
        (server.account("researcher", Role.RESEARCHER, "leeds"), 404),
        (server.account("auditor", Role.AUDITOR, "leeds"), 403),
        (server.client("forged"), 401),
        (server.client(), 401),
    ):
        for headers in ({}, {"If-None-Match": etag}):
            assert client._http.get(url, headers=headers).status_code == status
    pathologist.request("POST", "/v1/sign-out")
    # Who may see a tile is remembered for a second.
    time.sleep(1.1)
    assert pathologist._http.get(url, headers={"If-None-Match": etag}).status_code == 401


def test_the_log_says_who_looked_at_a_slide_once_a_session(
    server, pathologist: Client, predict_case: PredictCase
) -> None:
    [slide] = predict_case(pathologist).slides
    for column in (0, 1, 0):
        pathologist.request("GET", f"/v1/slides/{slide}/image_files/11/{column}_0.jpeg")
    again = server.sign_in("dr.frost")
    again.request("GET", f"/v1/slides/{slide}/image_files/11/0_0.jpeg")
    with pytest.raises(ServiceError):
        again.request("GET", f"/v1/slides/{slide}/image_files/11/77_0.jpeg")
    events = [event.facts for event in read_events(server.service.folder / LOG)]
    tiles = [(facts["account"], facts["status"]) for facts in events if "image_files" in facts.get("endpoint", "")]
    assert tiles == [("dr.frost", 200), ("dr.frost", 200), ("dr.frost", 404)]


def test_maps_lie_where_their_tiles_are(server, pathologist: Client, predict_case: PredictCase) -> None:
    case = predict_case(pathologist)
    url = f"/v1/predictions/{case.prediction}/slides/{case.slides[0]}/maps"
    maps = {overlay["id"]: overlay for overlay in pathologist.request("GET", url).json()}
    assert list(maps) == ["attention", "attention.0", "attention.1", "evidence.0", "evidence.1", "excluded"]
    # The first column was not used: maps begin at the second.
    side, hot_x, hot_y = case.region_px, *case.hot
    width, height = case.size[0] - side, case.size[1]
    for map_id in ("attention", "evidence.1"):
        assert maps[map_id]["box"] == [side, 0, width, height]
        answer = pathologist.request("GET", f"{url}/{map_id}.png")
        rgba = np.asarray(Image.open(io.BytesIO(answer.content))).astype(int)
        assert rgba.shape == (height // 25, width // 25, 4), "four pixels a tile"
        x, y = (hot_x - side) // 25, hot_y // 25
        assert len(np.unique(rgba[y + 1 : y + 3, x + 1 : x + 3].reshape(-1, 4), axis=0)) == 1
        hot, usual = rgba[y + 1, x + 1], rgba[20, 0]
        assert np.abs(hot - usual)[:3].sum() > 100, "the hot tile has a colour of its own"
        assert (rgba[..., 3] == 255).all()
    assert maps["evidence.1"]["scale"] > 0
    assert maps["excluded"]["box"] == [0, 0, side, height]
    top = pathologist.request("GET", f"{url}/attention.1/top-tiles?count=3").json()
    assert top[0] == {"x": hot_x, "y": hot_y, "side": side, "value": pytest.approx(0.9)}
    assert len(top) == 3
    assert pathologist.request("GET", f"{url}/evidence.0/top-tiles").json() == [], "nothing speaks for that class"
    with pytest.raises(ServiceError, match=r"404.*attention, attention\.0"):
        pathologist.request("GET", f"{url}/other.png")
    picture = pathologist.request("GET", f"/v1/slides/{case.slides[0]}/square.jpeg?x=1000&y=700&side=100&px=64").content
    assert simplejpeg.decode_jpeg(picture).mean() < 40
    assert pathologist.request("GET", f"/v1/slides/{case.slides[0]}/thumbnail.jpeg?max_px=64").content


def test_a_file_that_is_no_slide_has_no_tiles_and_is_no_error_of_the_service(
    server, pathologist: Client, write_slide: Callable
) -> None:
    slide = pathologist.upload(write_slide("a.svs"), "A")["id"]
    for path in ("image", "image.dzi", "image_files/0/0_0.jpeg", "thumbnail.jpeg", "square.jpeg?x=0&y=0&side=9"):
        with pytest.raises(ServiceError, match=r"422: a\.svs: a TIFF that OpenSlide cannot open"):
            pathologist.request("GET", f"/v1/slides/{slide}/{path}")
