"""The two updates of a step: the critic's mini-batches, then the actor's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial as bound
from typing import Any

import torch
from torch import Tensor

from mispo.algorithm.filter import Proposal
from mispo.algorithm.loss import critic_loss
from mispo.algorithm.method import Method, Targets, ValueTargets
from mispo.algorithm.objective import Objective, Samples, Scale
from mispo.algorithm.segments import segment_sum
from mispo.trainer.batch import Batch, Layout, minibatches
from mispo.trainer.engine import TrainEngine, Update
from mispo.trainer.policy import ActorModule, CriticModule
from mispo.trainer.scoring import equal_count, score_logprobs
from rollouts.episodes import request_seed

RANDOM_CHOICES = ("actor", "critic", "filter")
"""The random choices of a step, apart from sampling."""


@dataclass(frozen=True)
class UpdateSettings:
    """How a step's samples become updates.

    seed: of the run. temperature: of the rollouts. value_clip: see `critic_loss`. value_weight: of the value loss in a
    joint loss with the policy's (critic=shared). mtp_weight: of the draft heads' loss, 0 = they do not learn.
    """

    layout: Layout
    seed: int
    temperature: float
    actor_minibatches: int
    critic_minibatches: int
    value_clip: float | None
    value_weight: float
    mtp_weight: float


def step_seed(seed: int, choice: str, step: int) -> int:
    """Return the seed of one of the RANDOM_CHOICES of a step."""
    return request_seed(seed, step, RANDOM_CHOICES.index(choice))


def propose(batch: Batch, logprobs_N: Tensor, seed: int) -> Proposal:
    """Build the proposal of a step for a target policy with these log-probs."""
    return Proposal(
        old_logprobs_N=logprobs_N,
        rollout_logprobs_N=batch.rollout_logprobs_N,
        offsets_B1=batch.offsets_B1,
        position_B=batch.position_B,
        group_B=batch.group_B,
        seed=step_seed(seed, "filter", batch.step),
        everyone=batch.everyone,
    )


def update_critic(
    critic: TrainEngine[CriticModule], batch: Batch, targets: ValueTargets, settings: UpdateSettings
) -> list[Update]:
    """Make the critic's updates on fixed targets; every included token counts, accepted by the filter or not."""
    updates = []
    seed = step_seed(settings.seed, "critic", batch.step)
    for members in minibatches(batch, settings.critic_minibatches, seed):
        count = critic.ranks.count(int(targets.included[batch.tokens_of(members)].sum()))
        if count == 0:
            continue

        def loss(part: list[int], count: int = count) -> Tensor:
            values_n = critic.forward(settings.layout.input(batch, part, critic.ranks.device))
            return value_loss(targets, values_n, batch.tokens_of(part), count, settings.value_clip)

        updates.append(_run(critic, batch, members, settings.layout, loss))
    return updates


def value_loss(targets: ValueTargets, values_n: Tensor, at: Tensor, count: int, clip: float | None) -> Tensor:
    """Return a micro-batch's share of the critic's loss over `count` tokens of all ranks.

    values_n: V at the tokens in the places `at`.
    """
    return critic_loss(
        values_n,
        targets.old[at].to(values_n),
        targets.targets[at].to(values_n),
        targets.included[at].to(values_n.device),
        values_n.new_tensor(float(count)),
        clip,
    )


def actor_updates(
    actor: TrainEngine[ActorModule], batch: Batch, targets: Targets, method: Method, settings: UpdateSettings
) -> Iterator[Update | None]:
    """Make the actor's updates one by one, each sample used once; None where a mini-batch had nothing accepted.

    Trajectories of which every token was rejected are not computed, unless the loss has terms for them too. If the
    method rechecks, each mini-batch after the first is weighted by the filter under the current π_θ (before the first,
    π_θ is π_old). With values in the actor's trunk (critic=shared) the loss is joint.
    """
    samples = targets.samples
    joint = targets.values if actor.module.value_head is not None else None
    seed = step_seed(settings.seed, "actor", batch.step)
    for number, members in enumerate(minibatches(batch, settings.actor_minibatches, seed)):
        at = batch.tokens_of(members)
        if method.rechecks and number:
            samples = samples.reweighted(at, recheck(actor, batch.part(members), samples, at, method, settings))
        loss = _ActorLoss.over(actor, batch, members, samples, method.objective, joint, settings)
        if loss.scale.kept == 0 and loss.valued == 0:
            yield None
            continue
        kept_B = segment_sum(samples.weights > 0, batch.offsets_B1)
        needed = [b for b in members if method.objective.everywhere or joint or kept_B[b] > 0]
        update = _run(actor, batch, needed, settings.layout, loss, partial=loss.scale.kept == 0)
        yield loss.named(update)


