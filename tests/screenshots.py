"""The pictures of the report in docs/images.

`python -m tests.screenshots` trains the quick demo and takes them; `python -m tests.screenshots RUN...` takes them of
these run files.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from selenium.webdriver.common.keys import Keys

from repflow.monitor.demo.options import Demo
from repflow.monitor.demo.run import run_demo
from repflow.monitor.report import write_report
from tests.monitor.report.browser import Browser, chromium

IMAGES = Path(__file__).parents[1] / "docs" / "images"
WIDTH = 1280
MARGIN = 12


def take_all(runs: Sequence[Path], folder: Path) -> None:
    """Take all pictures of a page of the runs, which is written to the folder."""
    page = write_report(runs, folder / "report.html")
    IMAGES.mkdir(exist_ok=True)
    with chromium(folder / "profile") as browser:
        browser.open(page, width=WIDTH)
        take(browser, "report-light", "#inter-token")
        take(browser, "report-compare", "#compare")
        browser.open(page, width=WIDTH, dark=True)
        for _ in range(3):
            browser.one("#step").send_keys(Keys.ARROW_LEFT)
        browser.drawn()
        browser.run("document.activeElement.blur()")
        take(browser, "report-dark", "#adjacent")


def take(browser: Browser, name: str, section: str) -> None:
    """A picture of one section of the page."""
    box = browser.run(
        "const { top, bottom } = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [top + scrollY, bottom - top]",
        section,
    )
    target = IMAGES / f"{name}.png"
    browser.screenshot(target, x=0, y=box[0] - MARGIN, width=WIDTH, height=box[1] + 2 * MARGIN)
    with Image.open(target) as image:
        opaque = image.convert("RGB")
    opaque.save(target, optimize=True)
    print(f"{target.name}: {opaque.width} × {opaque.height}, {target.stat().st_size / 1000:.0f} kB")


def main(arguments: Sequence[str]) -> None:
    """Of the run files that are named, or of a demo."""
    with TemporaryDirectory() as scratch:
        runs = [Path(argument) for argument in arguments]
        if not runs:
            demo = Demo.of_size("small", quick=True, folder=Path(scratch))
            runs = [outcome.run_file for outcome in run_demo(demo).outcomes]
        take_all(runs, Path(scratch))


if __name__ == "__main__":
    main(sys.argv[1:])
