"""The page in a real browser: from the first administrator's secret to a result, by keyboard where it matters."""

import io
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyotp
import pytest
from PIL import Image

from crcjax.serve.client import Client
from crcjax.serve.queue import QueueLimits
from crcjax.serve.service import Service
from crcjax.serve.viewer_library import INSTALL, read_script

PASSWORD = "correct horse battery"
PredictCase = Callable[..., Any]


@pytest.fixture(scope="module")
def viewer_script(required: Callable[[str], bool]) -> bytes:
    """OpenSeadragon."""
    script = read_script()
    if script is None:
        if required("browser"):
            pytest.fail(f"the zooming viewer is not installed: {INSTALL}")
        pytest.skip(f"the zooming viewer is not installed: {INSTALL}")
    return script


@pytest.fixture
def server(open_state: Callable[..., Service], viewer_script: bytes, serve: Callable) -> Iterator:
    with serve(open_state(QueueLimits(lease_s=1.0)), viewer_script) as running:
        yield running


@pytest.fixture
def page(chromium, server) -> Iterator:
    """The page of the service; at the end, nothing may have been asked of another machine, and no script have failed."""
    context = chromium.new_context(ignore_https_errors=True, viewport={"width": 820, "height": 1180})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    urls, errors = [], []
    opened.on("request", lambda request: urls.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    # Such as what the content security policy refuses; the status of an answer is the business of the tests.
    opened.on("console", lambda line: errors.append(line.text) if "Security" in line.text else None)
    opened.goto(server.url)
    yield opened
    context.close()
    assert [url for url in urls if not url.startswith((server.url, "blob:"))] == []
    assert errors == []


def _redeem_and_sign_in(page, secret: str, name: str) -> None:
    page.get_by_text("I have an invitation").click()
    page.get_by_label("Secret").fill(secret)
    page.get_by_label("New password").fill(PASSWORD)
    page.get_by_role("button", name="Make the account").click()
    page.get_by_text(f"The account {name} exists now").wait_for()
    # The name is filled in; the rest goes by keyboard alone.
    page.get_by_label("Password", exact=True).focus()
    page.keyboard.type(PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Sign out").wait_for()


def test_an_administrator_invites_a_pathologist_who_uploads_watches_and_reads_the_result(
    page, server, start_worker: Callable[..., subprocess.Popen], write_slide: Callable[..., Path]
) -> None:
    _redeem_and_sign_in(page, server.service.first_administrator()[1], "admin")
    assert page.get_by_role("heading", name="Worklist").count() == 0, "administrators see no case"
    page.get_by_label("Name").last.fill("dr.frost")
    page.get_by_label("Site").fill("leeds")
    page.get_by_role("button", name="Add").click()
    invitation = page.locator("#secret").get_by_text("Invitation for dr.frost").inner_text()
    page.get_by_role("button", name="Sign out").click()

    _redeem_and_sign_in(page, invitation.split()[-1], "dr.frost")
    assert "dr.frost, pathologist, leeds" in page.locator("#account").inner_text()
    page.get_by_label("Case").fill("A-017 <b>")
    page.locator("input[type=file]").set_input_files(write_slide("a.svs", size=20_000_000))
    page.get_by_label("Urgent").focus()
    page.keyboard.press("Space")
    page.get_by_role("button", name="Upload and predict").press("Enter")
    row = page.locator("#predictions tr")
    row.get_by_text("queued, next").wait_for()
    assert row.locator("td").all_inner_texts()[2] == "urgent"
    assert row.locator("td").first.inner_text() == "A-017 <b>"
    start_worker()
    row.get_by_role("button", name="Open the result of A-017 <b>").press("Enter")
    page.get_by_role("heading", name="Case A-017 <b>: subtype").wait_for()
    assert page.evaluate("document.activeElement.id") == "result-title", "the result is read out"
    assert "0.750" in page.locator("dl").inner_text()
    page.locator("#stage img").wait_for()
    shown = "async () => { const i = document.querySelector('#stage img'); await i.decode(); return i.naturalWidth }"
    assert page.evaluate(shown) == 64
    # It fits a tablet and a telephone.
    for width in (820, 390):
        page.set_viewport_size({"width": width, "height": 1180})
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.get_by_role("button", name="Back to the worklist").click()
    page.reload()
    row.get_by_text("done", exact=True).wait_for()


def test_what_goes_wrong_is_said_on_the_page(page, server, pathologist: Client, tmp_path: Path) -> None:
    page.get_by_label("Name").first.fill("dr.frost")
    page.get_by_label("Password", exact=True).fill("wrong")
    page.keyboard.press("Enter")
    page.get_by_text("name, password or one-time code is wrong").wait_for()
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_label("Case").fill("A")
    text = tmp_path / "notes.txt"
    text.write_text("no slide")
    page.locator("input[type=file]").set_input_files(text)
    page.get_by_role("button", name="Upload and predict").click()
    page.get_by_text("name must end with one of .svs").wait_for()
    server.service.accounts.disable("dr.frost")
    page.reload()
    page.get_by_role("heading", name="Sign in").wait_for()


def _sign_in(page) -> None:
    page.get_by_label("Name").first.fill("dr.frost")
    page.get_by_label("Password", exact=True).fill(PASSWORD)
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Sign out").wait_for()


def _violations(page) -> list[str]:
    """What axe-core finds on the page, in light and in dark colours."""
    from axe_playwright_python.sync_playwright import Axe

    violations = []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        violations += [
            f"{scheme}: {violation['id']}: {[node['html'] for node in violation['nodes']]}"
            for violation in Axe().run(page).response["violations"]
        ]
    return violations


def _pixels(screenshot: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(screenshot)).convert("RGB")).astype(int)


def _edges(page, is_inside: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Left, right, top and bottom of the pixels of a kind about the middle of the viewer."""
    before, screenshot, inside = b"", b"", np.zeros((1, 1), bool)
    # Until the tiles and the map of this zoom have arrived, and the animation has ended.
    deadline_s = time.monotonic() + 120.0
    while screenshot != before or not inside[inside.shape[0] // 2, inside.shape[1] // 2]:
        assert time.monotonic() < deadline_s
        page.wait_for_timeout(700)
        before, screenshot = screenshot, page.locator(".slide").screenshot()
        inside = is_inside(_pixels(screenshot))
    middle_y, middle_x = inside.shape[0] // 2, inside.shape[1] // 2
    edges = []
    for line, middle in ((inside[middle_y], middle_x), (inside[:, middle_x], middle_y)):
        outside = np.flatnonzero(~line)
        edges += [outside[outside < middle][-1] + 1, outside[outside > middle][0]]
    return np.asarray(edges)


@pytest.mark.slow
def test_a_map_lies_within_a_pixel_of_the_slide_at_five_zooms(
    page, pathologist: Client, predict_case: PredictCase
) -> None:
    predict_case(pathologist)
    _sign_in(page)
    page.get_by_role("button", name="Open the result of A-017").click()
    page.locator("#map-choice").select_option("Attention for immune")
    page.locator("#gallery img").first.wait_for()
    sides = []
    for zoom in range(5):
        if zoom:
            page.get_by_role("button", name="Zoom in").click()
        page.get_by_label("Opacity of the map").fill("0")
        on_slide = _edges(page, lambda rgb: rgb.sum(axis=-1) < 340)
        page.get_by_label("Opacity of the map").fill("100")
        # The hot region and its blocks that pass into the neighbours' colour.
        on_map = _edges(page, lambda rgb: rgb[..., 1] > 130)
        assert np.abs(on_slide - on_map).max() <= 1, (zoom, on_slide, on_map)
        sides.append(on_slide[1] - on_slide[0])
    assert sides[0] < 45
    assert sides[-1] > 300
    assert all(np.diff(sides) > 0)


@pytest.mark.slow
def test_the_viewer_compares_the_slides_of_a_case_and_axe_finds_nothing(
    page, pathologist: Client, predict_case: PredictCase, write_slide: Callable[..., Path]
) -> None:
    assert _violations(page) == []
    predict_case(pathologist, slides=2)
    pathologist.predict([pathologist.upload(write_slide(), "B-001")["id"]])
    _sign_in(page)
    row = page.locator("#predictions tr").last
    assert row.locator("td").all_inner_texts()[2:7] == ["routine", "done", "accept, accept", "immune, immune", "0.56"]
    assert _violations(page) == []
    page.get_by_role("button", name="Open the result of A-017").press("Enter")
    page.locator("#gallery button").first.wait_for()
    assert _violations(page) == []
    assert "Vacuity\n0.200" in page.locator("dl").inner_text()
    page.get_by_role("button", name="Tile 1 of").press("Enter")
    assert page.locator("#gallery [aria-current]").inner_text() == "1"
    # Keys of the viewer, while the slide has the focus.
    page.locator(".openseadragon-canvas").first.focus()
    page.keyboard.press("n")
    assert page.locator("#gallery [aria-current]").inner_text() == "2"
    opacity = page.get_by_label("Opacity of the map")
    before = int(opacity.input_value())
    page.keyboard.press("]")
    assert int(opacity.input_value()) == before + 10
    chosen = page.locator("#map-choice").input_value()
    page.keyboard.press("m")
    assert page.locator("#map-choice").input_value() != chosen
    page.get_by_label("All slides").press("Space")
    page.locator("figure").nth(1).locator(".overlay").wait_for()
    assert page.locator("figcaption").all_inner_texts() == ["Slide 1", "Slide 2"]
    assert _violations(page) == []
    for width in (820, 390):
        page.set_viewport_size({"width": width, "height": 1180})
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.get_by_role("button", name="Sign out").click()
    page.get_by_role("heading", name="Sign in").wait_for()
    assert page.locator("#stage *").count() == 0, "the next person sees nothing of the last one"


@pytest.mark.slow
def test_without_the_viewer_the_page_says_how_to_install_it_and_shows_the_heatmap(
    page, server, pathologist: Client, predict_case: PredictCase
) -> None:
    page.route("**/openseadragon.js", lambda route: route.fulfill(status=404))
    predict_case(pathologist)
    _sign_in(page)
    page.get_by_role("button", name="Open the result of A-017").press("Enter")
    page.get_by_text(INSTALL).wait_for()
    assert page.locator("#stage img").get_attribute("src").endswith("heatmap.png")
    assert page.get_by_role("button", name="Zoom in").count() == 0


@pytest.mark.slow
def test_the_worklist_has_pages(page, server, pathologist: Client, write_slide: Callable[..., Path]) -> None:
    for number in range(51):
        path = server.service.folder.parent / "folders" / "leeds" / f"{number}.svs"
        path.write_bytes(write_slide(f"{number}.svs").read_bytes())
        pathologist.predict([pathologist.add_slide(str(path), f"C-{number:03d}")["id"]])
    _sign_in(page)
    page.get_by_text("C-050").wait_for()
    assert page.locator("#predictions tr").count() == 50
    page.get_by_role("button", name="Older").press("Enter")
    page.get_by_text("C-000").wait_for()
    assert page.locator("#predictions tr").count() == 1
    assert page.get_by_role("button", name="Older").is_disabled()
    page.get_by_role("button", name="Newest").press("Enter")
    page.get_by_text("C-050").wait_for()


def _tab_to(page, selector: str) -> None:
    """Presses Tab until an element has the focus."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.evaluate("selector => document.activeElement.matches(selector)", selector):
            return
    raise AssertionError(f"{selector} cannot be reached by Tab")


@pytest.mark.slow
def test_from_sign_in_over_the_upload_to_the_signature_by_keyboard_alone(
    page, server, pathologist: Client, marked_slide: Path, commit_result: Callable[[], None]
) -> None:
    # The service's clock, so that the test need not wait for the next one-time code.
    now = time.time()
    object.__setattr__(server.service.accounts, "_now", lambda: now)
    keys = page.keyboard
    _tab_to(page, "#sign-in [name=name]")
    keys.type("dr.frost")
    keys.press("Tab")
    keys.type(PASSWORD)
    keys.press("Enter")
    page.get_by_role("heading", name="Worklist").wait_for()
    _tab_to(page, "#upload [name=case]")
    keys.type("A-017")
    _tab_to(page, "#upload [name=file]")
    # The dialog that chooses files is the browser's.
    page.locator("#upload [name=file]").set_input_files(marked_slide)
    _tab_to(page, "#upload button")
    keys.press("Enter")
    page.locator("#predictions").get_by_text("queued, next").wait_for()
    commit_result()
    page.get_by_role("button", name="Open the result of A-017").wait_for()
    _tab_to(page, "#predictions button")
    keys.press("Enter")
    page.locator("#gallery img").first.wait_for()
    _tab_to(page, ".openseadragon-canvas")
    keys.press("+")
    keys.press("n")
    assert page.locator("#gallery [aria-current]").inner_text() == "1"

    _tab_to(page, "#begin-totp")
    keys.press("Enter")
    page.locator("#totp [name=code]").wait_for()
    totp = pyotp.TOTP(page.locator("#totp-secret").inner_text().split()[-1])
    keys.type(totp.at(now))
    keys.press("Enter")
    page.get_by_text("The second factor is set up").wait_for()
    assert _violations(page) == []
    now += 30
    _tab_to(page, "#agree-choice")
    keys.press("ArrowDown")
    assert "make another call" in page.locator("#statement").inner_text()
    _tab_to(page, "#sign-call")
    _tab_to(page, "#sign [name=reason]")
    keys.type("glands")
    _tab_to(page, "#sign [name=password]")
    keys.type(PASSWORD)
    _tab_to(page, "#sign [name=code]")
    keys.type("000000")
    keys.press("Enter")
    page.get_by_text("password or one-time code is wrong").wait_for()
    assert page.locator("#sign [name=reason]").input_value() == "glands", "nothing that was written is lost"
    _tab_to(page, "#sign [name=password]")
    keys.type(PASSWORD)
    _tab_to(page, "#sign [name=code]")
    keys.type(totp.at(now))
    keys.press("Enter")
    page.get_by_text("The signature is recorded").wait_for()
    assert "dr.frost" in page.locator("#signatures li").inner_text()
    assert "canonical. I have reviewed the slides of this case and make another call. Reason: glands" in (
        page.locator("#signatures li").inner_text()
    )
    _tab_to(page, "#back")
    keys.press("Enter")
    page.get_by_role("cell", name="other call: canonical, dr.frost").wait_for()
    [prediction] = pathologist.predictions()
    assert prediction["signed"]["calls"] == ["canonical"]
