"""A headless Chromium for the tests of pages; they are skipped, with the reason, where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def open_page(path: Path, **options) -> Iterator:
    """A Playwright page that shows the file, and fails on leaving when anything was written to its console."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra dev")
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    with playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(**options)
        said, asked = [], []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        try:
            page.goto(path.resolve().as_uri())
            yield page
            assert said == []
            assert [url for url in asked if not url.startswith(("data:", path.resolve().as_uri()))] == []
        finally:
            browser.close()
