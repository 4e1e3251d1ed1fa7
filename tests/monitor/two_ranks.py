"""Two processes joined by gloo or NCCL: `python -m tests.monitor.two_ranks FOLDER RANK BACKEND` runs every scenario."""

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


def run_both(folder: Path, backend: str) -> list[dict[str, dict[str, Any]]]:
    """Start both ranks, wait for them, and return the results of each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, root = [sys.executable, "-m", "tests.monitor.two_ranks", str(folder)], Path(__file__).parents[2]
    ranks = [subprocess.Popen([*command, str(rank), backend], env=environment, cwd=root) for rank in range(2)]
    try:
        assert [process.wait(timeout=200) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def main(folder: Path, rank: int, backend: str) -> None:
    store = dist.FileStore(str(folder / "store"), 2)  # pyright: ignore[reportPrivateImportUsage]
    if backend == "nccl":
        torch.cuda.set_device(rank)
        del SCENARIOS["ends_with_an_exception"]  # NCCL's watchdog ends the process
    dist.init_process_group(backend, store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {}
    for name, scenario in SCENARIOS.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results[name] = scenario(rank, caught)
        dist.barrier()
    torch.save(results, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
