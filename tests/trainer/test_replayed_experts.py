"""Router replay on its way from a trajectory to the actor's forwards, and never to critic or reference."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from mispo.trainer.batch import Batch, Layout, Packing, pack
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import ActorModule, CriticModule, Reference
from mispo.trainer.ranks import Ranks
from mispo.trainer.scoring import score_logprobs, score_policy, score_values
from model.build import build_policy
from model.critic import Critic
from model.moe.replay import RouterReplay
from rollouts.trajectory import Prompt, Trajectory, Turn
from support.batches import Plain, batch_of

LAYOUTS = [Layout(10**6), Layout(16), Layout(40, packed=True)]


@pytest.fixture
def actor() -> TrainEngine:
    return cast(
        TrainEngine, Plain("actor", ActorModule(build_policy("micro", None, seed=0)[0], torch.float32, replays=True))
    )


def some_batch(*, replay: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = (9, 14, 5, 11)
    return replace(
        batch_of(list(lengths)),
        ids=[torch.randint(7, 90, (n,), generator=generator) for n in lengths],
        experts=[torch.rand(n - 1, 3, 8, generator=generator).topk(2).indices.byte() for n in lengths]
        if replay
        else None,
    )


def by_hand(actor: TrainEngine, batch: Batch) -> Tensor:
    """One trajectory after the other, by the model's own forward."""
    policy, found = actor.module.policy.eval(), []
    actor.module.replay.set(None)
    with torch.no_grad(), RouterReplay(policy) as replay:
        for ids, columns, experts in zip(batch.ids, batch.columns, batch.experts, strict=True):
            replay.set(experts.transpose(0, 1))
            logp = policy(input_ids=ids[None, :-1]).logits[0].log_softmax(-1)
            found.append(logp[columns].gather(1, ids[columns + 1][:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scoring_activates_the_rollouts_experts(actor: TrainEngine, layout: Layout) -> None:
    batch = some_batch(replay=True)
    scores, _ = score_policy(actor, batch, layout, 1.0)
    free, _ = score_policy(actor, replace(batch, experts=None), layout, 1.0)
    assert torch.allclose(scores.logprobs_N, by_hand(actor, batch), atol=1e-5)
    assert torch.allclose(score_logprobs(actor, batch, layout, 1.0), scores.logprobs_N, atol=1e-5)
    assert (scores.logprobs_N - free.logprobs_N).abs().max() > 1e-2
    at_scored = torch.cat([e[c] for e, c in zip(batch.experts, batch.columns, strict=True)]).transpose(0, 1)
    assert torch.equal(scores.routing.experts, at_scored)
    assert torch.equal(free.routing.experts, free.routing.own)
    assert not torch.equal(scores.routing.own, at_scored)
    # The first MoE layer has seen nothing of the replay yet.
    assert torch.equal(scores.routing.own[0].sort().values, free.routing.own[0].sort().values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_experts_of_the_old_policy_stay_when_the_actor_moves(actor: TrainEngine, layout: Layout) -> None:
    batch = some_batch(replay=False)
    scores, _ = score_policy(actor, batch, layout, 1.0, keep_experts=True)
    assert [len(e) for e in scores.experts] == [len(ids) - 1 for ids in batch.ids]
    kept = replace(batch, experts=scores.experts)
    assert torch.allclose(by_hand(actor, kept), scores.logprobs_N, atol=1e-5)
    with torch.no_grad():
        for name, parameter in actor.module.policy.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.neg_()
    replayed = score_logprobs(actor, kept, layout, 1.0)
    assert torch.allclose(replayed, by_hand(actor, kept), atol=1e-5)
    assert (replayed - score_logprobs(actor, batch, layout, 1.0)).abs().max() > 1e-2


def test_critic_and_reference_route_for_themselves() -> None:
    policy, _ = build_policy("micro", None, seed=0)
    plain, replay = some_batch(replay=False), some_batch(replay=True)
    critic = cast(TrainEngine, Plain("critic", CriticModule(Critic.from_policy(policy, 0.1, 0), torch.float32)))
    values = [score_values(critic, batch, Layout(10**6)) for batch in (plain, replay)]
    assert torch.equal(values[0].values_N, values[1].values_N)
    reference = Reference(ActorModule(policy, torch.float32), critic.ranks)
    a, b = (score_logprobs(reference, batch, Layout(10**6), 1.0) for batch in (plain, replay))
    assert torch.equal(a, b)


def test_trajectories_bring_their_experts_or_are_refused() -> None:
    experts = torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]], dtype=torch.uint8)
    trajectory = Trajectory(
        prompt=Prompt(torch.tensor([5, 6]), "", "", {}, 0),
        sample=0,
        seed=0,
        completion_ids=torch.tensor([7, 8]),
        action_mask=torch.tensor([True, True]),
        rollout_logprobs=torch.zeros(2),
        turns=(Turn((0, 2), 0, "stop"),),
        finish_reason="stop",
        weight_version=0,
        routing_confidence=torch.tensor([0.5]),
        routed_experts=experts,
        completion="",
        reward=1.0,
    )
    packing = Packing("zero", prompts_per_step=1, samples_per_prompt=1, penalty=lambda length: 0.0)
    place = {"step": 1, "version": 0, "ranks": Ranks(0, 1, torch.device("cpu"))}
    assert pack([trajectory], torch.tensor([0]), packing, **place).experts is None
    packing = replace(packing, replay=True)
    batch = pack([trajectory], torch.tensor([0]), packing, **place)
    assert torch.equal(batch.experts[0], experts)
    assert torch.equal(batch.part([0]).experts[0], experts)
    with pytest.raises(ValueError, match=r"router\.replay"):
        pack([replace(trajectory, routed_experts=None)], torch.tensor([0]), packing, **place)
