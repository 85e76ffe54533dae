"""What does the mathematics of a step cost, against the forwards that it goes with?

    python benchmarks/algorithm.py [--tokens 1000000] [--repeats 5]

Filter, advantages, loss (with its gradient by the log-probs) and metrics on random batches of that many tokens, in
short and long trajectories; and one forward of the tiny model over as many tokens, measured on a smaller batch in the
same process. Peak memory: how far the resident set rises (Linux).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from measuring import median_seconds, peak_mib
from torch import Tensor
from writing import table, write_results

from mispo.algorithm.advantage import gae, group_advantages, whiten
from mispo.algorithm.filter import Proposal
from mispo.algorithm.objective import Samples
from mispo.algorithm.segments import lengths_of, offsets_of, owner_of
from mispo.build.algorithm import build_method
from mispo.config.load import load_config
from mispo.metrics.mismatch import acceptance_metrics, mismatch_metrics, mismatch_sums, ratio_histogram
from mispo.trainer.policy import ActorModule
from model.build import build_policy

SAMPLES_PER_PROMPT = 16

FORWARDS = 8
"""Forwards' worth of work in a step's scoring and updates: one each for π_old and V, three each (forward and backward)
for actor and critic. Rollouts come on top."""

FORWARD_SEQUENCES, FORWARD_LENGTH = 64, 128


class Load:
    """A random step: everything that the mathematics reads."""

    def __init__(self, tokens: int, length: int) -> None:
        generator = torch.Generator().manual_seed(0)
        count = tokens // length // SAMPLES_PER_PROMPT * SAMPLES_PER_PROMPT
        lengths_B = torch.randint(length // 2, length * 3 // 2, (count,), generator=generator)
        self.offsets_B1 = offsets_of(lengths_B)
        total = int(self.offsets_B1[-1])
        self.old_N = -torch.rand(total, generator=generator) * 2
        self.rollout_N = self.old_N + torch.randn(total, generator=generator) * 0.01
        self.values_N = torch.rand(total, generator=generator)
        self.rewards_B = (torch.rand(count, generator=generator) > 0.5).float()
        self.truncated_B = torch.rand(count, generator=generator) > 0.9
        self.position_B = torch.arange(count)
        self.included_N = torch.ones(total, dtype=torch.bool)

    def proposal(self) -> Proposal:
        group_B = self.position_B // SAMPLES_PER_PROMPT
        arguments = (self.old_N, self.rollout_N, self.offsets_B1, self.position_B, group_B)
        return Proposal(*arguments, 0, lambda x_B: x_B)


def stages(load: Load) -> dict[str, Callable[[], object]]:
    """The parts of a step's mathematics, each to be called once per step (a loss: once over all its mini-batches)."""
    names = ("mispo", "mispo_quantile", "mispo_metropolis", "random_reject", "ppo", "gspo", "cispo")
    methods = {name: build_method(load_config([f"algorithm={name}"]), (0.0, 1.0)) for name in names}
    advantages_N = torch.randn_like(load.old_N)

    def loss(name: str) -> Tensor:
        objective = methods[name].objective
        logprobs_N = (load.old_N + 0.01).requires_grad_()
        samples = Samples(load.old_N, advantages_N, torch.ones_like(load.old_N), load.included_N)
        scale = objective.scale(samples, load.offsets_B1, lambda number: number)
        total, _ = objective(logprobs_N, torch.zeros_like(load.old_N), samples, load.offsets_B1, scale)
        return torch.autograd.grad(total, logprobs_N)[0]

    def advantages() -> Tensor:
        found, _ = gae(load.values_N, load.rewards_B, load.truncated_B, load.offsets_B1, 1.0, 1.0)
        return whiten(found, load.included_N, lambda x: x)

    def grouped() -> Tensor:
        everything_B = torch.ones_like(load.truncated_B)
        group_B = load.position_B // SAMPLES_PER_PROMPT
        return group_advantages(load.rewards_B, everything_B, group_B, "group_std")[owner_of(load.offsets_B1)]

    def metrics() -> object:
        proposal = load.proposal()
        selection = methods["mispo"].filter(proposal)
        sums = mismatch_sums(proposal.log_x_N, load.rollout_N, selection.keep_N, load.offsets_B1)
        lengths_B = lengths_of(load.offsets_B1).double()
        found = acceptance_metrics(selection, lengths_B, load.rewards_B, torch.zeros_like(lengths_B))
        return found | mismatch_metrics(sums, ratio_histogram(proposal.log_x_N))

    filters = {
        f"filter, {name}": lambda name=name: methods[name].filter(load.proposal()).weights(load.offsets_B1)
        for name in ("mispo", "mispo_quantile", "mispo_metropolis", "random_reject")
    }
    losses = {f"loss, {name}": lambda name=name: loss(name) for name in ("mispo", "ppo", "gspo", "cispo")}
    return {
        **filters,
        "GAE and whitening": advantages,
        "group baseline": grouped,
        **losses,
        "mis/* and mismatch/*": metrics,
    }


PAPER = ("filter, mispo", "GAE and whitening", "loss, mispo")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    forward = forward_seconds(options.repeats) * 1e6
    sections = []
    for length in (64, 1024):
        load = Load(options.tokens, length)
        millions = int(load.offsets_B1[-1]) / 1e6
        parts = stages(load)
        seconds = {name: median_seconds(part, options.repeats) / millions for name, part in parts.items()}
        rows = [
            [name, f"{seconds[name] * 1e3:.0f}", f"{peak_mib(part) / millions:.0f}", f"{seconds[name] / forward:.2%}"]
            for name, part in parts.items()
        ]
        whole = sum(seconds[name] for name in PAPER)
        rows.append(["**the paper's: filter, GAE, loss**", f"{whole * 1e3:.0f}", "", f"{whole / forward:.2%}"])
        sections.append(
            f"## Trajectories of {length // 2} to {length * 3 // 2} tokens\n\n"
            + table(("part", "ms", "peak MiB", "of a forward"), rows)
            + f"\n\nOf a step's scoring and updates (at least {FORWARDS} forwards' worth, rollouts not counted) the "
            f"paper's three parts are {whole / (FORWARDS * forward):.2%}; target ≤ 2 %."
        )
    body = (
        f"Per million generated tokens; median of {options.repeats}. One forward of the tiny model "
        f"({FORWARD_SEQUENCES} × {FORWARD_LENGTH} tokens, log-probs of all) takes {forward:.1f} s per million.\n\n"
        + "\n\n".join(sections)
    )
    sys.stdout.write(f"{write_results('algorithm', 'The cost of the mathematics', body, torch.get_num_threads())}\n")


@torch.no_grad()
def forward_seconds(repeats: int) -> float:
    """Seconds per token of a forward of the tiny model, log-probs and entropy of every token included."""
    policy, _ = build_policy("tiny", None)
    actor = ActorModule(policy, torch.float32)
    ids = torch.randint(7, 100, (FORWARD_SEQUENCES, FORWARD_LENGTH), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(FORWARD_SEQUENCES).repeat_interleave(FORWARD_LENGTH)
    columns = torch.arange(FORWARD_LENGTH).repeat(FORWARD_SEQUENCES)
    return median_seconds(lambda: actor(ids, rows, columns, ids.flatten(), 1.0), repeats) / ids.numel()


if __name__ == "__main__":
    main()
