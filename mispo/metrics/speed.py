"""How fast a step was, and how much memory it took."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from mispo.trainer.batch import Batch
from mispo.trainer.learner import Learner
from mispo.trainer.ranks import max_memory_gb
from model.facts import peak_flops

TRAINING = ("score", "critic", "actor")
"""Phases in which the trainer's models compute."""


def throughput(learner: Learner, batch: Batch, seconds: Mapping[str, float]) -> dict[str, float]:
    """Measure a step; collective. seconds: timing_s/<phase> of the step.

    - perf/tokens_per_s: generated tokens of all ranks per second of the whole step
    - perf/max_memory_gb: high-water mark of this rank's memory
    - perf/tflops: model FLOPs per second and rank while the trainer scores and learns
    - perf/mfu: their share of the card's peak, on cards that are known
    """
    ranks = learner.ranks
    tokens = ranks.count(int(batch.offsets_B1[-1]))
    counted = sum(engine.flops.take() for engine in (learner.actor, learner.critic) if engine)
    flops = ranks.sum(torch.tensor(counted)).item()
    busy = sum(seconds.get(f"timing_s/{phase}", 0.0) for phase in TRAINING)
    each = flops / busy / ranks.size
    metrics = {
        "perf/tokens_per_s": tokens / seconds["timing_s/step"],
        "perf/max_memory_gb": max_memory_gb(ranks.device),
        "perf/tflops": each / 1e12,
    }
    peak = _peak(ranks.device)
    if peak:
        metrics["perf/mfu"] = each / peak
    return metrics


@cache
def _peak(device: torch.device) -> float | None:
    """Return the peak of a device in bf16; None for one that is not known, as a CPU."""
    return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
