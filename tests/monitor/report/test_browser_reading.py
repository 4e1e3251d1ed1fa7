"""How the page is read in a browser: by keys, in the dark, on paper; alerts, and differences of runs."""

import base64
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from repflow.monitor.report import write_report
from tests.monitor.report.browser import Browser
from tests.monitor.report.made_up import write_run_file

ALERT = {
    "step": 20,
    "signature": "collapse",
    "severity": "error",
    "title": "Tokens collapse",
    "message": "Inter-token similarity rose to 0.85 at state 3.",
    "suggestion": "Lower the learning rate.",
    "states": [3],
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs a and b of equal depth and different values, and c of another depth and estimator."""
    folder = tmp_path_factory.mktemp("page")
    write_run = partial(write_run_file, folder)

    def lower(parts, index):
        parts["inter_token"].mul_(0.5)
        parts["hsic"][0, 1:].mul_(0.9)
        parts["hsic"][1:, 0].mul_(0.9)

    runs = [
        write_run("a"),
        write_run("b", change=lower, steps=(0, 10, 40)),
        write_run("c", ["conv"] * 6, estimator="biased"),
    ]
    return write_report(runs, folder / "report.html")


@pytest.fixture
def opened(browser: Browser, page: Path) -> Iterator[Browser]:
    """The page just opened; what the reader chose is forgotten after the test."""
    browser.open(page)
    yield browser
    assert browser.complaints() == []
    browser.run("localStorage.clear()")


def focused(browser: Browser) -> str:
    """Name of the focused element as a screen reader tells it, where there is one that can be seen."""
    return browser.run(
        """const now = document.activeElement, style = getComputedStyle(now);
        const label = now.labels?.[0]?.textContent ?? now.getAttribute('aria-label') ?? now.textContent.trim();
        return style.outlineStyle === 'none' ? `${label} without an outline` : label"""
    )


def test_everything_is_reached_by_keys_in_reading_order(opened: Browser):
    names = []
    for _ in range(7):
        opened.driver.switch_to.active_element.send_keys(Keys.TAB)
        names.append(focused(opened))
    figures = ["Inter-token similarity", "Updates Δh"]
    assert names == ["Skip to the figures", "Training step", "Colours", "Alerts", "Runs", *figures]


def test_whatever_takes_the_focus_has_a_name(opened: Browser):
    nodes = opened.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    focusable = [
        node
        for node in nodes
        if any(entry["name"] == "focusable" and entry["value"]["value"] for entry in node.get("properties", []))
        and node["role"]["value"] not in ("RootWebArea", "main", "MenuListPopup")
    ]
    assert len(focusable) > 20
    assert [node["role"] for node in focusable if not node["name"]["value"]] == []
    figures = [node["name"]["value"] for node in nodes if node["role"]["value"] == "image"]
    assert "CKA of every pair of states (biased and unbiased estimator), chosen step: a" in figures


SHOWN = "return document.querySelector('.hoverlayer .hovertext')?.textContent"


KEYS = {"→": Keys.ARROW_RIGHT, "↑": Keys.ARROW_UP, "↓": Keys.ARROW_DOWN}
PATHS = {
    ("cka-0-0", "→↑→↑↑↑↑"): "state 3, after block 2, ssm, layers.2, compared with state 1, CKA ",
    ("adjacent-1-0", "→↓→"): "block 1, mlp, layers.1, position 0.02 of the sequence, cosine ",
    ("inter-token-0-1", "→→→→"): "step 40, state 0, input of block 0, inter-token similarity ",
    ("variation-0-0", "→↑→"): "b, step 10, V_loc 0.2 stream units",
    ("compare-0-0", "→→"): "A at step 20, B at step 40, state 1, A 0.3167, B 0.1583, A − B 0.1583",
}


def test_the_values_of_figures_are_reached_by_keys(opened: Browser):
    for (figure, keys), expected in PATHS.items():
        plot = opened.one(f"#{figure}")
        plot.send_keys("".join(KEYS[key] for key in keys))
        opened.wait("return document.getElementById('said').textContent.startsWith(arguments[0])", expected)
        assert opened.run(SHOWN)
        assert "without an outline" not in focused(opened)
        plot.send_keys(Keys.TAB)
        assert not opened.run(SHOWN)


def test_a_definition_is_one_click_or_key_away(opened: Browser):
    definition = opened.one("#define-cka")
    assert not opened.one("#define-cka dl").is_displayed()
    opened.one("#define-cka summary").send_keys(Keys.ENTER)
    assert "HSIC(a, b) / √" in definition.text
    assert "dimensionless" in definition.text
    assert opened.one("#define-cka a").get_attribute("href") == "https://arxiv.org/abs/2510.06640"
    opened.one("#define-cka summary").click()
    assert not opened.one("#define-cka dl").is_displayed()


CONTRAST = """
const channel = (value) => (value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
const light = (color) => {
    const [red, green, blue] = color.match(/[\\d.]+/g).map((part) => channel(part / 255));
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
};
const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
        const color = getComputedStyle(at).backgroundColor;
        if (!color.endsWith(', 0)')) return color;
    }
};
return [...document.querySelectorAll('body *')]
    .filter((element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((element) => element.checkVisibility() && !element.closest('.plot, script, noscript'))
    .map((element) => {
        const values = [light(getComputedStyle(element).color), light(ground(element))].sort((a, b) => b - a);
        return [(values[0] + 0.05) / (values[1] + 0.05), element.tagName, element.textContent.slice(0, 40)];
    })
    .filter(([ratio, tag, text]) => ratio < 4.5 && !'◆▼●'.includes(text));
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_texts_stand_out_from_their_ground(browser: Browser, page: Path, dark: bool):
    browser.open(page, dark=dark)
    assert browser.run(CONTRAST) == []


GROUND = "return document.querySelector('.plot')._fullLayout.paper_bgcolor"


def test_colours_follow_the_system_until_the_reader_chooses(browser: Browser, page: Path):
    browser.open(page, dark=True)
    dark = browser.run(GROUND)
    browser.prefer("light")
    browser.wait(f"return ({GROUND[7:]}) === '#ffffff'")
    browser.choose("#theme", "dark")
    assert browser.run(GROUND) == dark != "#ffffff"
    browser.driver.refresh()
    browser.drawn()
    assert browser.run(GROUND) == dark  # remembered, though the system prefers light
    browser.choose("#theme", "system")
    assert browser.run(GROUND) == "#ffffff"
    assert browser.complaints() == []


def test_on_paper_it_is_light_whole_and_without_controls(browser: Browser, page: Path):
    browser.open(page, dark=True)
    browser.one("#step").send_keys(Keys.HOME)
    browser.drawn()
    browser.run("""addEventListener('beforeprint', () => {
        const plots = [...document.querySelectorAll('.plot:not([hidden])')];
        window.printed = {
            ground: plots.map((plot) => plot._fullLayout.paper_bgcolor),
            widest: Math.max(...plots.map((plot) => plot.querySelector('.main-svg').getBoundingClientRect().width)),
            step: document.querySelector('#cka .shown').textContent,
        };
    })""")
    options = {"printBackground": True, "paperWidth": 8.27, "paperHeight": 11.69}
    paper = base64.b64decode(browser.driver.execute_cdp_cmd("Page.printToPDF", options)["data"])
    assert paper.startswith(b"%PDF") and len(paper) > 100_000
    printed = browser.run("return window.printed")
    assert set(printed["ground"]) == {"#ffffff"}
    assert printed["widest"] <= 700
    assert printed["step"] == "step 0"
    browser.drawn()
    assert browser.run(GROUND) != "#ffffff"  # dark again
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    hidden = [browser.one(selector).is_displayed() for selector in (".toolbar", "nav", "#compare-A")]
    browser.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
    assert hidden == [False] * 3
    assert browser.complaints() == []


def difference(browser: Browser, place: str) -> list[float | None]:
    browser.drawn()
    return browser.run("const [trace] = document.querySelector(arguments[0]).data; return trace.y", place)


def halves(rise: float) -> list[float]:
    """What a has at its states, halved, as b has it."""
    return [(0.05 + rise * state / 3) / 2 for state in range(4)]


def test_the_difference_of_two_runs_of_equal_depth(opened: Browser):
    assert difference(opened, "#compare-0-0") == pytest.approx(
        [(0.05 + 0.8 * state / 3) / 2 for state in range(4)], abs=1e-4
    )
    assert opened.one("#compare figcaption output").text == "A at step 20, B at step 40"
    matrix = opened.run("return document.querySelector('#compare-1-0').data[0]")
    assert [row[0] for row in matrix["z"]] == pytest.approx([0.0, 0.0311, 0.0097, 0.003], abs=2e-4)
    assert matrix["zmax"] == -matrix["zmin"] > 0.03
    # b has no snapshot at step 20: its loss there lies between 4 / 2 at 10 and 4 / 3 at 40
    assert difference(opened, "#compare-2-2") == pytest.approx([0, 0, 4 / 3 - (2 - 2 / 9)], abs=1e-3)
    opened.one("#step").send_keys(Keys.HOME)
    assert difference(opened, "#compare-0-0") == pytest.approx(
        [(0.05 + 0.2 * state / 3) / 2 for state in range(4)], abs=1e-4
    )


def test_runs_of_other_depth_are_compared_by_relative_depth_alone(opened: Browser):
    opened.choose("#compare-B", "c")
    # c has the same values at the same relative depths
    assert difference(opened, "#compare-0-0") == pytest.approx([0.0] * 4, abs=1e-4)
    captions = [caption.text for caption in opened.all("#compare figcaption")]
    assert [caption for caption in captions if "not comparable: 3 and 6 blocks" in caption] == captions[4:6]
    assert not opened.one("#compare-1-0").is_displayed()
    opened.choose("#compare-B", "b")
    assert opened.one("#compare-1-0").is_displayed()


def test_the_difference_in_drift(browser: Browser, write_run, tmp_path: Path):
    """CKA with earlier measurements falls by up to 0.6 and 0.1 over depth; by half of that in the run that settles."""

    def moving(parts, index, share=1.0):
        if index == 0:  # there is no measurement before
            parts["drift_hsic"][:, 2] = parts["drift_hsic"][:, :, 2] = 0
        for earlier in (1, 2) if index else ():
            now = 1 - share * (1 - parts["drift_hsic"][:, 0, earlier])
            parts["drift_hsic"][:, 0, earlier] = parts["drift_hsic"][:, earlier, 0] = now

    runs = [
        write_run("a", probe=True, change=moving),
        write_run("settling", probe=True, change=partial(moving, share=0.5)),
        write_run("training batches"),
        write_run("deep", ["ssm"] * 6, probe=True, change=moving),
        write_run("biased", probe=True, estimator="biased", change=moving),
    ]
    page = write_report(runs, tmp_path / "report.html")
    first, previous = "#compare-0-4", "#compare-0-5"
    browser.open(page)
    assert difference(browser, first) == pytest.approx([-0.3 * state / 3 for state in range(4)], abs=1e-4)
    assert difference(browser, previous) == pytest.approx([-0.05 * state / 3 for state in range(4)], abs=1e-4)
    assert "Drift: CKA with the first measurement step 20" in [
        caption.text for caption in browser.all("#compare figcaption")
    ]
    browser.one("#step").send_keys(Keys.HOME)
    assert difference(browser, first) == [0.0] * 4
    said = "return document.querySelector(arguments[0]).closest('figure').querySelector('.shown').textContent"
    assert browser.run(said, previous) == "no place where both A and B were measured"
    browser.one("#step").send_keys(Keys.END)
    for other, problem in {
        "training batches": "not measured in both",
        "biased": "not comparable: different estimators",
        "deep": None,
    }.items():
        browser.choose("#compare-B", other)
        browser.drawn()
        assert [browser.run(said, place) for place in (first, previous)] == [problem or "step 20"] * 2
        assert [browser.one(place).is_displayed() for place in (first, previous)] == [problem is None] * 2
    # The same values at the same relative depths, of which "deep" has more.
    assert difference(browser, first) == pytest.approx([0.0] * 4, abs=1e-4)
    assert browser.complaints() == []
    browser.run("localStorage.clear()")


def test_where_one_run_has_nothing_the_matrices_say_so(browser: Browser, write_run, tmp_path: Path):
    """As after all values have become NaN."""

    def lost(parts, index):
        if index == 2:
            for name in ("hsic", "adjacent_tokens_count"):
                parts[name].zero_()

    browser.open(write_report([write_run("a"), write_run("b", change=lost)], tmp_path / "report.html"))
    shown = "return [...document.querySelectorAll(arguments[0])].map(({ textContent }) => textContent)"
    matrices = "#compare .group:nth-of-type(2)"
    assert browser.run(shown, "#cka .shown") == ["step 20", "step 20, not measured"]
    assert browser.run(shown, f"{matrices} .shown") == ["no place where both A and B were measured"] * 2
    assert not browser.all(f"{matrices} .plot:not([hidden])")
    browser.one("#step").send_keys(Keys.HOME)
    browser.drawn()
    assert browser.run(shown, "#cka .shown") == ["step 0", "step 0"]
    assert browser.run(shown, f"{matrices} .shown") == ["step 0"] * 2
    assert len(browser.all(f"{matrices} .plot:not([hidden])")) == 2
    assert browser.complaints() == []


def test_alerts_are_listed_and_marked_over_steps(browser: Browser, write_run, tmp_path: Path, alert_runs):
    later = ALERT | {"step": 10, "severity": "info", "title": "Layers repeat", "suggestion": "Prune <them>."}
    alert_runs({"a": [ALERT, later], "b": []})
    page = write_report([write_run("a"), write_run("b")], tmp_path / "report.html")
    browser.open(page)
    listed = browser.one("#alerts tbody").text
    assert listed.index("error") < listed.index("Tokens collapse") < listed.index("info")  # the worst first
    assert "Prune <them>." in listed
    marks = ".scatterlayer .trace:last-of-type .point"
    assert len(browser.all(f"#alerts-0-0 {marks}")) == 2
    assert len(browser.all("#inter-token-0-0 .scatterlayer .point")) == 2
    assert len(browser.all("#inter-token-0-1 .scatterlayer .point")) == 0  # b has none
    for place in ("#alerts-0-0", "#inter-token-0-0 .xy2", "#loss-0-0 .xy2"):
        text = browser.hover(f"{place} {marks}:last-of-type")
        expected = ("Tokens collapse", "error in a, step 20", "rose to 0.85", "Lower the learning rate.")
        assert not [part for part in expected if part not in text], text
    browser.open(page, width=390)
    cells = (
        "return [...document.querySelectorAll('#alerts tbody tr > *')].map((it) => it.getBoundingClientRect().right)"
    )
    assert max(browser.run(cells)) <= 390
    assert browser.complaints() == []
