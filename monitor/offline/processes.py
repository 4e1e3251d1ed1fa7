"""The processes that share an extraction, as torchrun or Accelerate start them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from repflow.monitor.offline import OfflineError

_PATIENCE = timedelta(days=1)  # between the process that is done first and the last one


@dataclass(frozen=True)
class Processes:
    """This process among those that share the work."""

    rank: int = 0
    world: int = 1
    group: "dist.ProcessGroup | None" = None

    def wait(self) -> None:
        """Wait until all processes are here.

        Raises:
            OfflineError: one of them has ended.
        """
        if self.group is None:
            return
        try:
            dist.barrier(group=self.group)
        except RuntimeError as error:
            raise OfflineError(
                f"process {self.rank} of {self.world}: another one has ended; see what it says, and start again: what "
                "is done is kept"
            ) from error


def local_device() -> torch.device:
    """The GPU of this process, if there are any."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def shared_processes() -> Iterator[Processes]:
    """Join the processes that the environment tells of: `RANK` and `WORLD_SIZE`, as torchrun sets them.

    They only wait for each other: what they find goes through files, so that gloo does also where there are GPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 and not dist.is_initialized():
        yield Processes()
        return
    joined = dist.is_initialized()
    if not joined:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    group = dist.new_group(backend="gloo", timeout=_PATIENCE)
    assert isinstance(group, dist.ProcessGroup)  # every process is in it
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if not joined:
            dist.destroy_process_group()
