"""The page at "/", driven in a headless Chromium, on the tiny base."""

import os
import re
import shutil

import pytest
from playwright.sync_api import expect, sync_playwright

from mos_jax.serving.http.page import content_policy, read_page
from tests.serving.http.fixtures_http import ALL, ANNA, keyring, real_folder, real_server

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
# It asks no host but the server; as root it starts without its sandbox only.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
needs_browser = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="no Chromium on PATH; install chromium (Debian, Ubuntu) to drive the page",
)


def test_it_loads_nothing_and_may_not():
    page = read_page()
    assert re.findall(r"(?:src|href)\s*=\s*[\"']?([^\"'> ]+)", page) == ["data:,"]
    # Handlers and styles in attributes would be blocked.
    assert not re.search(r"<[^>]*\s(?:on\w+|style)\s*=", page)
    policy = content_policy(page)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tenants")
    base, _ = real_folder(folder)
    with real_server(folder, base, keyring(tmp_path_factory.mktemp("keys"))) as live:
        yield live


@pytest.fixture(scope="module")
def browser():
    assert CHROMIUM is not None, "no Chromium on PATH, and where CI is set it must be there"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, live):
    context = browser.new_context(viewport={"width": 1100, "height": 850})
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.trouble = []
    page.on("pageerror", lambda error: page.trouble.append(str(error)))
    page.on(
        "console",
        lambda message: (
            page.trouble.append(message.text) if "Content Sec" in message.text else None
        ),
    )
    page.goto(live.url)
    yield page
    assert page.trouble == []
    context.close()


def use(page, key):
    page.get_by_label("Key").fill(key)
    page.get_by_role("button", name="Use it").click()


@needs_browser
def test_base_and_tenant_side_by_side(page, live):
    expect(page.locator("#state")).to_have_text("ready")
    expect(page.locator("#models-note")).to_have_text("Give a key to see models.")
    expect(page.get_by_role("button", name="Compare")).to_be_disabled()
    use(page, ALL)
    expect(page.locator("#models-note")).to_have_text("The base and 4 tenants")
    page.get_by_role("button", name="ben").click()
    page.get_by_label("Question").fill("What is a shard?")
    page.get_by_label("Tokens at most").fill("20")
    page.get_by_role("button", name="Compare").click()
    shown = {}
    for side, model in (("left", "tiny-random"), ("right", "ben")):
        place = page.locator(f"#{side}-answer")
        expect(place.locator("h2")).to_have_text(model)
        expect(place.locator("p")).to_contain_text("20 tokens, the first after")
        shown[model] = place.locator("pre").text_content()
    for model, text in shown.items():
        answer = live.chat(model, "What is a shard?", max_tokens=20, temperature=0).json()
        # A page has no carriage returns of its own.
        assert text == answer["choices"][0]["message"]["content"]
    assert shown["ben"] != shown["tiny-random"]
    expect(page.locator("#rows")).to_contain_text("of 4 rows in use")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        png = page.screenshot(full_page=True)
        assert len(png) > 20_000
        if folder := os.environ.get("MOS_JAX_SCREENSHOTS"):
            with open(f"{folder}/page_{scheme}.png", "wb") as file:
                file.write(png)


@needs_browser
def test_a_key_shows_what_it_may_use_and_errors_are_words(page):
    use(page, ANNA)
    expect(page.locator("#models-note")).to_have_text("1 tenant")
    assert page.get_by_label("Left").locator("option").all_text_contents() == ["anna"]
    page.get_by_label("Tokens at most").fill("1000000")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator("#right-answer .error")).to_contain_text("over this server's")
    use(page, "a-key-that-is-not-known")
    expect(page.locator("#models-note")).to_have_text("this key is not known")


@needs_browser
def test_on_a_narrow_screen_nothing_is_cut_off(page):
    use(page, ALL)
    page.set_viewport_size({"width": 360, "height": 700})
    expect(page.locator("#models-note")).to_have_text("The base and 4 tenants")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    # Every field has a name for those who do not see it.
    for field in page.locator("input, select, textarea").all():
        assert page.locator(f"label[for={field.get_attribute('id')}]").count() == 1
