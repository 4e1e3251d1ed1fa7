"""Tests that need a CUDA device. Without one they are not collected; CONTRIBUTING.md says how to run them."""

import torch

collect_ignore_glob = [] if torch.cuda.is_available() else ["test_*.py"]
