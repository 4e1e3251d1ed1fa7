"""Sequences of different lengths ask for the same compilations; tests/gpu counts those that happen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("specialisations.py")


@pytest.fixture(scope="module")
def asked() -> dict[str, dict[str, list[str]]]:
    """What the script prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("function", ["depth_and_token_sums", "pairwise_hsic"])
def test_lengths_share_compilations(function: str, dtype: str, asked: dict[str, dict[str, list[str]]]):
    keys_of = {length: set(keys) for length, keys in asked[f"{function} {dtype}"].items()}
    classes = keys_of["2x100"] | keys_of["2x1024"]
    assert len(classes) > 2
    for length, keys in keys_of.items():
        assert keys <= classes, (length, keys - classes)
