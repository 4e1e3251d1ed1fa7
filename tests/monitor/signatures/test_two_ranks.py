"""Two processes joined by gloo: what one rank's tokens do is judged alike on both, and told by the first alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import json, sys, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from repflow.monitor import AlertWarning, Monitor, MonitorConfig
from repflow.monitor.sinks import RunFileSink
from tests.monitor import toy

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
torch.manual_seed(0)
model = toy.Toy(blocks=4)
found = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    monitor = Monitor(model, MonitorConfig(every_n_steps=1), sinks=[RunFileSink(folder / f"{rank}.db")])
    for step in range(4):
        if rank == 1 and step == 2:
            model.blocks[1].register_forward_hook(lambda block, args, output: output * torch.nan, prepend=True)
        with monitor.step(step):
            toy.loss_of(model, toy.batch(seed=10 * step + rank))
        monitor.flush()
        found.append([alert.to_dict() for alert in monitor.latest.alerts])
    monitor.close()
told = [str(warning.message) for warning in caught if warning.category is AlertWarning]
(folder / f"{rank}.json").write_text(json.dumps([found, told, monitor.state_dict()]))
dist.destroy_process_group()
"""


def test_two_ranks(tmp_path):
    root = Path(__file__).parents[3]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root / "src"), str(root)])}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in ranks] == [0, 0]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first[0] == second[0] and first[2] == second[2]
    assert [[(alert["signature"], alert["states"]) for alert in step] for step in first[0]] == [
        [],
        [],
        [("nonfinite", [2, 3, 4])],
        [],
    ]
    assert len(first[1]) == 1 and second[1] == []
    assert (tmp_path / "0.db").exists() and not (tmp_path / "1.db").exists()
