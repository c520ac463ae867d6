"""The chat page in a real browser, headless: what a person sees and does there."""

import os
import re
import shutil

import pytest

import serving

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        found = next(filter(None, map(shutil.which, BROWSERS)), None)
        if found is None and not os.path.exists(p.chromium.executable_path):
            pytest.skip("no Chromium: none on the path, and playwright has installed none")
        # As root, and in most containers, its sandbox cannot be had.
        flags = [*FLAGS, "--no-first-run", "--no-sandbox"]
        # A library preloaded for MLX keeps the browser's own processes from starting.
        env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        browser = p.chromium.launch(executable_path=found, args=flags, env=env)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    serving.write_model(directory)
    return directory


@pytest.fixture
def running(model, tmp_path):
    with serving.running(model, tmp_path, "--max-tokens", "40", "--temp", "0") as pair:
        yield pair


@pytest.fixture
def page(running, browser):
    with opened(browser, running[0]) as page:
        yield page


class opened:
    """A page of the server; leaving checks that it asked nobody else and met no error."""

    def __init__(self, browser, server, **options):
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 760}} | options)
        self.url = serving.address(server)

    def __enter__(self):
        page = self.context.new_page()
        page.set_default_timeout(10000)
        self.wrong = []
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("console", self.hear)
        page.on("request", lambda r: r.url.startswith(self.url) or self.wrong.append(r.url))
        page.goto(self.url)
        page.locator("#ideas button").first.wait_for()
        return page

    def hear(self, message):
        # A refusal is an answer, which the page shows; the browser logs it all the same.
        if message.type == "error" and "responded with a status of 4" not in message.text:
            self.wrong.append(message.text)

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert self.wrong == []


def say(page, text):
    """Send a message, and wait for the whole reply; returns it."""
    replies = page.locator(".assistant .text")
    before = replies.count()
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")
    playwright.expect(replies).to_have_count(before + 1)
    page.get_by_role("button", name="Send").wait_for()
    return replies.last.inner_text()


def texts(page):
    return page.locator(".message .text").all_inner_texts()


def test_a_reply_streams_and_the_line_tells_the_truth(page, running):
    server, app = running
    reply = say(page, "the abba")
    body = {"messages": [{"role": "user", "content": "the abba"}], "temperature": 0}
    _, answer = serving.ask(server, "POST", "/v1/chat/completions", body)
    assert reply == answer["choices"][0]["message"]["content"].strip()
    line = page.locator("#line").inner_text()
    match = re.fullmatch(
        r"[\d.]+ tokens/s · read (\d+) tokens, remembered 0 · memory: (.*) KiB, constant", line
    )
    assert match, line
    assert int(match[1]) == len(app.engine.tokenizer.encode("the abba"))
    assert match[2] == f"{2 * 4 * (2 * 24 + 1) / 1024:.1f}"
    say(page, "an")
    new = len(app.engine.tokenizer.encode("\nan", add_special_tokens=False))
    assert f"read {1 + new} tokens, remembered" in page.locator("#line").inner_text()


def test_text_is_never_markup(page):
    evil = "<img src=x onerror=alert(1)><b>bold</b>&lt;"
    say(page, evil)
    assert texts(page)[0] == evil
    assert page.locator(".message img, .message b, #sessions img, #title img").count() == 0
    assert page.locator("#title").inner_text().startswith("<img src=x")


def test_retry_edit_and_fork(page, running):
    server, _ = running
    first = say(page, "the abba")
    second = say(page, "then")
    page.get_by_role("button", name="Retry").last.click()
    page.get_by_role("button", name="Send").wait_for()
    assert texts(page) == ["the abba", first, "then", second]  # at temperature 0 the same

    page.get_by_role("button", name="Fork").nth(1).click()
    playwright.expect(page.locator("#title")).to_have_text("the abba (fork)")
    assert texts(page) == ["the abba", first]
    other = say(page, "an abbey")
    playwright.expect(page.locator("#sessions li")).to_have_count(2)
    page.locator("#sessions .open", has_text=re.compile("^the abba4 messages")).first.click()
    playwright.expect(page.locator("#title")).to_have_text("the abba")
    assert texts(page) == ["the abba", first, "then", second]

    page.get_by_role("button", name="Edit").last.click()
    page.get_by_label("Change this message").fill("an abbey")
    page.get_by_role("button", name="Send again").click()
    playwright.expect(page.locator(".message .text").last).to_have_text(other)
    assert texts(page) == ["the abba", first, "an abbey", other]
    saved = serving.ask(server, "GET", "/v1/sessions")[1]["data"]
    assert sorted(s["title"] for s in saved) == ["the abba", "the abba (fork)"]


def test_stop_keeps_what_was_written(page, running):
    _, app = running
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Tokens at most").fill("30000")
    page.get_by_role("button", name="Done").click()
    page.get_by_label("Message", exact=True).fill("the abba")
    page.keyboard.press("Enter")
    playwright.expect(page.locator(".assistant .text")).not_to_have_text("")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Send").wait_for()
    assert serving.wait_until(lambda: app.engine.active == 0)
    assert len(texts(page)[1]) > 0
    assert page.locator("#problem").is_hidden()


