"""A headless Chromium that tests and screenshots drive."""

import base64
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select, WebDriverWait

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 30
"""Seconds until something that should happen is given up."""


class Browser:
    """A headless Chromium that remembers what pages asked the network for and complained of."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path | str, *, width: int = 1366, height: int = 768, dark: bool = False) -> None:
        """Open a page of the report as if for the first time, and wait until all of its figures are drawn."""
        self.visit(page, width=width, height=height, dark=dark)
        self.drawn()

    def visit(self, page: Path | str, *, width: int = 1366, height: int = 768, dark: bool = False) -> None:
        """Open any page."""
        self.driver.get("about:blank")
        # Those of the page before are none of this one's.
        self.requests()
        self.complaints()
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )
        self.prefer("dark" if dark else "light")
        self.driver.get(page.as_uri() if isinstance(page, Path) else page)

    def drawn(self) -> None:
        """Wait until all figures are those that should be there."""
        self.wait("return document.documentElement.dataset.drawn === 'all'")

    def wait(self, script: str, *arguments: Any) -> Any:
        """Wait until a script returns something true; what it returned."""
        waiting = WebDriverWait(self.driver, PATIENCE, poll_frequency=0.02)
        return waiting.until(lambda driver: driver.execute_script(script, *arguments), f"never: {script}")

    def prefer(self, scheme: str) -> None:
        """What the system prefers, light or dark."""
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def requests(self) -> list[str]:
        """Addresses asked for since the last call, without those that hold their own content."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [
            entry["params"]["request"]["url"] for entry in messages if entry["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith(("data:", "blob:", "about:"))]

    def complaints(self) -> list[str]:
        """What the console said since the last call."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def run(self, script: str, *arguments: Any) -> Any:
        """What a script returns."""
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        """All elements that a selector finds."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        """The first element that a selector finds."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def choose(self, selector: str, text: str) -> None:
        """Choose an entry of a list, and wait until the figures have followed."""
        entries = self.one(selector)
        self.run("window.chose = false; arguments[0].addEventListener('change', () => (window.chose = true))", entries)
        Select(entries).select_by_visible_text(text)
        self.wait("return window.chose")
        self.drawn()

    def hover(self, selector: str) -> str:
        """What the figure says when the pointer rests on the middle of an element."""
        element = self.one(selector)
        self.run("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver, duration=0).move_to_element(element).perform()
        return self.wait("return document.querySelector('.hoverlayer .hovertext')?.textContent")

    def screenshot(self, target: Path, **clip: float) -> None:
        """A PNG of what is shown, or of the place `x, y, width, height` of the whole page."""
        options = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
        image = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", **options})
        target.write_bytes(base64.b64decode(image["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own.

    Raises:
        FileNotFoundError: Chromium or its driver is missing.
    """
    binary, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not binary or not driver:
        raise FileNotFoundError(
            "expected chromium and chromedriver; install them: apt-get install chromium chromium-driver"
        )
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield Browser(chrome)
    finally:
        chrome.quit()
