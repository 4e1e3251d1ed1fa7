"""The page in a real browser, from `file://`."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

from repflow.monitor.report import write_report

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
HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'><a href='x'>%{x}</a>"


class Browser:
    """A headless Chromium that remembers what pages asked the network for and complained of."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, page: Path, *, width: int = 1366, dark: bool = False) -> None:
        self.driver.get("about:blank")
        # Those of the page before are none of this one's.
        self.requests()
        self.complaints()
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 768, "deviceScaleFactor": 1, "mobile": False},
        )
        self.prefer("dark" if dark else "light")
        self.driver.get(page.as_uri())

    def prefer(self, scheme: str) -> None:
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
        return self.driver.execute_script(script, *arguments)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.fail("expected chromium and chromedriver; install them: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield Browser(chrome)
    chrome.quit()


@pytest.fixture
def page(write_run, tmp_path: Path) -> Path:
    """Two runs of different depth and schedule."""
    runs = [
        write_run("tbm", ["attention"] * 8, steps=range(0, 100, 10)),
        write_run("hybrid", ["ssm", "ssm", "attention"] * 4, steps=range(0, 60, 15)),
    ]
    return write_report(runs, tmp_path / "report.html")


def test_the_page_draws_everything_without_network_or_complaint(browser: Browser, page: Path):
    browser.open(page)
    plots = browser.all("[data-figure]")
    assert len(plots) == 20
    drawn = [plot.find_elements(By.CSS_SELECTOR, ".heatmaplayer image, .scatterlayer .trace path") for plot in plots]
    assert all(drawn)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_the_log_sees_requests_and_complaints(browser: Browser, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<link rel=icon href='data:,'><img src=absent.png><script>absent()</script>")
    browser.open(page)
    assert browser.requests() == [page.as_uri(), (tmp_path / "absent.png").as_uri()]
    assert any("absent is not defined" in text for text in browser.complaints())


def shown_cka(browser: Browser) -> list[tuple[str, str, float]]:
    """Per run: the caption, the step, and CKA of the first and last state in the drawn matrix."""
    return [
        (
            plot.find_element(By.XPATH, "../figcaption//output").text,
            str(plot.get_attribute("data-step")),
            browser.run("const z = arguments[0].data[0].z; return z[0][z.length - 1]", plot),
        )
        for plot in browser.all("#cka [data-figure]")
    ]


def test_the_slider_moves_all_runs_to_the_nearest_step(browser: Browser, page: Path):
    browser.open(page)
    slider = browser.all("#cka-slider")[0]
    last = shown_cka(browser)
    assert [(caption, step) for caption, step, _ in last] == [("step 90", "90"), ("step 45", "45")]
    for _ in range(8):  # 90 80 70 60 50 45 40 30 20
        slider.send_keys(Keys.ARROW_LEFT)
    shown = shown_cka(browser)
    assert browser.all("#cka-step")[0].text == "step 20"
    assert slider.get_attribute("aria-valuetext") == "step 20"
    assert [(caption, step) for caption, step, _ in shown] == [("step 20", "20"), ("step 15", "15")]
    slider.send_keys(Keys.HOME)
    first = shown_cka(browser)
    assert [step for _, step, _ in first] == ["0", "0"]
    for values in zip(first, shown, last, strict=True):
        assert values[0][2] > values[1][2] > values[2][2]  # the made-up runs drift apart
    assert browser.complaints() == []


def test_the_drawn_matrix_is_symmetric(browser: Browser, page: Path):
    browser.open(page)
    matrix = browser.run("return document.querySelector('#cka [data-figure]').data[0].z")
    assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    assert [row[index] for index, row in enumerate(matrix)] == [1.0] * 9


def test_nothing_is_wider_than_the_window_and_no_title_is_cut(browser: Browser, page: Path):
    for width in (320, 900, 1280, 1440):
        browser.open(page, width=width)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        cut = browser.run(
            """return [...document.querySelectorAll('[data-figure]')].flatMap((plot) => {
                const frame = plot.getBoundingClientRect();
                return [...plot.querySelectorAll('.xtitle, .ytitle, .xtick, .ytick')]
                    .filter((text) => {
                        const box = text.getBoundingClientRect();
                        return box.left < frame.left || box.right > frame.right
                            || box.top < frame.top || box.bottom > frame.bottom;
                    })
                    .map((text) => text.textContent);
            })"""
        )
        assert cut == []


def test_colours_follow_the_system(browser: Browser, page: Path):
    background = "return document.querySelector('[data-figure]')._fullLayout.paper_bgcolor"
    browser.open(page, dark=True)
    dark = browser.run(background)
    browser.prefer("light")
    # The page hears of the change with its next frame.
    browser.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    light = browser.run(background)
    assert dark != light == "#ffffff"
    assert browser.complaints() == []


def test_hostile_names_do_nothing(browser: Browser, write_run, tmp_path: Path):
    run = write_run(
        HOSTILE,
        [HOSTILE, "ssm"],
        block_name=HOSTILE,
        file="a.db",
        scalars=lambda index: {"loss": 1.0, HOSTILE: 2.0},
    )
    page = write_report([run], tmp_path / "report.html")
    browser.open(page)
    assert browser.run("return window.broken") is None
    assert browser.all("main img, main script, svg a, #loss a") == []
    captions = [element.text for element in browser.all("#loss figcaption")]
    assert captions == ["loss", HOSTILE]
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_a_page_without_snapshots(browser: Browser, write_run, tmp_path: Path):
    page = write_report([write_run("void", steps=[])], tmp_path / "report.html")
    browser.open(page)
    assert "No snapshot has been written yet" in browser.all(".warning")[0].text
    assert browser.complaints() == []


def test_long_names_do_not_make_the_page_wider_than_the_window(browser: Browser, write_run, tmp_path: Path):
    runs = [
        write_run(name, [name, "ssm"], block_name=name, scalars=lambda index: {"loss": 1.0, "y" * 200: 2.0})
        for name in ("x" * 200, "short")
    ]
    page = write_report(runs, tmp_path / "report.html")
    for width in (360, 1366):
        browser.open(page, width=width)
        assert browser.run("return document.documentElement.scrollWidth") <= width
