"""Several processes share an extraction; one is killed. The bits are those of one process that nothing disturbed."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from repflow.monitor.offline.extracted import Extraction
from repflow.monitor.offline.extraction import extract
from repflow.monitor.offline.loading import load_model
from tests.monitor.offline import extraction_process, tiny

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("model"), "gpt_neox")


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Extraction:
    folder = tmp_path_factory.mktemp("undisturbed")
    return extract(load_model(str(checkpoint)), extraction_process.samples(), folder, extraction_process.OPTIONS)


def start(*command: str, **environment: str) -> "subprocess.Popen[str]":
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # products add up in another order with more of them
    path = {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))}
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, **threads, **path, **environment},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def same_bits(one: Extraction, other: Extraction) -> bool:
    features = [found.features(range(4)) for found in (one, other)]
    return torch.equal(one.snapshot.sums, other.snapshot.sums) and torch.equal(*features)


def test_two_processes_as_torchrun_starts_them(checkpoint: Path, undisturbed: Extraction, tmp_path: Path):
    script = ["-m", "tests.monitor.offline.extraction_process", str(checkpoint), str(tmp_path), "0"]
    with start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *script) as process:
        said, _ = process.communicate(timeout=200)
    assert process.returncode == 0, said
    assert "process 1 of 2: 100%" in said
    assert same_bits(Extraction.open(tmp_path), undisturbed)


def test_one_of_two_is_killed(checkpoint: Path, undisturbed: Extraction, tmp_path: Path):
    """The other says so. What both had done is kept, and a single process does the rest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    script = ["-m", "tests.monitor.offline.extraction_process", str(checkpoint), str(tmp_path), "0.05"]
    with start(*script, RANK="0", **where) as first, start(*script, RANK="1", **where) as second:
        limit = time.monotonic() + 100
        while not (tmp_path / "000003.pt").exists():
            assert time.monotonic() < limit and second.poll() is None
            time.sleep(0.001)
        second.send_signal(signal.SIGKILL)
        said, _ = first.communicate(timeout=100)
    assert second.returncode == -signal.SIGKILL
    assert first.returncode != 0
    assert "process 0 of 2: another one has ended; see what it says, and start again: what is done is kept" in said
    done = {file: file.stat().st_mtime_ns for file in tmp_path.glob("0*.pt")}
    assert 1 < len(done) < undisturbed.choices["parts"]
    finished = extract(load_model(str(checkpoint)), extraction_process.samples(), tmp_path, extraction_process.OPTIONS)
    assert {file: file.stat().st_mtime_ns for file in done} == done
    assert same_bits(finished, undisturbed)
