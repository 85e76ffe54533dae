"""Acceptance-controlled MIS-PO: a trajectory window whose width follows a quantile of the run's own ratios."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mispo.algorithm.filter import Bounds, Proposal, Selection, bounds_filter

NARROWEST, WIDEST = math.log(1.0002), math.log(1.01)
"""Limits of the half-width, in log ratio."""

INERTIA = 0.9
"""Weight of the half-width before in the new one."""


def half_width(before: float | None, log_rho: Tensor, target: float) -> float:
    """b_k = clip(0.9·b_{k−1} + 0.1·Quantile_{A*}(|log ρ̄|), log 1.0002, log 1.01), in log ratio.

    before: b_{k−1}, None in the first step, which takes the quantile itself. log_rho: of all ranks; what is not
    finite counts as infinitely far off. target: A*, the wanted acceptance, in [0, 1].
    """
    distances = log_rho.double().abs().nan_to_num(math.inf, math.inf)
    # "higher": interpolating next to an infinite distance would give NaN.
    wanted = torch.quantile(distances, target, interpolation="higher").clamp(NARROWEST, WIDEST).item()
    smoothed = wanted if before is None else INERTIA * before + (1 - INERTIA) * wanted
    return min(max(smoothed, NARROWEST), WIDEST)


@dataclass
class QuantileFilter:
    """The report's token test, and a window exp(±b_k) on trajectories that aims at an acceptance.

    target: A* at the first step and from step `target_steps` on, linear in between. width and steps are the state
    that a resumed run continues with.
    """

    token_bounds: Bounds
    target: tuple[float, float]
    target_steps: int
    width: float | None = None
    steps: int = 0

    def __call__(self, proposal: Proposal) -> Selection:
        first, last = self.target
        target = last + (first - last) * max(0.0, 1 - self.steps / max(self.target_steps, 1))
        self.width = half_width(self.width, proposal.everyone(proposal.log_rho_B), target)
        self.steps += 1
        return bounds_filter(proposal, self.token_bounds, (math.exp(-self.width), math.exp(self.width)))

    def state(self) -> dict[str, float]:
        """What `restore` takes; {} before the first step."""
        return {} if self.width is None else {"width": self.width, "steps": self.steps}

    def restore(self, state: dict[str, float]) -> None:
        """Continue where a checkpoint was."""
        if state:
            self.width, self.steps = state["width"], int(state["steps"])
