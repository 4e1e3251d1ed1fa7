"""The page of `reproduce report` in a real browser, from `file://`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.support.ui import Select

from tests.monitor.report.browser import Browser, chromium


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_everything_is_there_without_a_request(browser: Browser, page: Path):
    browser.visit(page)
    sections = browser.all("section")
    names = [*(f"figure{number}" for number in range(1, 8)), "table1", "table2"]
    assert [section.get_attribute("id") for section in sections] == names
    assert all(svg.size["width"] > 300 for svg in browser.all("figure.picture svg"))
    assert len(browser.all("figure.picture svg")) == len(names)
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []
    assert browser.driver.execute_script(
        "const ids = [...document.querySelectorAll('[id]')].map(({id}) => id); "
        "return ids.filter((id, place) => ids.indexOf(id) !== place)"
    ) == []  # fmt: skip
    assert browser.driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_pictures_follow_the_theme(browser: Browser, page: Path):
    ink = (
        "return getComputedStyle(document.querySelector('#figure3 svg text')).fill + "
        "getComputedStyle(document.body).color"
    )
    browser.visit(page)
    light = browser.driver.execute_script(ink)
    assert light == "rgb(28, 33, 38)" * 2
    Select(browser.all("#theme")[0]).select_by_value("dark")
    assert browser.driver.execute_script(ink) == "rgb(228, 232, 235)" * 2


def test_claims_are_told_case_by_case(browser: Browser, page: Path):
    browser.visit(page)
    heads = [head.text for head in browser.all("#figure3 h3")]
    assert heads[1].startswith("State-space models stay within 0.1 of 0 at every state: in ")
    cells = browser.driver.execute_script(
        "const table = document.querySelectorAll('#figure3 table')[1]; "
        "return [...table.querySelectorAll('tbody tr')].map((row) => [...row.cells].map((cell) => cell.textContent))"
    )
    assert [row[:2] for row in cells] == [[m, s] for s in ("default", "gaussian") for m in ("mamba", "mamba2")]
    assert all(cell[0] in "✓✗–" for row in cells for cell in row[2:])
