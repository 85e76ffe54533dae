"""Loss and gradients of actor and critic depend neither on micro-batches, nor on order, nor on padding or packing."""

from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.loss import PolicyLoss, gspo_loss, mispo_loss, ppo_loss
from mispo.algorithm.method import ValueTargets
from mispo.algorithm.objective import Objective, Samples
from mispo.algorithm.segments import lengths_of, offsets_of
from mispo.trainer.batch import Batch, Layout
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import ActorModule, CriticModule
from mispo.trainer.update import actor_updates, update_critic
from model.build import build_policy
from model.critic import Critic, ValueHead
from support.batches import Plain, made_batch, method_of, settings_of, targets_of

COUNT, LONGEST = 6, 24

LAYOUTS = st.builds(Layout, st.integers(LONGEST, COUNT * LONGEST), st.booleans())


def batch_of(seed: int, *, replay: bool = False) -> tuple[Batch, Samples]:
    """Six trajectories of 2 to 24 tokens, some of them rejected, one left out; replay: with experts for the routers."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LONGEST + 1, (COUNT,), generator=generator)
    ids = [torch.randint(7, 90, (int(n),), generator=generator) for n in lengths]
    prompts = [int(torch.randint(1, int(n), (1,), generator=generator)) for n in lengths]
    offsets = offsets_of(torch.tensor([len(i) - p for i, p in zip(ids, prompts, strict=True)]))
    tokens = int(offsets[-1])
    owner = torch.repeat_interleave(torch.arange(COUNT), lengths_of(offsets))
    old, advantages, noise = (torch.randn(tokens, generator=generator) for _ in range(3))
    batch = made_batch(
        ids,
        [torch.arange(p - 1, len(i) - 1) for i, p in zip(ids, prompts, strict=True)],
        included_B=torch.arange(COUNT) != 1,
        experts=[torch.rand(len(i) - 1, 3, 8, generator=generator).topk(2).indices.byte() for i in ids]
        if replay
        else None,
    )
    included = owner != 1
    weights = (noise > -1).float() * (owner != 3) * included
    return batch, Samples(old * 0.3 - 4.5, advantages, weights, included)


def reordered(batch: Batch, samples: Samples, order: list[int]) -> tuple[Batch, Samples]:
    part, at = batch.part(order), batch.tokens_of(order)
    return replace(part, position_B=torch.arange(COUNT)), samples.at(at, torch.device("cpu"))


@pytest.fixture(scope="module")
def engines() -> tuple[Plain, Plain]:
    policy, _ = build_policy("micro", None, seed=0)
    critic = Critic.from_policy(policy, 0.1, 0)
    return Plain("actor", ActorModule(policy, torch.float32, replays=True)), Plain(
        "critic", CriticModule(critic, torch.float32)
    )


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    # A gradient that is 0 but for rounding is compared with the others' size.
    rounding = 1e-6 * max(gradient.norm().item() for gradient in a.values()) + 1e-9
    for name, gradient in a.items():
        assert (gradient - b[name]).norm() <= 1e-5 * gradient.norm() + rounding, name


@pytest.mark.parametrize(
    ("norm", "replay"),
    [("tokens", False), ("tokens", True), ("accepted", False), ("sequence", False), ("constant", True)],
)
@settings(max_examples=4)
@given(seed=st.integers(0, 1000), order=st.permutations(range(COUNT)), layout=LAYOUTS)
def test_the_actors_gradient(
    engines: tuple[Plain, Plain], norm: str, replay: bool, seed: int, order: list[int], layout: Layout
) -> None:
    batch, samples = batch_of(seed, replay=replay)
    losses: list[PolicyLoss] = [
        mispo_loss,
        partial(ppo_loss, clip=(0.2, 0.2), dual_clip=3.0),
        partial(gspo_loss, clip=(0.1, 0.1)),
    ]
    objective = Objective(losses[seed % 3], norm, LONGEST, 0.0, 0.0)
    found = []
    for some, chosen, cut in ((batch, samples, Layout(10**6)), (*reordered(batch, samples, order), layout)):
        engine = engines[0]
        arguments = some, targets_of(chosen), method_of(objective), settings_of(cut)
        (update,) = actor_updates(cast(TrainEngine, engine), *arguments)
        assert update is not None
        found.append((update.loss, engine.gradients()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-7)
    assert_same(found[0][1], found[1][1])


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), order=st.permutations(range(COUNT)), layout=LAYOUTS)
def test_the_critics_gradient(engines: tuple[Plain, Plain], seed: int, order: list[int], layout: Layout) -> None:
    batch, samples = batch_of(seed)
    found = []
    for some, chosen, cut in ((batch, samples, Layout(10**6)), (*reordered(batch, samples, order), layout)):
        engine = engines[1]
        targets = ValueTargets(chosen.old_logprobs, chosen.advantages, chosen.included)
        (update,) = update_critic(cast(TrainEngine, engine), some, targets, settings_of(cut, value_clip=0.3))
        found.append((update.loss, engine.gradients()))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5, abs=1e-7)
    assert_same(found[0][1], found[1][1])


@settings(max_examples=6)
@given(seed=st.integers(0, 1000), order=st.permutations(range(COUNT)), layout=LAYOUTS)
def test_the_gradient_of_a_joint_loss(seed: int, order: list[int], layout: Layout) -> None:
    """Of an actor and a critic that share a trunk: the sum of their losses, each over its own denominator."""
    policy, _ = build_policy("micro", None, seed=0)
    engine = Plain("actor", ActorModule(policy, torch.float32, value_head=ValueHead(policy, 0.1, 0)))
    batch, samples = batch_of(seed)
    objective = Objective(mispo_loss, "accepted", LONGEST, 0.0, 0.0)
    found = []
    for some, chosen, cut in ((batch, samples, Layout(10**6)), (*reordered(batch, samples, order), layout)):
        values = ValueTargets(chosen.old_logprobs, chosen.advantages, chosen.included)
        arguments = some, targets_of(chosen, values), method_of(objective), settings_of(cut, value_weight=0.7)
        (update,) = actor_updates(cast(TrainEngine, engine), *arguments)
        assert update is not None
        found.append((update.loss, update.stats["value_loss"], engine.gradients()))
    assert found[0][1] > 0
    assert found[1][:2] == pytest.approx(found[0][:2], rel=1e-5, abs=1e-7)
    assert "value_head.weight" in found[0][2]
    assert_same(found[0][2], found[1][2])


def test_a_smaller_budget_means_more_forwards(engines: tuple[Plain, Plain]) -> None:
    """Or the tests above would compare one thing with itself."""
    batch, samples = batch_of(3)
    counts = []
    for tokens in (10**6, LONGEST):
        engine, before = engines[1], engines[1].forwards
        targets = ValueTargets(samples.old_logprobs, samples.advantages, samples.included)
        update_critic(cast(TrainEngine, engine), batch, targets, settings_of(Layout(tokens)))
        counts.append(engine.forwards - before)
    assert counts[0] == 1
    assert counts[1] >= COUNT // 2
