"""The two updates of a step: the critic's mini-batches, then the actor's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mispo.algorithm.loss import critic_loss, mispo_loss
from mispo.trainer.batch import Batch, microbatches, minibatches, model_input
from mispo.trainer.engine import TrainEngine, Update
from mispo.trainer.scoring import equal_count


def update_critic(
    critic: TrainEngine,
    batch: Batch,
    targets_N: Tensor,
    included_N: Tensor,
    *,
    parts: int,
    token_budget: int,
    seed: int,
) -> list[Update]:
    """`parts` critic updates on fixed targets [N]; every included token counts, accepted by the filter or not."""
    updates = []
    for members in minibatches(batch, parts, seed):
        count = critic.ranks.count(int(included_N[batch.tokens_of(members)].sum()))
        if count == 0:
            continue

        def loss(part: list[int], denominator: float = float(count)) -> Tensor:
            x = model_input(batch, part, critic.ranks.device)
            at = batch.tokens_of(part)
            values = critic.forward(x.ids, x.rows, x.columns)
            return critic_loss(
                values,
                targets_N[at].to(values),
                included_N[at].to(values.device),
                values.new_tensor(denominator),
            )

        updates.append(_run(critic, batch, members, token_budget, loss))
    return updates


def update_actor(
    actor: TrainEngine,
    batch: Batch,
    advantages_N: Tensor,
    weights_N: Tensor,
    included_N: Tensor,
    *,
    parts: int,
    token_budget: int,
    seed: int,
    temperature: float,
    loss_norm: str,
    after_update: Callable[[], None],
) -> list[Update | None]:
    """`parts` actor updates, each sample used once; None where a mini-batch had nothing accepted (no step).

    weights_N: the filter's, constant over the step. loss_norm: "tokens": all included generated tokens of the
    mini-batch over all ranks are the denominator; "accepted": the kept ones.
    """
    updates: list[Update | None] = []
    for members in minibatches(batch, parts, seed):
        at = batch.tokens_of(members)
        kept = actor.ranks.count(int((weights_N[at] > 0).sum()))
        if kept == 0:
            updates.append(None)
            continue
        count = kept if loss_norm == "accepted" else actor.ranks.count(int(included_N[at].sum()))

        def loss(part: list[int], denominator: float = float(count)) -> Tensor:
            x = model_input(batch, part, actor.ranks.device)
            at = batch.tokens_of(part)
            logprobs, _ = actor.forward(x.ids, x.rows, x.columns, x.targets, temperature)
            return mispo_loss(
                logprobs,
                advantages_N[at].to(logprobs),
                weights_N[at].to(logprobs),
                logprobs.new_tensor(denominator),
            )

        update = _run(actor, batch, members, token_budget, loss)
        updates.append(update)
        if update.applied:
            after_update()
    return updates


def _run(
    engine: TrainEngine,
    batch: Batch,
    members: list[int],
    token_budget: int,
    loss: Callable[[list[int]], Tensor],
) -> Update:
    shared = equal_count(engine, microbatches(batch, members, token_budget))
    return engine.update([lambda part=part: loss(part) for part in shared])
