"""Tests that need a CUDA device, or two; without, they are not collected. CONTRIBUTING.md says how to run them."""

from importlib.util import find_spec

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
collect_ignore = [] if torch.cuda.device_count() > 1 else ["test_offline.py", "test_ranks.py"]
if find_spec("mamba_ssm") is not None:
    collect_ignore.append("test_ssm_steps.py")  # transformers would call its kernels on a CPU too
