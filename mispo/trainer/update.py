"""The two updates of a step: the critic's mini-batches, then the actor's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from mispo.algorithm.loss import critic_loss
from mispo.algorithm.objective import Objective, Samples, Scale
from mispo.algorithm.segments import segment_sum
from mispo.trainer.batch import Batch, Layout, minibatches
from mispo.trainer.engine import TrainEngine, Update
from mispo.trainer.scoring import equal_count


def update_critic(
    critic: TrainEngine,
    batch: Batch,
    values_N: Tensor,
    targets_N: Tensor,
    included_N: Tensor,
    *,
    parts: int,
    layout: Layout,
    seed: int,
    value_clip: float | None,
) -> list[Update]:
    """`parts` critic updates on fixed targets [N]; every included token counts, accepted by the filter or not.

    values_N: before the step's updates, for the value clip.
    """
    updates = []
    for members in minibatches(batch, parts, seed):
        count = critic.ranks.count(int(included_N[batch.tokens_of(members)].sum()))
        if count == 0:
            continue

        def loss(part: list[int], denominator: float = float(count)) -> Tensor:
            at = batch.tokens_of(part)
            values = critic.forward(layout.input(batch, part, critic.ranks.device))
            return critic_loss(
                values,
                values_N[at].to(values),
                targets_N[at].to(values),
                included_N[at].to(values.device),
                values.new_tensor(denominator),
                value_clip,
            )

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
) -> list[Update | None]:
    """`parts` actor updates, each sample used once; None where a mini-batch had nothing accepted (no step).

    Trajectories of which every token was rejected are not computed, unless the objective has terms for them too.
    reweigh: weights of these trajectories' tokens under the current π_θ, for the mini-batches after the first (before
    which π_θ is π_old).
    """
    updates: list[Update | None] = []
    for number, members in enumerate(minibatches(batch, parts, seed)):
        at = batch.tokens_of(members)
        if reweigh and number:
            samples = samples.reweighted(at, reweigh(members))
        scale = objective.scale(samples.at(at, at.device), batch.offsets_of(members), actor.ranks.count)
        if scale.kept == 0:
            updates.append(None)
            continue
        sums: dict[str, Tensor] = {}

        def loss(part: list[int], samples: Samples = samples, scale: Scale = scale, sums: Any = sums) -> Tensor:
            logprobs, entropy = actor.forward(layout.input(batch, part, actor.ranks.device), temperature)
            mine = samples.at(batch.tokens_of(part), logprobs.device)
            share, found = objective(logprobs, entropy, mine, batch.offsets_of(part).to(logprobs.device), scale)
            for name, value in found.items():
                sums[name] = sums.get(name, 0) + value.detach().double().cpu()
            return share

        kept_B = segment_sum(samples.weights > 0, batch.offsets_B1)
        needed = [b for b in members if objective.everywhere or kept_B[b] > 0]
        update = _run(actor, batch, needed, layout, loss)
        update = replace(update, stats={name: actor.ranks.sum(sums[name]).item() for name in sorted(sums)})
        updates.append(update)
        if update.applied:
            after_update()
    return updates


def _run(
    engine: TrainEngine,
    batch: Batch,
    members: list[int],
    layout: Layout,
    loss: Callable[[list[int]], Tensor],
) -> Update:
    shared = equal_count(engine.ranks, layout.microbatches(batch, members))
    return engine.update([lambda part=part: loss(part) for part in shared])
