"""The page in a real browser, from `file://`."""

from functools import partial
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from repflow.monitor.report import write_report
from tests.monitor.report.browser import Browser
from tests.monitor.report.made_up import write_run_file

HOSTILE = "</script><script>window.broken=1</script><img src=x onerror='window.broken=1'><a href='x'>%{x}</a>"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of different depth and schedule, one with state-space values."""
    folder = tmp_path_factory.mktemp("page")
    write_run = partial(write_run_file, folder)
    runs = [
        write_run("tbm", ["attention"] * 8, steps=range(0, 100, 10), probe=True),
        write_run("hybrid", ["ssm", "ssm", "attention"] * 4, steps=range(0, 60, 15), ssm_blocks=[0, 1, 3, 4, 6, 7]),
    ]
    return write_report(runs, folder / "report.html")


def test_the_page_draws_everything_without_network_or_complaint(browser: Browser, page: Path):
    browser.open(page)
    plots = browser.all(".plot:not([hidden])")
    assert len(plots) == 42
    traces = ".heatmaplayer image, .scatterlayer .trace path"
    assert not [plot.get_attribute("id") for plot in plots if not plot.find_elements(By.CSS_SELECTOR, traces)]
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_the_log_sees_requests_and_complaints(browser: Browser, tmp_path: Path):
    page = tmp_path / "bad.html"
    page.write_text("<link rel=icon href='data:,'><img src=absent.png><script>absent()</script>")
    browser.visit(page)
    assert browser.requests() == [page.as_uri(), (tmp_path / "absent.png").as_uri()]
    assert any("absent is not defined" in text for text in browser.complaints())


def test_the_page_could_not_ask_the_network(browser: Browser, page: Path, tmp_path: Path):
    changed = tmp_path / "changed.html"
    changed.write_text(page.read_text().replace("</main>", "</main><img src='http://127.0.0.1:9/x.png'>"))
    browser.visit(changed)
    assert any("Content Security Policy" in text for text in browser.complaints())


def shown(browser: Browser, section: str, value: str) -> list[tuple[str, float]]:
    """Per figure of a section that follows the slider: its caption, and a value of what is drawn."""
    return [
        (plot.find_element(By.XPATH, "../figcaption//output").text, browser.run(f"return arguments[0].{value}", plot))
        for plot in browser.all(f"#{section} .plot[data-step]")
    ]


def test_the_slider_moves_all_runs_to_the_nearest_step(browser: Browser, page: Path):
    browser.open(page)
    slider, value = browser.one("#step"), "data[0].z[0].at(-1)"
    last = shown(browser, "cka", value)
    assert [caption for caption, _ in last] == ["step 90", "step 45"]
    for _ in range(8):  # 90 80 70 60 50 45 40 30 20
        slider.send_keys(Keys.ARROW_LEFT)
    browser.drawn()
    between = shown(browser, "cka", value)
    assert browser.one("#shown-step").text == "step 20"
    assert slider.get_attribute("aria-valuetext") == "step 20"
    assert [caption for caption, _ in between] == ["step 20", "step 15"]
    slider.send_keys(Keys.HOME)
    browser.drawn()
    first = shown(browser, "cka", value)
    assert [caption for caption, _ in first] == ["step 0", "step 0"]
    for (_, one), (_, two), (_, three) in zip(first, between, last, strict=True):
        assert one > two > three  # the made-up runs drift apart
    assert browser.complaints() == []


def test_maps_curves_and_quantiles_follow_the_slider(browser: Browser, page: Path):
    places = {
        "#adjacent-1-0": "data[0].z[63][7]",  # last position, last block
        "#inter-token-1-0": "data.find(({ meta }) => meta.run === 0).y.at(-1)",
        "#ssm-0-0": "data[1].error_y.array[0]",
        "#drift-1-0": "data.find(({ meta }) => meta.run === 0).y.at(-1)",
    }
    browser.open(page)
    reading = "return document.querySelector(arguments[0])."
    last = [browser.run(reading + value, place) for place, value in places.items()]
    browser.one("#step").send_keys(Keys.HOME)
    browser.drawn()
    first = [browser.run(reading + value, place) for place, value in places.items()]
    assert last[:2] == pytest.approx([1.0, 0.85], abs=1e-4)
    assert first[:2] == pytest.approx([0.8, 0.25], abs=1e-4)
    assert first[2] != last[2]
    assert (first[3], last[3]) == (1.0, pytest.approx(0.4, abs=1e-4))
    start = "return document.querySelector('#inter-token-1-0').data.find(({ line }) => line.dash === 'dot').y.at(-1)"
    assert browser.run(start) == 0.25  # before the first update, whatever the step


def test_the_drawn_matrix_is_symmetric(browser: Browser, page: Path):
    browser.open(page)
    matrix = browser.run("return document.querySelector('#cka .plot').data[0].z")
    assert matrix == [list(column) for column in zip(*matrix, strict=True)]
    assert [row[index] for index, row in enumerate(matrix)] == pytest.approx([1.0] * 9)


HOVERS = {
    "#inter-token-0-0 .nsewdrag": ["step", "attention, layers.", "inter-token similarity 0."],
    "#adjacent-1-0 .nsewdrag": ["block 4", "position 0.49", "cosine 0."],
    "#cka-0-0 .nsewdrag": ["compared with state 4", "CKA 1"],
    "#drift-0-0 .nsewdrag": ["step 50", "state 4, after block 3", "CKA with the first measurement 0."],
    "#drift-2-0 .nsewdrag": ["step 50", "CKA with the measurement before 0."],
    "#variation-0-0 .point:nth-of-type(5)": ["tbm", "V_loc 0.", "stream units"],
    "#health-0-0 .point:nth-of-type(5)": ["Monitor overhead 20 ms"],
    "#ssm-0-0 .trace:nth-of-type(2) .point:nth-of-type(5)": ["block 6", "ssm", "median", "tokens", "half of all:"],
    "#compare-0-0 .point:nth-of-type(5)": ["relative depth 0.50", "A 0.", "B 0.", "A − B 0"],
}


def test_hovering_tells_values_and_units(browser: Browser, page: Path):
    browser.open(page)
    for place, expected in HOVERS.items():
        text = browser.hover(place)
        assert not [part for part in expected if part not in text], f"{place}: {text}"


def test_nothing_is_wider_than_the_window_and_no_title_is_cut(browser: Browser, page: Path):
    for width in (320, 800, 1280, 1440):
        browser.open(page, width=width)
        assert browser.run("return document.documentElement.scrollWidth") <= width
        cut = browser.run(
            """return [...document.querySelectorAll('.plot:not([hidden])')].flatMap((plot) => {
                const frame = plot.getBoundingClientRect();
                return [...plot.querySelectorAll('.xtitle, .ytitle, .xtick, .ytick')]
                    .filter((text) => {
                        const box = text.getBoundingClientRect();
                        return box.left < frame.left || box.right > frame.right
                            || box.top < frame.top || box.bottom > frame.bottom;
                    })
                    .map((text) => `${plot.id}: ${text.textContent}`);
            })"""
        )
        assert cut == []


def test_hostile_names_do_nothing(browser: Browser, write_run, tmp_path: Path, alert_runs):
    alert = {"step": 10, "severity": HOSTILE, "states": [1]}
    alert_runs({HOSTILE: [alert | dict.fromkeys(("signature", "title", "message", "suggestion"), HOSTILE)]})
    runs = [
        write_run(
            HOSTILE,
            [HOSTILE, "ssm"],
            block_name=HOSTILE,
            file=file,
            scalars=lambda index: {"loss": 1.0, HOSTILE: 2.0},
        )
        for file in ("a.db", "b.db")
    ]
    page = write_report(runs, tmp_path / "report.html")
    browser.open(page)
    assert browser.run("return window.broken") is None
    assert browser.all("main img, main script, svg a, #loss a, option a") == []
    captions = [element.text for element in browser.all("#loss figcaption")]
    assert captions == ["loss", HOSTILE]
    assert browser.requests() == [page.as_uri()]
    assert browser.complaints() == []


def test_a_page_without_snapshots(browser: Browser, write_run, tmp_path: Path):
    page = write_report([write_run("void", steps=[])], tmp_path / "report.html")
    browser.open(page)
    assert "No snapshot has been written yet" in browser.one(".warning").text
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


def test_one_snapshot_of_one_block(browser: Browser, write_run, tmp_path: Path):
    page = write_report([write_run("a", ["mlp"], steps=[7])], tmp_path / "report.html")
    browser.open(page)
    assert browser.one("#shown-step").text == "step 7"
    assert browser.complaints() == []
