"""Two processes joined by gloo or NCCL: `python -m tests.monitor.two_ranks FOLDER RANK BACKEND 2` runs every scenario.

Four processes, two that hold slices of the same sequences and twice that, run those of `ON_FOUR`.
"""

import os
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.monitor.rank_scenarios import SCENARIOS
from tests.monitor.sequence_scenarios import ON_FOUR


def run_both(folder: Path, backend: str, world: int = 2) -> list[dict[str, dict[str, Any]]]:
    """Start the ranks, wait for them, and return the results of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, root = [sys.executable, "-m", "tests.monitor.two_ranks", str(folder)], Path(__file__).parents[2]
    arguments = [[*command, str(rank), backend, str(world)] for rank in range(world)]
    ranks = [subprocess.Popen(each, env=environment, cwd=root) for each in arguments]
    try:
        assert [process.wait(timeout=200) for process in ranks] == [0] * world
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def main(folder: Path, rank: int, backend: str, world: int) -> None:
    store = dist.FileStore(str(folder / "store"), world)  # pyright: ignore[reportPrivateImportUsage]
    if backend == "nccl":
        torch.cuda.set_device(rank)
        del SCENARIOS["ends_with_an_exception"]  # NCCL's watchdog ends the process
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {}
    for name, scenario in (SCENARIOS if world == 2 else ON_FOUR).items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = scenario(rank, caught)
        dist.barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
