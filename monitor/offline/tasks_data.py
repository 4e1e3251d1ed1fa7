"""The questions of MDQA: from a file, or downloaded once to a cache and held against a checksum."""

import gzip
import hashlib
import json
import os
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.tasks_mdqa import Question
from repflow.monitor.warning import warn

NQ_URL = "https://raw.githubusercontent.com/nelson-liu/lost-in-the-middle/main/qa_data/nq-open-oracle.jsonl.gz"
"""2,655 questions of Natural Questions with their passages of Wikipedia (CC BY-SA)."""
NQ_SHA256 = "6a7f72b846f663a133ef952244e5a4e43f06bcf190afe34e8fbe687ce0d1653e"
_TIMEOUT = 60  # seconds that a server may be silent
_EXPECTED = "expected lines of JSON with question, answers and ctxs [{title, text, isgold}], as nq-open-oracle.jsonl.gz"


def load_questions(data: Path | None = None) -> tuple[Question, ...]:
    """The questions of a `.jsonl.gz` or `.jsonl` file; without one, those that the paper uses, downloaded once.

    Raises:
        OfflineError: the file is missing or is something else, or could not be downloaded.
    """
    return read_questions(fetch(NQ_URL, NQ_SHA256) if data is None else data)


def cache_folder() -> Path:
    """Where downloads are kept: `REPFLOW_CACHE`, or else `repflow` in the user's folder for caches."""
    if folder := os.environ.get("REPFLOW_CACHE"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "repflow"


def fetch(url: str, sha256: str, cache: Path | None = None) -> Path:
    """The file at `url`: from the cache if it has that checksum, and else downloaded, which a damaged one is again.

    Raises:
        OfflineError: it cannot be downloaded, or has another checksum.
    """
    file = (cache or cache_folder()) / url.rpartition("/")[2]
    if file.exists():
        if _sha256(file.read_bytes()) == sha256:
            return file
        warn(f"{file} is damaged: its checksum is not {sha256[:12]}…; it is downloaded again")
    content = _download(url, file)
    if (found := _sha256(content)) != sha256:
        raise OfflineError(
            f"{url}: expected a file with the SHA-256 {sha256}, got {found}: it has changed, or was cut short. Get "
            "the file by other means and pass it with --data"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    # Several processes may do this at once: each has a file of its own, and the last one stays.
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=file.name, delete=False) as partial:
        partial.write(content)
    os.replace(partial.name, file)
    return file


def _download(url: str, file: Path) -> bytes:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            return response.read()
    except (OSError, urllib.error.URLError) as error:
        raise OfflineError(
            f"{url}: could not be downloaded ({error}); get it by other means and pass it with --data, or put it "
            f"at {file}"
        ) from error


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_questions(path: Path) -> tuple[Question, ...]:
    """The questions of a file with one JSON object in each line, compressed where its name ends in `.gz`.

    Of the passages of a question (`ctxs`) the one that is marked as gold is taken.

    Raises:
        OfflineError: the file is missing or is something else; the message names the line.
    """
    questions = tuple(_question(path, number, line) for number, line in _lines(path))
    if not questions:
        raise OfflineError(f"{path}: {_EXPECTED}; found an empty file")
    return questions


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise OfflineError(f"{path}: expected a file in gzip format, whole; got one that is not: {error}") from error
    except UnicodeDecodeError as error:
        raise OfflineError(f"{path}: {_EXPECTED}; found what is no UTF-8 text: {error}") from error
    except OSError as error:
        raise OfflineError(f"{path}: {_EXPECTED}; it cannot be read: {error.strerror or error}") from error


def _question(path: Path, number: int, line: str) -> Question:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise OfflineError(f"{path}, line {number}: {_EXPECTED}; found what is no JSON: {error}") from error
    if (wrong := _wrong(record)) is not None:
        raise OfflineError(f"{path}, line {number}: {_EXPECTED}; {wrong}")
    gold = next(passage for passage in record["ctxs"] if passage.get("isgold"))
    return Question(record["question"], tuple(record["answers"]), gold["title"], gold["text"])


def _wrong(record: Any) -> str | None:
    """What keeps a record from being a question; None if it is one."""
    if not isinstance(record, dict):
        return f"found a {type(record).__name__}"
    if missing := [name for name in ("question", "answers", "ctxs") if not record.get(name)]:
        return f"found no {' and no '.join(missing)}, only {', '.join(map(str, record)) or 'nothing'}"
    answers, passages = record["answers"], record["ctxs"]
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        return "found answers that are no list of texts"
    if not isinstance(passages, list) or not all(isinstance(passage, dict) for passage in passages):
        return "found ctxs that are no list of objects"
    gold = next((passage for passage in passages if passage.get("isgold")), None)
    if gold is None:
        return f"found none of {len(passages)} passages marked with isgold"
    texts = (record["question"], gold.get("title"), gold.get("text"))
    return None if all(isinstance(text, str) for text in texts) else "found a question, title or text that is no text"
