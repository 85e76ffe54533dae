"""The DeepSpeed trainer: flat batches, scoring, two engines, updates, checkpoints, weights to the rollout engine."""

import os

import torch

# DeepSpeed looks for its accelerator when it is imported, and warns where there is none.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
