import importlib.util
import sys
from pathlib import Path

import pytest
import torch


def load(name: str):
    """A module that lies beside this file. Under pytest's importlib mode, tests cannot import it by its name."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def healthy():
    """Healthy training runs, one for each family, trained when they are first asked for; take a `copy()` to go on."""
    training = load("training")
    runs = {}

    def run(family: str):
        if family not in runs:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # faster for models as small as these
            runs[family] = training.Training.of(family).run(training.HEALTHY_STEPS)
            torch.set_num_threads(threads)
        return runs[family]

    return run
