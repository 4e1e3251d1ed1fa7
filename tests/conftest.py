"""What every test starts from: fixed seeds, fresh tensors full of NaN, and nobody to talk to."""

import os
import random

import numpy as np
import pytest
import torch

# Read when the packages are imported: tests neither upload nor download, on a machine with an account either.
os.environ["WANDB_MODE"] = "offline"
os.environ["HF_HUB_OFFLINE"] = "1"


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
