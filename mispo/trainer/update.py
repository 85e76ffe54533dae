"""The two updates of a step: the critic's mini-batches, then the actor's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mispo.algorithm.loss import critic_loss
from mispo.algorithm.objective import Objective, Samples, Scale
from mispo.algorithm.segments import segment_sum
from mispo.trainer.batch import Batch, Layout, minibatches
from mispo.trainer.engine import TrainEngine, Update
from mispo.trainer.scoring import equal_count


@dataclass(frozen=True)
class ValueLoss:
    """What values learn from, constant over the step; all [N].

    values: before the step's updates, for the clip. included: bool; the filter has no say in it. weight: of the term in
    a joint loss with the policy's.
    """

    values: Tensor
    targets: Tensor
    included: Tensor
    clip: float | None
    weight: float = 1.0

    def share(self, values_n: Tensor, at: Tensor, count: int) -> Tensor:
        """A micro-batch's share of the loss over `count` tokens of all ranks, from V at the tokens in these places."""
        return critic_loss(
            values_n,
            self.values[at].to(values_n),
            self.targets[at].to(values_n),
            self.included[at].to(values_n.device),
            values_n.new_tensor(float(count)),
            self.clip,
        )


def update_critic(
    critic: TrainEngine, batch: Batch, value_loss: ValueLoss, *, parts: int, layout: Layout, seed: int
) -> list[Update]:
    """`parts` critic updates on fixed targets; every included token counts, accepted by the filter or not."""
    updates = []
    for members in minibatches(batch, parts, seed):
        count = critic.ranks.count(int(value_loss.included[batch.tokens_of(members)].sum()))
        if count == 0:
            continue

        def loss(part: list[int], count: int = count) -> Tensor:
            values = critic.forward(layout.input(batch, part, critic.ranks.device))
            return value_loss.share(values, batch.tokens_of(part), count)

        updates.append(_run(critic, batch, members, layout, loss))
    return updates


def update_actor(
    actor: TrainEngine,
    batch: Batch,
    samples: Samples,
    objective: Objective,
    *,
    parts: int,
    layout: Layout,
    seed: int,
    temperature: float,
    after_update: Callable[[], None],
    reweigh: Callable[[list[int]], Tensor] | None = None,
    value_loss: ValueLoss | None = None,
    mtp_weight: float = 0.0,
) -> list[Update | None]:
    """`parts` actor updates, each sample used once; None where a mini-batch had nothing accepted (no step).

    Trajectories of which every token was rejected are not computed, unless the objective has terms for them too.
    reweigh: weights of these trajectories' tokens under the current π_θ, for the mini-batches after the first (before
    which π_θ is π_old). value_loss: of a critic that shares the trunk; every trajectory is then computed, and its
    sum is in the update's stats, not in its loss. mtp_weight: of the draft heads' loss, over all included tokens of the
    mini-batch; likewise.
    """
    updates: list[Update | None] = []
    for number, members in enumerate(minibatches(batch, parts, seed)):
        at = batch.tokens_of(members)
        if reweigh and number:
            samples = samples.reweighted(at, reweigh(members))
        scale = objective.scale(samples.at(at, at.device), batch.offsets_of(members), actor.ranks.count)
        count = actor.ranks.count(int(value_loss.included[at].sum())) if value_loss else 0
        drafted = max(1, actor.ranks.count(int(samples.included[at].sum()))) if mtp_weight else 1
        if scale.kept == 0 and count == 0:
            updates.append(None)
            continue
        sums: dict[str, Tensor] = {}

        def loss(
            part: list[int],
            samples: Samples = samples,
            scale: Scale = scale,
            sums: Any = sums,
            count: int = count,
            drafted: int = drafted,
        ) -> Tensor:
            logprobs, entropy, values, drafts = actor.forward(
                layout.input(batch, part, actor.ranks.device), temperature
            )
            places = batch.tokens_of(part)
            mine = samples.at(places, logprobs.device)
            share, found = objective(logprobs, entropy, mine, batch.offsets_of(part).to(logprobs.device), scale)
            if value_loss and count:
                found["value_loss"] = value_loss.share(values, places, count)
                share = share + value_loss.weight * found["value_loss"]
            if mtp_weight:
                found["draft_nll"] = (drafts * mine.included).sum()
                share = share + mtp_weight * found["draft_nll"] / drafted
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach().double().cpu()
            return share

        kept_B = segment_sum(samples.weights > 0, batch.offsets_B1)
        needed = [b for b in members if objective.everywhere or value_loss or kept_B[b] > 0]
        update = _run(actor, batch, needed, layout, loss, partial=scale.kept == 0)
        stats = {name: actor.ranks.sum(sums[name]).item() for name in sorted(sums)}
        others = mtp_weight * stats.get("draft_nll", 0.0) / drafted
        others += value_loss.weight * stats.get("value_loss", 0.0) if value_loss else 0.0
        update = replace(update, loss=update.loss - others, stats=stats)
        updates.append(update)
        if update.applied:
            after_update()
    return updates


def value_updates(updates: Sequence[Update | None]) -> list[Update]:
    """The critic's side of joint updates."""
    return [replace(u, loss=u.stats["value_loss"], stats={}) for u in updates if u and "value_loss" in u.stats]


def _run(
    engine: TrainEngine,
    batch: Batch,
    members: list[int],
    layout: Layout,
    loss: Callable[[list[int]], Tensor],
    *,
    partial: bool = False,
) -> Update:
    shared = equal_count(engine.ranks, layout.microbatches(batch, members))
    return engine.update([lambda part=part: loss(part) for part in shared], partial=partial)
