"""What the server of `repflow watch` answers, and what it follows."""

import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from repflow.monitor.cli import app
from repflow.monitor.report import _follow, watch_runs
from repflow.monitor.report._follow import Follower
from repflow.monitor.report._server import PageServer
from repflow.monitor.sinks import RunFileSink
from tests.monitor.report.made_up import make_info, snapshot


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request reads what has changed."""
    monkeypatch.setattr(_follow, "RESTING", 0.0)


@contextmanager
def serving(*files: Path) -> Iterator[PageServer]:
    with PageServer(Follower(files), 0) as server:
        thread = Thread(target=server.serve_forever, args=(0.01,))  # seconds until it sees that it should end
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: PageServer, path: str, method: str = "GET", **headers: str) -> tuple[HTTPResponse, str]:
    with closing(HTTPConnection("127.0.0.1", server.server_port, timeout=30)) as connection:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response, response.read().decode()


def test_it_listens_on_this_machine_alone(write_run):
    with serving(write_run()) as server:
        assert server.server_address == ("127.0.0.1", server.server_port)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "[", "10.0.0.1"])
def test_a_name_that_is_not_of_this_machine_is_refused(write_run, host: str):
    with serving(write_run()) as server:
        for path in ("/", "/content"):
            response, text = ask(server, path, Host=host)
            assert response.status == 403
            assert "expected a Host of this machine" in text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:9999", "[::1]:1"])
def test_names_of_this_machine_are_answered_through_a_tunnel_too(write_run, host: str):
    with serving(write_run()) as server:
        assert ask(server, "/content", Host=host)[0].status == 200


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/0.db", "/page.js", "/content/"],
)
def test_there_is_no_file_behind_any_address(write_run, path: str):
    run = write_run()
    with serving(run) as server:
        response, text = ask(server, path)
        assert (response.status, text) == (404, "there is only / here\n")


def test_only_reading_is_answered(write_run):
    with serving(write_run()) as server:
        assert ask(server, "/", method="POST")[0].status == 501
        response, text = ask(server, "/", method="HEAD")
        assert (response.status, text) == (200, "")
        assert int(response.headers["Content-Length"]) > 1_000_000


def test_content_is_sent_when_it_is_new(write_run, tmp_path: Path):
    path, info = tmp_path / "run.db", make_info()
    sink = RunFileSink(path)
    with serving(path) as server:
        response, text = ask(server, "/content")
        first = json.loads(text)
        assert response.headers["Cache-Control"] == "no-store"
        assert f"Waiting for {path}" in first["body"]
        assert ask(server, "/content", If_None_Match=first["version"])[0].status == 304
        sink.start(info)
        sink.write(snapshot(info, 0))
        sink.flush()
        response, text = ask(server, "/content", If_None_Match=first["version"])
        second = json.loads(text)
        assert second["version"] != first["version"]
        assert second["data"]["runs"]["0"]["steps"] == [0]
        assert ask(server, "/content", If_None_Match=second["version"])[0].status == 304
        sink.close()
    with serving(path) as again:
        assert json.loads(ask(again, "/content")[1])["version"] != second["version"]


def test_a_damaged_file_is_shown_as_it_was(write_run):
    path = write_run("one")
    follower = Follower([path])
    version, content = follower.current()
    path.write_bytes(b"not a run file")
    later, damaged = follower.current()
    assert later != version
    assert "is not readable now" in damaged.body
    assert damaged.data == content.data
    assert follower.current()[0] == later  # nothing new


def test_colours_stay_with_files_that_come_later(write_run, tmp_path: Path):
    waiting = tmp_path / "later.db"
    follower = Follower([waiting, write_run("there", file="there.db")])
    assert list(json.loads(follower.current()[1].data)["runs"]) == ["1"]
    write_run("later", file="later.db")
    assert list(json.loads(follower.current()[1].data)["runs"]) == ["0", "1"]


def test_reading_rests_longer_than_it_takes(write_run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_follow, "RESTING", 1e6)
    path = write_run("one")
    follower = Follower([path])
    version, _ = follower.current()
    path.unlink()
    assert follower.current()[0] == version


def test_a_failure_is_told_and_the_server_goes_on(write_run, monkeypatch: pytest.MonkeyPatch, capfd):
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    with serving(write_run()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(_follow, "render_content", broken)
            response, text = ask(server, "/")
            assert (response.status, "the terminal says why" in text) == (500, True)
        assert ask(server, "/")[0].status == 200
    assert "ZeroDivisionError: a bug" in capfd.readouterr().err


def test_a_port_that_is_taken(write_run):
    path = write_run()
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["watch", str(path), "--port", str(port)])
    assert result.exit_code == 2
    assert f"cannot listen on port {port} of 127.0.0.1" in result.stderr
    assert "choose another port, or 0" in result.stderr


def test_a_folder_is_refused_with_the_runs_in_it(write_run, tmp_path: Path):
    write_run("one", file="one.db")
    result = CliRunner().invoke(app, ["watch", str(tmp_path), "--port", "0"])
    assert result.exit_code == 2
    assert "found a directory; pass one of the run files in it: one.db" in result.stderr


def test_no_paths():
    with pytest.raises(ValueError, match="expected at least one run file"):
        watch_runs([])


def test_ctrl_c_ends_it_and_frees_the_port(write_run, monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []

    def interrupted(self: PageServer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(PageServer, "serve_forever", interrupted)
    path = write_run()
    watch_runs(path, port=0, announce=said.append)
    (sentence,) = said
    assert sentence.startswith(f"watching {path} at http://127.0.0.1:")
    port = int(sentence.split(":")[2].split("/")[0])
    with closing(socket.create_server(("127.0.0.1", port))):
        pass
