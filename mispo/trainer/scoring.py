"""Score a batch with the trainer's own models: old log-probs, entropy, routing, values. No gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mispo.trainer.batch import Batch, Layout
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import Reference
from mispo.trainer.ranks import Ranks
from model.routing import RoutingRecorder


@dataclass(frozen=True)
class PolicyScores:
    """Under π_old, on the CPU: log-probs [N] and entropy [N], fp32.

    Routing over the same tokens: confidence [L, N] and expert ids [L, N, k]; None for a dense model.
    """

    logprobs_N: Tensor
    entropy_N: Tensor
    confidence_LN: Tensor | None
    experts_LNk: Tensor | None


@dataclass(frozen=True)
class Values:
    """values_N: V(s_0 … s_{T−1}) flat. bootstrap_B: V(s_T), the state after the last token. fp32, CPU."""

    values_N: Tensor
    bootstrap_B: Tensor


@torch.no_grad()
def score_policy(actor: TrainEngine, batch: Batch, layout: Layout, temperature: float) -> PolicyScores:
    """One forward over the batch; dropout off."""
    actor.eval()
    tokens = int(batch.offsets_B1[-1])
    logprobs_N, entropy_N = torch.zeros(tokens), torch.zeros(tokens)
    confidence, experts, places = [], [], []
    with RoutingRecorder(actor.module) as recorder:
        for members in equal_count(actor.ranks, layout.microbatches(batch, range(len(batch)))):
            x = layout.input(batch, members, actor.ranks.device)
            logprobs, entropy = actor.forward(x, temperature)
            at = batch.tokens_of(members)
            logprobs_N[at], entropy_N[at] = logprobs.cpu(), entropy.cpu()
            routing = recorder.take()
            if routing is not None:
                flat = x.rows * x.ids.shape[1] + x.columns
                confidence.append(routing.confidence[:, flat].cpu())
                experts.append(routing.experts[:, flat].cpu())
                places.append(at)
    if not confidence:
        return PolicyScores(logprobs_N, entropy_N, None, None)
    order = torch.argsort(torch.cat(places))
    return PolicyScores(logprobs_N, entropy_N, torch.cat(confidence, 1)[:, order], torch.cat(experts, 1)[:, order])


@torch.no_grad()
def score_values(critic: TrainEngine, batch: Batch, layout: Layout) -> Values:
    """One forward over the batch gives V at every scored token and after the last one; dropout off."""
    critic.eval()
    values_N, bootstrap_B = torch.zeros(int(batch.offsets_B1[-1])), torch.zeros(len(batch))
    for members in equal_count(critic.ranks, layout.microbatches(batch, range(len(batch)))):
        x = layout.input(batch, members, critic.ranks.device)
        end = layout.input(batch, members, critic.ranks.device, last=True)
        both = replace(x, rows=torch.cat([x.rows, end.rows]), columns=torch.cat([x.columns, end.columns]))
        values = critic.forward(both).cpu()
        tokens = len(x.rows)
        values_N[batch.tokens_of(members)] = values[:tokens]
        bootstrap_B[list(members)] = values[tokens:]
    return Values(values_N, bootstrap_B)


@torch.no_grad()
def score_logprobs(
    policy: TrainEngine | Reference,
    batch: Batch,
    members: Sequence[int],
    layout: Layout,
    temperature: float,
) -> Tensor:
    """Log-probs [N] of these trajectories' tokens under a policy, 0 elsewhere; fp32, CPU."""
    policy.eval()
    logprobs_N = torch.zeros(int(batch.offsets_B1[-1]))
    for part in equal_count(policy.ranks, layout.microbatches(batch, members)):
        logprobs, _ = policy.forward(layout.input(batch, part, policy.ranks.device), temperature)
        logprobs_N[batch.tokens_of(part)] = logprobs.cpu()
    return logprobs_N


def equal_count(ranks: Ranks, parts: list[list[int]]) -> list[list[int]]:
    """Pad with empty micro-batches, so that every rank runs the same number of forwards."""
    most = int(ranks.max(torch.tensor(len(parts))))
    return parts + [[] for _ in range(most - len(parts))]
