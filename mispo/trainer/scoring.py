"""Score a batch with the trainer's own models: old log-probs, entropy, routing, values. No gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mispo.trainer.batch import Layout, ModelInput, Sequences
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import ActorModule, CriticModule, Reference
from mispo.trainer.ranks import Ranks
from model.moe.routers import Routing, RoutingRecorder


@dataclass(frozen=True)
class PolicyScores:
    """Scores under π_old, on the CPU: log-probs [N] and entropy [N], fp32.

    routing: over the same tokens; None for a dense model. experts: per trajectory [S_b−1, L, k], those that were
    activated at every position but the last; None unless they were kept.
    """

    logprobs_N: Tensor
    entropy_N: Tensor
    routing: Routing | None
    experts: list[Tensor] | None = None


@dataclass(frozen=True)
class Values:
    """Values of the critic, fp32, on the CPU.

    values_N: V(s_0 … s_{T−1}), flat. bootstrap_B: V(s_T), the state after the last token.
    """

    values_N: Tensor
    bootstrap_B: Tensor

    def put(self, places: Tensor, members: Sequence[int], values_n: Tensor) -> None:
        """Fill in V at these tokens' places, followed by V(s_T) of these trajectories."""
        self.values_N[places] = values_n[: len(places)].cpu()
        self.bootstrap_B[list(members)] = values_n[len(places) :].cpu()


@dataclass(frozen=True)
class Scores:
    """All scores of a batch before its updates. values: None without a critic. reference_N: log π_ref, None without a
    KL term."""

    policy: PolicyScores
    values: Values | None
    reference_N: Tensor | None


@torch.no_grad()
def score_policy(
    actor: TrainEngine[ActorModule], batch: Sequences, layout: Layout, temperature: float, *, keep_experts: bool = False
) -> tuple[PolicyScores, Values | None]:
    """Score the batch in one forward without dropout; with values if the actor's trunk has a value head.

    keep_experts: keep the experts of all positions, to be replayed in the updates.
    """
    actor.eval()
    tokens = int(batch.offsets_B1[-1])
    logprobs_N, entropy_N = torch.zeros(tokens), torch.zeros(tokens)
    values = Values(torch.zeros(tokens), torch.zeros(len(batch)))
    routings: list[Routing] = []
    places: list[Tensor] = []
    kept: dict[int, Tensor] = {}
    with RoutingRecorder(actor.module) as recorder:
        for members in equal_count(actor.ranks, layout.microbatches(batch, range(len(batch)))):
            x = _with_ends(layout, batch, members, actor)
            logprobs, entropy, values_n, _ = actor.forward(x, temperature)
            at, count = batch.tokens_of(members), len(x.targets)
            logprobs_N[at], entropy_N[at] = logprobs.cpu(), entropy.cpu()
            if values_n is not None:
                values.put(at, members, values_n)
            routing = recorder.take(margin=True, replayed=x.replay)
            if routing is not None:
                routings.append(routing.at((x.rows * x.ids.shape[1] + x.columns)[:count]))
                places.append(at)
                if keep_experts:
                    spans = zip(members, x.starts, x.lengths, strict=False)  # an empty micro-batch has a pad token
                    kept |= {b: routing.experts[:, s : s + n - 1].transpose(0, 1).cpu() for b, s, n in spans}
    shared = values if actor.module.value_head else None
    if not routings:
        return PolicyScores(logprobs_N, entropy_N, None), shared
    routing = Routing.concatenated(routings).at(torch.argsort(torch.cat(places)))
    experts = [kept[b] for b in range(len(batch))] if keep_experts else None
    return PolicyScores(logprobs_N, entropy_N, routing, experts), shared


@torch.no_grad()
def score_values(critic: TrainEngine[CriticModule], batch: Sequences, layout: Layout) -> Values:
    """Compute V at every scored token and after the last one, in one forward without dropout."""
    critic.eval()
    values = Values(torch.zeros(int(batch.offsets_B1[-1])), torch.zeros(len(batch)))
    for members in equal_count(critic.ranks, layout.microbatches(batch, range(len(batch)))):
        values_n = critic.forward(_with_ends(layout, batch, members, critic))
        values.put(batch.tokens_of(members), members, values_n)
    return values


def _with_ends(layout: Layout, batch: Sequences, members: Sequence[int], engine: TrainEngine[Any]) -> ModelInput:
    """Lay out a micro-batch read at its scored tokens, then at each trajectory's last token, where V(s_T) is."""
    x = layout.input(batch, members, engine.ranks.device)
    end = layout.input(batch, members, engine.ranks.device, last=True)
    return replace(x, rows=torch.cat([x.rows, end.rows]), columns=torch.cat([x.columns, end.columns]))


@torch.no_grad()
def score_logprobs(
    policy: TrainEngine[Any] | Reference, batch: Sequences, layout: Layout, temperature: float
) -> Tensor:
    """Compute the log-probs [N] of the scored tokens under a policy; fp32, CPU."""
    policy.eval()
    logprobs_N = torch.zeros(int(batch.offsets_B1[-1]))
    for part in equal_count(policy.ranks, layout.microbatches(batch, range(len(batch)))):
        logprobs, *_ = policy.forward(layout.input(batch, part, policy.ranks.device), temperature)
        logprobs_N[batch.tokens_of(part)] = logprobs.cpu()
    return logprobs_N


def equal_count(ranks: Ranks, parts: list[list[int]]) -> list[list[int]]:
    """Add empty micro-batches, so that every rank runs the same number of forwards."""
    most = int(ranks.max(torch.tensor(len(parts))))
    return parts + [[] for _ in range(most - len(parts))]
