"""A headless Chromium that looks at the page, and what it complains about."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
_WATCH = """addEventListener("securitypolicyviolation",
    (event) => console.error(`policy: ${event.violatedDirective} ${event.blockedURI}`))"""
PATIENCE_MS = 30_000.0


def find_browser() -> str:
    """Return the path of a Chromium; skips the test on a machine without one."""
    found = next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(_NAMES)}")
    return found


@contextlib.contextmanager
def open_browser() -> Iterator[Any]:
    """Start a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright comes with the test extra")
    path = find_browser()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=[*_FLAGS])
        yield browser
        browser.close()


class Visit:
    """A tab with the page in it.

    Attributes:
        page: of playwright.
        complaints: errors and warnings of its console, exceptions nobody caught, and what the policy has blocked.
        foreign: addresses of other places that it has asked for something.
    """

    def __init__(self, browser: Any, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        self._context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light"
        )
        self._context.add_init_script(_WATCH)
        self.page = self._context.new_page()
        self.page.set_default_timeout(PATIENCE_MS)
        self.url = url
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(f"exception: {error}"))
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        is_refusal = "the server responded with a status of 401" in message.text  # Chromium notes it by itself
        if message.type in ("error", "warning") and not is_refusal:
            self.complaints.append(f"{message.type}: {message.text}")

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:")):
            self.foreign.append(request.url)

    def open(self, path: str = "/") -> Any:
        """Load the page, wait until it has heard from the head, and return it."""
        self.page.goto(self.url + path)
        self.page.locator("#health:not(:text-is('connecting'))").wait_for()  # a function would need `eval`
        return self.page

    def focused(self) -> str:
        """Return the id, or the text, of the element with the focus."""
        found: str = self.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()")
        return found

    def press_until(self, key: str, element: str, most: int = 40) -> None:
        """Press a key until an element has the focus."""
        for _ in range(most):
            if self.focused() == element:
                return
            self.page.keyboard.press(key)
        raise AssertionError(f"{element} cannot be reached, the focus is at {self.focused()}")

    def is_too_wide(self) -> bool:
        """Whether the page scrolls sideways."""
        found: bool = self.page.evaluate("document.documentElement.scrollWidth > innerWidth")
        return found

    def close(self) -> None:
        """Close the tab, and fail where the browser has complained."""
        self._context.close()
        assert self.complaints == []
        assert self.foreign == []


def accessibility_problems(page: Any) -> list[str]:
    """Return what axe-core finds wrong: names, labels, roles, contrast, landmarks, order of headings."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="it comes with the test extra")
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['help']}: {node['html'][:200]}" for one in found for node in one["nodes"]]
