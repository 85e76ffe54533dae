"""Acceptance-controlled MIS-PO: a trajectory window whose width follows a quantile of the run's own ratios."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mispo.algorithm.filter import Bounds, Proposal, Selection, window_filter
from mispo.algorithm.segments import bucket_of, lengths_of

NARROWEST, WIDEST = math.log(1.0002), math.log(1.01)
"""Limits of the half-width, in log ratio."""

INERTIA = 0.9
"""Weight of the previous half-width in the new one."""


def half_width(previous: float | None, log_rho: Tensor, target: float) -> float:
    """Compute b_k = clip(0.9·b_{k−1} + 0.1·Quantile_{A*}(|log ρ̄|), log 1.0002, log 1.01), in log ratio.

    previous: b_{k−1}; None in the first step, which takes the quantile itself. log_rho: of the trajectories of all
    ranks; a value that is not finite counts as infinitely far off. target: A*, the desired acceptance, in [0, 1].
    """
    distances = log_rho.double().abs().nan_to_num(math.inf, math.inf)
    # "higher": interpolating next to an infinite distance would give NaN.
    quantile = torch.quantile(distances, target, interpolation="higher").clamp(NARROWEST, WIDEST).item()
    smoothed = quantile if previous is None else INERTIA * previous + (1 - INERTIA) * quantile
    return min(max(smoothed, NARROWEST), WIDEST)


@dataclass
class QuantileFilter:
    """The report's token test, and a window exp(±b_k) on trajectories that follows a target acceptance.

    target: A* at the first step and from step `target_steps` on, linear in between. by_length: a half-width for each
    bucket of lengths, else one for all. widths (by bucket) and steps are the state that a resumed run continues with.
    """

    token_bounds: Bounds
    target: tuple[float, float]
    target_steps: int
    by_length: bool = False
    widths: dict[int, float] = field(default_factory=dict)
    steps: int = 0

    def __call__(self, proposal: Proposal) -> Selection:
        first, last = self.target
        target = last + (first - last) * max(0.0, 1 - self.steps / max(self.target_steps, 1))
        mine_B = bucket_of(lengths_of(proposal.offsets_B1)) * int(self.by_length)
        bucket, log_rho = proposal.everyone(mine_B), proposal.everyone(proposal.log_rho_B)
        for number in bucket.unique().tolist():
            self.widths[number] = half_width(self.widths.get(number), log_rho[bucket == number], target)
        self.steps += 1
        widths_B = torch.tensor([self.widths[number] for number in mine_B.tolist()], dtype=torch.float64).to(log_rho)
        return window_filter(proposal, self.token_bounds, torch.stack([-widths_B, widths_B], 1).exp())

    def state(self) -> dict[str, float]:
        """Return what `restore` takes."""
        return {"steps": self.steps} | {f"width/{bucket}": width for bucket, width in self.widths.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Continue where a checkpoint was."""
        self.steps = int(state.get("steps", 0))
        self.widths = {int(key.removeprefix("width/")): state[key] for key in state if key.startswith("width/")}
