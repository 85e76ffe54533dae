"""All that is known of a step before its updates, and the one thing that metrics remember between steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mispo.algorithm.method import Targets
from mispo.algorithm.segments import Reduce
from mispo.metrics.routing import low_thresholds
from mispo.trainer.batch import Batch
from mispo.trainer.scoring import Scores
from model.moe.routers import Routing


@dataclass(frozen=True)
class StepRecord:
    """A step before its updates, on this rank. low_L: see `LowConfidence`; None for a dense model."""

    batch: Batch
    scores: Scores
    targets: Targets
    low_L: Tensor | None


class LowConfidence:
    """What counts as low routing confidence in this run, per MoE layer: fitted once, in its first step."""

    def __init__(self) -> None:
        self.low_L: Tensor | None = None

    def fit(self, routing: Routing | None, reduce: Reduce) -> Tensor | None:
        """Return the thresholds, see `low_thresholds`; collective. None for a dense model."""
        if routing is not None and self.low_L is None:
            self.low_L = low_thresholds(routing.confidence, reduce)
        return self.low_L

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes."""
        return {"low_confidence": None if self.low_L is None else self.low_L.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue with the thresholds of a checkpoint."""
        found = state["low_confidence"]
        self.low_L = None if found is None else torch.tensor(found)