def recheck(
    actor: TrainEngine[ActorModule], part: Batch, samples: Samples, at: Tensor, method: Method, settings: UpdateSettings
) -> Tensor:
    """Compute token weights of some trajectories, with the filter under the current π_θ (mask_policy: current)."""
    logprobs_N = score_logprobs(actor, part, settings.layout, settings.temperature)
    selection = method.select(propose(part, logprobs_N, settings.seed))
    # The correction stays that of π_old.
    log_x_N = samples.old_logprobs[at].double() - part.rollout_logprobs_N.double()
    return method.weights(selection, log_x_N, part.offsets_B1, samples.included[at])


@dataclass
class _ActorLoss:
    """The loss of one mini-batch as a function of its micro-batches.

    valued, drafted: tokens in the value loss and in the draft heads' loss (at least 1) over all ranks. sums: over the
    micro-batches so far, for metrics.
    """

    actor: TrainEngine[ActorModule]
    batch: Batch
    samples: Samples
    objective: Objective
    scale: Scale
    joint: ValueTargets | None
    valued: int
    drafted: int
    settings: UpdateSettings
    sums: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def over(
        actor: TrainEngine[ActorModule],
        batch: Batch,
        members: list[int],
        samples: Samples,
        objective: Objective,
        joint: ValueTargets | None,
        settings: UpdateSettings,
    ) -> _ActorLoss:
        at = batch.tokens_of(members)
        return _ActorLoss(
            actor=actor,
            batch=batch,
            samples=samples,
            objective=objective,
            scale=objective.scale(samples.at(at, at.device), batch.offsets_of(members), actor.ranks.count),
            joint=joint,
            valued=actor.ranks.count(int(joint.included[at].sum())) if joint else 0,
            drafted=max(1, actor.ranks.count(int(samples.included[at].sum()))) if settings.mtp_weight else 1,
            settings=settings,
        )

    def __call__(self, part: list[int]) -> Tensor:
        x = self.settings.layout.input(self.batch, part, self.actor.ranks.device)
        logprobs, entropy, values, drafts = self.actor.forward(x, self.settings.temperature)
        places = self.batch.tokens_of(part)
        mine = self.samples.at(places, logprobs.device)
        offsets = self.batch.offsets_of(part).to(logprobs.device)
        share, terms = self.objective(logprobs, entropy, mine, offsets, self.scale)
        if self.joint and self.valued:
            terms["value_loss"] = value_loss(self.joint, values, places, self.valued, self.settings.value_clip)
            share = share + self.settings.value_weight * terms["value_loss"]
        if self.settings.mtp_weight:
            terms["draft_nll"] = (drafts * mine.included).sum()
            share = share + self.settings.mtp_weight * terms["draft_nll"] / self.drafted
        for name, value in terms.items():
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.detach().double().cpu()
        return share

    def named(self, update: Update) -> Update:
        """Return the update with the sums of all ranks; its loss is that of the policy alone."""
        stats = {name: self.actor.ranks.sum(self.sums[name]).item() for name in sorted(self.sums)}
        others = self.settings.mtp_weight * stats.get("draft_nll", 0.0) / self.drafted
        others += self.settings.value_weight * stats.get("value_loss", 0.0) if self.joint else 0.0
        return replace(update, loss=update.loss - others, stats=stats)


def value_updates(updates: Sequence[Update | None]) -> list[Update]:
    """Return the critic's side of joint updates."""
    return [replace(u, loss=u.stats["value_loss"], stats={}) for u in updates if u and "value_loss" in u.stats]


def _run(
    engine: TrainEngine[Any],
    batch: Batch,
    members: list[int],
    layout: Layout,
    loss: Callable[[list[int]], Tensor],
    *,
    partial: bool = False,
) -> Update:
    shared = equal_count(engine.ranks, layout.microbatches(batch, members))
    return engine.update([bound(loss, part) for part in shared], partial=partial)