def test_a_state_is_downloaded_and_opened_again(page, running, tmp_path):
    server, _ = running
    say(page, "the abba")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save").click()
    download.value.save_as(tmp_path / "abba.state")
    assert download.value.suggested_filename == "the abba.state"

    page.locator("#file").set_input_files(tmp_path / "abba.state")
    playwright.expect(page.locator("#title")).to_have_text("abba")
    assert texts(page) == []
    opened, first = serving.ask(server, "GET", "/v1/sessions")[1]["data"]
    assert (opened["title"], opened["base_tokens"] > first["base_tokens"]) == ("abba", True)
    body = {"prompt": "then", "session": opened["id"], "temperature": 0}
    _, answer = serving.ask(server, "POST", "/v1/completions", body)
    assert say(page, "then") == answer["choices"][0]["text"].strip()
    told = re.search(r"remembered (\d+)", page.locator("#line").inner_text())
    assert int(told[1]) >= opened["base_tokens"]

    (tmp_path / "bad.state").write_bytes(b"PK\x03\x04")
    page.locator("#file").set_input_files(tmp_path / "bad.state")
    playwright.expect(page.get_by_role("alert")).to_contain_text("must be a whole state file")


def test_sessions_outlive_the_page_and_are_deleted(page):
    say(page, "the abba")
    before = texts(page)
    page.reload()
    page.locator("#sessions .open").click()
    playwright.expect(page.locator(".message .text")).to_have_count(2)
    assert texts(page) == before
    page.on("dialog", lambda dialog: dialog.accept())
    page.get_by_role("button", name="Delete the abba").click()
    playwright.expect(page.locator("#sessions li")).to_have_count(0)
    assert texts(page) == []


def test_a_refusal_is_shown_and_the_page_goes_on(page, running):
    _, app = running
    app.slots.number = 0
    page.get_by_label("Message", exact=True).fill("the abba")
    page.keyboard.press("Enter")
    playwright.expect(page.get_by_role("alert")).to_have_text(
        "too many requests at a time; try again."
    )
    app.slots.number = 5
    page.get_by_role("button", name="Edit").click()
    page.get_by_role("button", name="Send again").click()
    playwright.expect(page.locator(".assistant .text")).not_to_have_text("")
    assert page.get_by_role("alert").count() == 0


def test_the_key_is_asked_for_once(model, tmp_path, browser):
    with serving.running(model, tmp_path, "--api-key", "s3cret", "--max-tokens", "3") as (
        server,
        _,
    ):
        context = browser.new_context()
        page = context.new_page()
        page.set_default_timeout(10000)
        page.goto(serving.address(server))
        for key in ("wrong", "s3cret"):
            page.get_by_role("textbox", name="API key").fill(key)
            page.get_by_role("button", name="Unlock").click()
        page.locator("#ideas button").first.wait_for()
        say(page, "the abba")
        page.reload()
        page.locator("#ideas button").first.wait_for()
        assert page.locator("dialog[open]").count() == 0
        context.close()


def test_everything_can_be_done_by_keyboard_and_has_a_name(page):
    say(page, "the abba")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, [role]")]
            .filter((e) => e.offsetParent && !(e.innerText || e.ariaLabel || e.labels?.length
                || ["status", "alert", "log"].includes(e.role)))
            .map((e) => e.outerHTML)"""
    )
    assert nameless == []
    page.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.innerText || document.activeElement.id"))
    for name in ("Skip to the message box", "New conversation", "Settings", "Retry", "message"):
        assert any(name in text for text in seen), (name, seen)
    assert page.locator("#said").get_attribute("aria-live") == "polite"
    assert page.locator("#said").text_content() == texts(page)[1]  # once, when it is whole


def test_on_a_phone_the_list_slides_in(running, browser):
    size = {"width": 360, "height": 640}
    with opened(browser, running[0], viewport=size, has_touch=True) as page:
        say(page, "the abba was an abbey then he " * 12)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        new = page.get_by_role("button", name="New conversation")
        playwright.expect(new).to_be_hidden()
        page.get_by_role("button", name="Conversations", exact=True).click()
        new.click()
        assert texts(page) == []
        playwright.expect(new).to_be_hidden()
        assert page.get_by_label("Message", exact=True).is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(running, browser, scheme):
    with opened(browser, running[0], color_scheme=scheme) as page:
        say(page, "the abba")
        contrasts = page.evaluate(
            """() => {
              const level = (text) => {
                const [r, g, b] = text.match(/[\\d.]+/g).slice(0, 3).map((v) => {
                  v /= 255;
                  return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
                });
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const ground = (e) => {
                const color = getComputedStyle(e).backgroundColor;
                return color.endsWith(", 0)") && e.parentElement ? ground(e.parentElement) : color;
              };
              const shown = [".user .text", ".assistant .text", "#line", ".who", "#send", "#title"];
              return shown.map((selector) => {
                const e = document.querySelector(selector);
                const levels = [level(getComputedStyle(e).color), level(ground(e))];
                return (Math.max(...levels) + 0.05) / (Math.min(...levels) + 0.05);
              });
            }"""
        )
        assert min(contrasts) >= 4.5, contrasts  # WCAG AA
