"""The web page, in a headless Chromium; `scripts/browser` installs one where it can."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from serving import Server, loopback_only, served

no_network = loopback_only  # in place of the one in conftest

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = tiny.make_text_model(tmp_path_factory.mktemp("page") / "m.gguf", chat=True)
    with served(path, "-c", "32768", "-a", "bilbo", "--api-key", "secret") as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in names:
        pytest.fail("no Chromium here: run scripts/browser, or install chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = str(names[0])
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service(str(names[1])))
        try:
            yield driver
        finally:
            driver.quit()


@pytest.fixture
def page(server: Server, browser: Any) -> Any:
    """The page as it is loaded, with the key given."""
    browser.set_window_size(1200, 900)
    browser.get(server.url)
    browser.find_element(By.TAG_NAME, "summary").click()
    browser.find_element(By.ID, "key").send_keys("secret")
    until(browser, lambda: "bilbo" in text(browser, "#model"))
    return browser


def until(browser: Any, holds: Any) -> None:
    WebDriverWait(browser, 60, poll_frequency=0.05).until(lambda _: holds())


def text(browser: Any, selector: str) -> str:
    found = browser.find_elements(By.CSS_SELECTOR, selector)
    return str(found[-1].text) if found else ""


def ask(browser: Any, prompt: str, tokens: str) -> None:
    limit = browser.find_element(By.ID, "max-tokens")
    limit.clear()
    limit.send_keys(tokens)
    browser.find_element(By.ID, "prompt").send_keys(prompt, Keys.ENTER)


def test_a_chat_streams_and_tells_what_it_cost(page: Any) -> None:
    ask(page, "one two three", "20")
    until(page, lambda: "20 tokens" in text(page, "li.assistant .cost"))
    first = text(page, "li.assistant .text")
    assert len(first.split("\u2581")) > 5 or len(first.split()) > 5
    assert "tok/s" in text(page, "li.assistant .cost") and "exact" in text(page, ".cost")
    ask(page, "two", "5")
    until(page, lambda: "5 tokens" in text(page, "li.assistant .cost"))
    assert len(page.find_elements(By.CSS_SELECTOR, "#log li")) == 4
    page.find_element(By.ID, "clear").click()
    assert page.find_elements(By.CSS_SELECTOR, "#log li") == []


def test_stop_ends_the_answer_and_keeps_what_was_said(page: Any, server: Server) -> None:
    ask(page, "one two", "30000")
    until(page, lambda: len(text(page, "li.assistant .text")) > 20)
    stop = page.find_element(By.ID, "stop")
    assert stop.is_enabled() and not page.find_element(By.ID, "send").is_enabled()
    stop.click()
    until(page, lambda: text(page, "#notice") == "stopped")
    assert len(text(page, "li.assistant .text")) > 20
    key = {"Authorization": "Bearer secret"}
    server.until(lambda: not server.ask("/slots", **key).json[0]["is_processing"], "free")
    assert page.find_element(By.ID, "send").is_enabled()


def test_the_charts_follow_the_feed(page: Any) -> None:
    ask(page, "one two", "30000")
    until(page, lambda: text(page, "[data-chart=rate] output") not in ("", "-"))
    until(page, lambda: text(page, "[data-chart=hit] output").endswith("%"))
    assert text(page, "[data-chart=memory] output").endswith("%")
    assert "answering" in text(page, "#state") or "reading" in text(page, "#state")
    line = page.find_element(By.CSS_SELECTOR, "[data-chart=memory] polyline")
    assert line.get_attribute("points")
    assert "mode:" in text(page, "#plan")
    assert not page.find_element(By.CSS_SELECTOR, "[data-chart=device]").is_displayed()
    page.find_element(By.ID, "stop").click()


def test_a_device_has_a_chart(browser: Any, tmp_path: Path) -> None:
    path = tiny.make_text_model(tmp_path / "m.gguf", chat=True)
    flags = ("--device", "CPU", "--vram", "16M", "--dispatch", "split")
    with served(path, "-c", "32768", *flags) as running:
        browser.get(running.url)
        browser.find_element(By.TAG_NAME, "summary").click()
        ask(browser, "one two", "30000")
        until(browser, lambda: text(browser, "[data-chart=device] output").endswith("%"))
        until(browser, lambda: text(browser, "[data-chart=device] output") != "0 %")
        browser.find_element(By.ID, "stop").click()
        browser.get("about:blank")


def test_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True},
    )
    try:
        width = page.execute_script("return document.documentElement.scrollWidth")
        assert width <= 360
        send = page.find_element(By.ID, "send")
        assert send.is_displayed() and send.size["height"] >= 44
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_has_a_name_and_nothing_breaks_the_policy(page: Any, server: Server) -> None:
    names = page.execute_script(
        "return [...document.querySelectorAll('button, input, textarea, svg, ol')].map(e => "
        "e.ariaLabel || e.getAttribute('aria-label') || e.labels?.[0]?.textContent || "
        "e.textContent)"
    )
    assert names and all(name.strip() for name in names)
    severe = [e for e in page.get_log("browser") if e["level"] == "SEVERE"]
    # Before the key was given its requests were refused; a policy's violation would say so.
    assert [e for e in severe if "401" not in e["message"]] == []
    policy = server.ask("/").headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert server.ask("/ui/app.js").headers["Content-Security-Policy"] == policy


def test_without_the_key_the_page_says_so(server: Server, browser: Any) -> None:
    browser.get(server.url)
    until(browser, lambda: "API key" in text(browser, "#state"))
    ask_without = browser.find_element(By.ID, "prompt")
    ask_without.send_keys("one", Keys.ENTER)
    until(browser, lambda: "API key is needed" in text(browser, "#notice"))
    assert browser.find_elements(By.CSS_SELECTOR, "li.assistant") == []


def test_a_word_of_markup_is_shown_as_it_is(page: Any) -> None:
    ask(page, "<img src=x onerror=alert(1)>", "3")
    until(page, lambda: "3 tokens" in text(page, "li.assistant .cost"))
    assert text(page, "li.user .text") == "<img src=x onerror=alert(1)>"
    assert page.find_elements(By.CSS_SELECTOR, "#log img") == []


def test_a_page_of_a_server_that_has_not_loaded_its_model(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tiny.make_text_model(tmp_path_factory.mktemp("lazy") / "m.gguf", chat=True)
    with served(path, "-c", "512", "--lazy") as server:
        browser.get(server.url)
        browser.find_element(By.TAG_NAME, "summary").click()
        until(browser, lambda: "a message loads it" in text(browser, "#state"))
        assert "not loaded yet" in text(browser, "#model") and "NaN" not in text(browser, "body")
        ask(browser, "one", "3")
        until(browser, lambda: "3 tokens" in text(browser, "li.assistant .cost"))
        until(browser, lambda: "mode:" in text(browser, "#plan"))


def test_the_page_needs_nothing_from_elsewhere() -> None:
    folder = Path(__file__).parent.parent / "hobbit" / "serve" / "static"
    for path in folder.iterdir():
        plain = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in plain, path.name
