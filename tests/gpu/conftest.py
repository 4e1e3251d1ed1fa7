"""Tests that need a CUDA device, or two; without, they are not collected. CONTRIBUTING.md says how to run them."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
collect_ignore = [] if torch.cuda.device_count() > 1 else ["test_ranks.py"]
