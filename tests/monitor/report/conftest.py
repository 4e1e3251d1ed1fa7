"""What the tests of the report share: run files, alerts in them, and a browser."""

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from repflow.monitor.sinks import open_run
from tests.monitor.report.browser import Browser, chromium
from tests.monitor.report.made_up import write_run_file

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """Writes a run file: `write_run(name, kinds, steps)`; `change(parts, index)` edits the sums of a snapshot."""
    return partial(write_run_file, tmp_path)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One browser for all tests: starting it takes longer than most of them."""
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def alert_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, Any]], None]:
    """Has run files of these names hold these alerts."""

    def alert(alerts: Mapping[str, Any]) -> None:
        def opened(path: Path):
            data = open_run(path)
            if data.attrs["name"] in alerts:
                data.attrs["alerts"] = json.dumps(alerts[data.attrs["name"]])
            return data

        monkeypatch.setattr("repflow.monitor.report._runs.open_run", opened)

    return alert
