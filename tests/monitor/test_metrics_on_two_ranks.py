"""The streaming metrics on two ranks: merged through torchmetrics' own synchronisation, they equal one pass."""

import os
import subprocess
import sys
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]

from tests.monitor.test_metrics import MAKERS, flat

Batches = list[tuple[Tensor, Tensor | None]]
SCENARIOS = ("both_ranks_update", "one_rank_without_updates")


def rank_batches(scenario: str) -> tuple[Batches, Batches]:
    """What each of two ranks sees."""
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(3, 6, 7, 4, generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 3, 6, 0, 5, 7]).unsqueeze(1)
    batches: Batches = [(states[:, a:b], mask[a:b]) for a, b in ((0, 1), (1, 4), (4, 6))]
    own = len(batches) if scenario == "one_rank_without_updates" else 1
    return batches[:own], batches[own:]


RankValues = dict[tuple[str, str], tuple[Tensor, Tensor]]


def run_rank(rank: int, folder: Path) -> RankValues:
    """What each of two processes does: every scenario with every metric, before and after a reset."""
    store = FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=100))
    values = {}
    try:
        for scenario in SCENARIOS:
            for name, make in MAKERS.items():
                metric = make(num_states=3) if scenario == "one_rank_without_updates" else make()
                computed = []
                for _ in range(2):
                    metric.reset()
                    for batch in rank_batches(scenario)[rank]:
                        metric.update(*batch)
                    computed.append(flat(metric.compute()))
                values[scenario, name] = tuple(computed)
    finally:
        torch.distributed.destroy_process_group()
    return values


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[RankValues, RankValues]:
    """What two processes computed, joined by gloo: this one and another."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    other = subprocess.Popen([sys.executable, "-W", "ignore", __file__, str(folder)], env=environment)
    try:
        own = run_rank(0, folder)
        assert other.wait(timeout=100) == 0
    finally:
        other.kill()
        other.wait()
    return own, torch.load(folder / "values.pt")


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("name", list(MAKERS))
def test_two_ranks_equal_one_pass(name: str, scenario: str, ranks):
    metric = MAKERS[name]()
    for batch in chain(*rank_batches(scenario)):
        metric.update(*batch)
    want = flat(metric.compute())
    for values in ranks:
        for computed in values[scenario, name]:
            # The order of float64 sums differs.
            torch.testing.assert_close(computed, want, rtol=1e-12, atol=1e-12)


if __name__ == "__main__":
    torch.save(run_rank(1, Path(sys.argv[1])), Path(sys.argv[1]) / "values.pt")
