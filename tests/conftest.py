"""What every test starts from: fixed seeds, fresh tensors full of NaN, and nobody to talk to."""

import gc
import importlib.util
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import jaxtyping
import numpy as np
import pytest
import torch

# Read when the packages are imported: tests neither upload nor download, on a machine with an account either.
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Kernels run on CPU tensors then, where a test forces them to.


@pytest.fixture(autouse=True)
def reproducible() -> None:
    """Seed every generator, and have PyTorch fill what `torch.empty` and its kin return: NaN, or the largest integer.

    Code that reads memory before writing it then fails its test instead of passing on lucky zeros. PyTorch fills in
    deterministic mode only; operations without a deterministic form warn there, so that tests may still use them.
    """
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)


@pytest.fixture
def untyped() -> Iterator[None]:
    """Without the run-time check of annotations, which would catch a wrong argument before the code under test does."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def newly_armed() -> Callable[[], set[int]]:
    """Numbers of the taps that have been armed since the test began, and still are.

    A regularizer stays armed as long as its model lives: those of earlier tests may wait for the garbage collector.
    """
    from repflow.monitor.taps import _ARMED

    gc.collect()
    before = set(_ARMED)
    return lambda: set(_ARMED) - before


def load(name: str) -> ModuleType:
    """A module that lies beside this file. Under pytest's importlib mode, tests cannot import it by its name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


token_cases = load("cases")


@pytest.fixture(scope="session")
def oracle() -> ModuleType:
    """The module `oracle`: the statistics straight from their definitions."""
    return load("oracle")


@pytest.fixture(scope="session")
def cases() -> ModuleType:
    """The module `cases`, to make further states and masks from."""
    return token_cases


@pytest.fixture(params=token_cases.CASES, ids=str)
def case(request: pytest.FixtureRequest):
    """States and a mask that every statistic must stand."""
    return request.param


@pytest.fixture(params=token_cases.CASES + token_cases.ONE_STATE, ids=str)
def flat_case(request: pytest.FixtureRequest):
    """The same, and some with a single state, for statistics that need no depth."""
    return request.param
