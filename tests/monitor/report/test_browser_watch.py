"""`repflow watch` in a browser, while the runs go on."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from selenium.webdriver.common.keys import Keys
from torch.optim import SGD

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.sinks import RunFileSink
from tests.monitor.report.browser import Browser
from tests.monitor.report.made_up import make_info, snapshot
from tests.monitor.toy import Toy, batch, loss_of


@contextmanager
def watching(*files: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command in a process of its own: its address and the process."""
    command = [sys.executable, "-m", "repflow", "watch", "--port", "0", *map(str, files)]
    # As if started from a terminal: a shell has its background jobs ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/", line)
        assert found, line + process.stdout.read()
        yield found[0], process
    finally:
        process.kill()
        process.wait()


def train(path: Path, steps: range, name: str = "toy") -> None:
    """A real training, monitored at every step."""
    model = Toy()
    optimizer = SGD(model.parameters(), lr=0.1)
    with closing(Monitor(model, MonitorConfig(every_n_steps=1), sinks=[RunFileSink(path)], name=name)) as monitor:
        for step in steps:
            with monitor.step(step):
                loss = loss_of(model, batch(seed=step))
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def shows(browser: Browser, text: str) -> None:
    """Wait until the page says something."""
    browser.wait("return document.getElementById('content').innerText.includes(arguments[0])", text)


def test_the_page_follows_a_run_from_before_its_file_to_after(browser: Browser, tmp_path: Path):
    path = tmp_path / "toy.db"
    with watching(path) as (url, process):
        browser.open(url)
        shows(browser, f"Waiting for {path}: there is no such file yet.")
        path.touch()
        shows(browser, "an empty file")
        train(path, range(4))
        shows(browser, "4 snapshots, steps 0 – 3")
        browser.drawn()
        assert browser.one("#shown-step").text == "step 3"

        browser.one("#step").send_keys(Keys.ARROW_LEFT)  # the reader looks at step 2 …
        browser.one("#define-cka summary").send_keys(Keys.ENTER)
        browser.run("document.getElementById('cka').scrollIntoView()")
        place = "return document.getElementById('cka').getBoundingClientRect().top"
        before = browser.run(place)
        train(path, range(4, 6))  # … while the run is resumed
        shows(browser, "6 snapshots, steps 0 – 5")
        browser.drawn()
        assert browser.one("#shown-step").text == "step 2"
        assert browser.one("#cka .shown").text == "step 2"
        assert browser.one("#define-cka dl").is_displayed()
        assert abs(browser.run(place) - before) < 2
        steps = "return document.querySelector('#inter-token-0-0').data[0].x"
        assert browser.run(steps) == [0, 1, 2, 3, 4, 5]

        browser.one("#step").send_keys(Keys.END)  # at its end, the slider follows
        train(path, range(6, 7))
        shows(browser, "steps 0 – 6")
        browser.drawn()
        assert browser.one("#shown-step").text == "step 6"

        path.unlink()
        shows(browser, f"{path} is gone; shown is what it held before.")
        assert browser.run(steps) == list(range(7))
        train(path, range(2), name="another")
        shows(browser, "2 snapshots, steps 0 – 1")
        assert "is gone" not in browser.one("#content").text

        assert set(browser.requests()) <= {url, f"{url}content"}
        assert browser.complaints() == []
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
        assert process.communicate()[0] == ""  # no traceback
        browser.wait("return document.getElementById('live').textContent.includes('does not answer')")


def test_a_run_that_begins_later_and_one_that_another_process_writes(
    browser: Browser, tmp_path: Path, write_run: Callable[..., Path]
):
    first, second = write_run("first", file="first.db"), tmp_path / "second.db"
    sink = RunFileSink(second)
    with watching(first, second) as (url, _):
        browser.open(url)
        shows(browser, f"Waiting for {second}")
        assert browser.all("#compare") == []
        info = make_info("second")
        sink.start(info)
        shows(browser, "No snapshot has been written yet by: second.")
        for step in (0, 5):
            sink.write(snapshot(info, step))
        sink.flush()  # the file stays open, with its log beside it
        shows(browser, "2 snapshots, steps 0 – 5")
        browser.drawn()
        assert [caption.text.split()[0] for caption in browser.all("#norms figcaption")] == ["All", "first", "second"]
        assert browser.one("#compare-B").is_displayed()
        assert browser.run("return document.querySelector('#inter-token-0-1').data.length") == 1
        sink.close()
