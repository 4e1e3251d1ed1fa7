from collections.abc import Callable

import pytest
import torch

from tests.monitor.signatures.training import HEALTHY_STEPS, Training


@pytest.fixture(scope="session")
def healthy() -> Callable[[str], Training]:
    """Healthy training runs, one for each family, trained when they are first asked for; take a `copy()` to go on."""
    runs: dict[str, Training] = {}

    def run(family: str) -> Training:
        if family not in runs:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # faster for models as small as these
            runs[family] = Training.of(family).run(HEALTHY_STEPS)
            torch.set_num_threads(threads)
        return runs[family]

    return run
