"""Why acceptance depends on the length: the report's window on Gaussian log-ratios.

    python benchmarks/acceptance.py

Log-ratios of a pair of policies with κ nats of KL per token are drawn from N(−κ, 2κ), independent, and filtered by
`bounds_filter` as a training step does; lines are the closed form, points what the filter accepted. Writes
docs/acceptance.png and benchmarks/results/acceptance.md. Half a minute.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib
import torch
from writing import table, write_results

from mispo.algorithm.filter import Proposal, bounds_filter
from mispo.algorithm.segments import offsets_of
from mispo.config.algorithm_parts import Bounds

matplotlib.use("Agg")
from matplotlib import pyplot as plt

KLS = (1e-5, 1e-4, 1e-3, 4e-3, 1e-2)
LENGTHS = (16, 64, 256, 1024, 4096)
COUNT = 1000
FIGURE = Path(__file__).parent.parent / "docs" / "acceptance.png"

CONFIG = Bounds()
TOKEN, WINDOW = tuple(CONFIG.token_bounds), tuple(CONFIG.trajectory_bounds)


def main() -> None:
    seen = {kl: [accepted(kl, length) for length in LENGTHS] for kl in KLS}
    figure, axes = plt.subplots(figsize=(6.4, 3.6), dpi=150, layout="constrained")
    for kl in KLS:
        grid = [10 ** (1 + step / 40) for step in range(121)]
        (line,) = axes.semilogx(grid, [closed_form(kl, length) for length in grid], label=f"{kl:g}")
        axes.plot(LENGTHS, seen[kl], "o", color=line.get_color(), markersize=4)
    axes.set(xlabel="length T, tokens", ylabel="accepted trajectories", ylim=(0, 1.03), xlim=(10, 10_000))
    axes.legend(title="KL, nats per token", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    figure.savefig(FIGURE)
    rows = [
        [f"{kl:g}", *(f"{s:.3f} ({closed_form(kl, n):.3f})" for s, n in zip(seen[kl], LENGTHS, strict=True))]
        for kl in KLS
    ]
    body = (
        f"Share of {COUNT} trajectories inside {list(WINDOW)}, and its closed form in brackets; standard error at most "
        f"{0.5 / math.sqrt(COUNT):.3f}.\n\n" + table(("KL per token", *(f"T = {n}" for n in LENGTHS)), rows)
    )
    page = write_results("acceptance", "Acceptance by length", body, torch.get_num_threads())
    sys.stdout.write(f"{page}\n{FIGURE}\n")


def accepted(kl: float, length: int) -> float:
    """What the filter accepts of trajectories of this length."""
    generator = torch.Generator().manual_seed(0)
    log_x_N = torch.randn(COUNT * length, generator=generator, dtype=torch.float64) * math.sqrt(2 * kl) - kl
    numbers = torch.arange(COUNT)
    offsets_B1 = offsets_of(torch.full((COUNT,), length))
    proposal = Proposal(log_x_N, torch.zeros_like(log_x_N), offsets_B1, numbers, numbers, 0, lambda x_B: x_B)
    return bounds_filter(proposal, TOKEN, WINDOW).multiplicity_B.double().mean().item()


def closed_form(kl: float, length: float) -> float:
    """P(log lo ≤ log ρ̄ ≤ log hi) for log ρ̄ ~ N(−κ, 2κ/T)."""
    low, high = ((math.log(bound) + kl) / math.sqrt(4 * kl / length) for bound in WINDOW)
    return (math.erf(high) - math.erf(low)) / 2


if __name__ == "__main__":
    main()
