"""The page in a real browser: from the first administrator's secret to a result, by keyboard where it matters."""

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crcjax.serve.client import Client

PASSWORD = "correct horse battery"


@pytest.fixture
def page(chromium, server) -> Iterator:
    """The page of the service; at the end, nothing may have been asked of another machine, and no script have failed."""
    context = chromium.new_context(ignore_https_errors=True, viewport={"width": 820, "height": 1180})
    opened = context.new_page()
    opened.set_default_timeout(20_000)
    urls, errors = [], []
    opened.on("request", lambda request: urls.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
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
    shown = "async () => { const i = document.querySelector('#result img'); await i.decode(); return i.naturalWidth }"
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
