"""A headless Chromium, and pages opened in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import pages

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def unavailable(reason: str) -> None:
    """Skip; where the browser was asked for (make test-browser), fail."""
    if os.environ.get("SPALF_TEST_BROWSER") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, as the operating system's package installs it."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        unavailable(f"no browser: none of {', '.join(BROWSERS)} is installed (make test-browser)")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        unavailable("playwright is not installed (make test-browser)")
    with sync_playwright() as playwright:
        # Chromium's own sandbox needs privileges that containers do not have.
        running = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page whose contents are known."""
    path = tmp_path_factory.mktemp("planted") / "a page.html"
    path.write_bytes(pages.planted_page())
    return path


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of an SAE of which little is known."""
    path = tmp_path_factory.mktemp("plain") / "plain.html"
    path.write_bytes(pages.plain_page())
    return path


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 8192 features."""
    path = tmp_path_factory.mktemp("large") / "large.html"
    path.write_bytes(pages.large_page())
    return path


Open = Callable[..., Any]
Axe = Callable[[Any], dict[str, Any]]


def wait_until(page: Any, expression: str) -> None:
    """Wait for something to be true in a page; its policy forbids playwright's own way."""
    for _ in range(300):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise TimeoutError(expression)


@pytest.fixture(scope="session")
def axe() -> Axe:
    """Run axe-core over a page; its findings."""
    try:
        from axe_playwright_python.sync_playwright import Axe as Runner
    except ImportError:
        unavailable("axe-playwright-python is not installed (make test-browser)")
    runner = Runner()
    return lambda page: runner.run(page).response


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """Open a page; at the end, nothing may have gone wrong or asked for the network."""
    contexts, faults = [], []

    def opened(path: Path, address: str = "", width: int = 1440, **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        page.on("console", lambda message: faults.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: faults.append(f"error: {error}"))
        page.on("dialog", lambda dialog: faults.append(f"dialog: {dialog.message}"))
        page.on(
            "request",
            lambda request: (
                request.url.startswith(path.as_uri())
                or request.url.startswith(("data:", "blob:"))
                or faults.append(f"request: {request.url}")
            ),
        )
        page.goto(path.as_uri() + address)
        wait_until(page, "performance.getEntriesByName('ready').length > 0")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not faults
