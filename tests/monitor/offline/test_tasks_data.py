"""The questions of MDQA: files of every wrong kind, and the download, from a real server."""

import gzip
import hashlib
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from repflow.monitor import RepflowWarning
from repflow.monitor.offline import OfflineError, tasks_data
from repflow.monitor.offline.tasks_data import cache_folder, fetch, load_questions, read_questions
from tests.monitor.offline import questions


class Server(ThreadingHTTPServer):
    """Serves a folder on this machine, and counts what is asked for."""

    asked = 0

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked += 1  # pyright: ignore[reportAttributeAccessIssue]
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as served:
        thread = threading.Thread(target=served.serve_forever)
        thread.start()
        yield served
        served.shutdown()
        thread.join()


@pytest.fixture
def published(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file on the server, as the one that MDQA is to download."""
    file = questions.write(tmp_path / "served" / "nq.jsonl.gz")
    monkeypatch.setattr(tasks_data, "NQ_URL", server.url(file.name))
    monkeypatch.setattr(tasks_data, "NQ_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("REPFLOW_CACHE", str(tmp_path / "cache"))
    return file


def test_a_file_of_ones_own(tmp_path: Path):
    for name in ("questions.jsonl", "questions.jsonl.gz"):
        found = load_questions(questions.write(tmp_path / name))
        assert len(found) == len(questions.VILLAGES)
        assert found[0].answers == ("1700",)
        assert (found[0].title, found[0].passage[:37]) == ("Mill of Orrin", "The mill of Orrin was built in 1700 b")


def test_it_is_downloaded_once(published: Path, server: Server, tmp_path: Path):
    first = load_questions()
    assert load_questions() == first == read_questions(published)
    assert server.asked == 1
    assert [file.name for file in (tmp_path / "cache").iterdir()] == ["nq.jsonl.gz"]


def test_a_damaged_cache_is_said_and_mended(published: Path, server: Server, tmp_path: Path):
    whole = load_questions()
    kept = tmp_path / "cache" / "nq.jsonl.gz"
    content = bytearray(kept.read_bytes())
    content[len(content) // 2] ^= 1
    kept.write_bytes(content)
    with pytest.warns(RepflowWarning, match=r"nq\.jsonl\.gz is damaged: its checksum is not [0-9a-f]{12}…"):
        assert load_questions() == whole
    assert kept.read_bytes() == published.read_bytes()
    assert server.asked == 2


def test_a_download_of_another_checksum_is_not_kept(published: Path, tmp_path: Path):
    published.write_bytes(published.read_bytes()[:-10])
    with pytest.raises(OfflineError, match=r"expected a file with the SHA-256 .* cut short.*--data"):
        load_questions()
    assert not (tmp_path / "cache").exists()


def test_no_server_and_no_file(server: Server, tmp_path: Path):
    with pytest.raises(OfflineError, match=r"could not be downloaded \(HTTP Error 404.*--data, or put it at .*absent"):
        fetch(server.url("absent"), "0" * 64, tmp_path / "cache")
    with pytest.raises(OfflineError, match=r"could not be downloaded .*refused"):
        fetch("http://127.0.0.1:9/absent", "0" * 64, tmp_path / "cache")


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("REPFLOW_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "repflow"
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/the/user")
    assert cache_folder() == Path("/of/the/user/repflow")
    monkeypatch.setenv("REPFLOW_CACHE", "/of/its/own")
    assert cache_folder() == Path("/of/its/own")


RECORD = questions.records()[0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "it cannot be read: No such file"),
        ("folder", "folder", "it cannot be read: Is a directory"),
        ("plain.jsonl.gz", b"{}", "expected a file in gzip format, whole; got one that is not: Not a gzipped file"),
        ("cut.jsonl.gz", "cut", "expected a file in gzip format, whole"),
        ("latin.jsonl", '"Zoë"'.encode("latin-1"), "found what is no UTF-8 text"),
        ("empty.jsonl", b"\n\n", "found an empty file"),
        ("text.jsonl", b"a shopping list", "text.jsonl, line 1: expected lines of JSON .*found what is no JSON"),
        ("list.jsonl", [RECORD, [1]], "line 2: .*found a list"),
        ("kv.jsonl", [{"key": "a", "value": "b"}], "found no question and no answers and no ctxs, only key, value"),
        ("answers.jsonl", [RECORD | {"answers": "1700"}], "found answers that are no list of texts"),
        ("ctxs.jsonl", [RECORD | {"ctxs": ["a"]}], "found ctxs that are no list of objects"),
        (
            "gold.jsonl",
            [RECORD | {"ctxs": [{"title": "a", "text": "b"}]}],
            "found none of 1 passages marked with isgold",
        ),
        (
            "title.jsonl",
            [RECORD | {"ctxs": [{"isgold": True, "text": "b"}]}],
            "question, title or text that is no text",
        ),
    ],
)
def test_a_file_of_the_wrong_format(name: str, content: Any, message: str, tmp_path: Path):
    file = tmp_path / name
    if content == "folder":
        file.mkdir()
    elif content == "cut":
        file.write_bytes(gzip.compress(b"{}" * 1000)[:-12])
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        questions.write(file, content)
    with pytest.raises(OfflineError, match=message) as caught:
        load_questions(file)
    assert str(caught.value).startswith(str(file))
