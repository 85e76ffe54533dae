"""Draft heads that learn beside the actor: what they learn, in every layout, and that the policy is spared."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor

from mispo.algorithm.loss import mispo_loss
from mispo.algorithm.objective import Objective, Samples
from mispo.trainer.batch import Batch, Layout
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import ActorModule
from mispo.trainer.update import actor_updates
from model.build import build_policy, let_drafts_learn
from model.step.mtp import draft_loss
from model.step.step import StepForCausalLM
from support.batches import Plain, batch_of, method_of, settings_of, targets_of

LENGTHS = [9, 23, 4, 5, 14, 2]
"""The last one has nothing to draft."""

WEIGHT = 0.3


def actor(drafts: bool) -> Plain:
    policy, _ = build_policy("micro", None, seed=0, mtp=3)
    let_drafts_learn(policy, drafts)
    return Plain("actor", ActorModule(policy, torch.float32, drafts=drafts))


def step_data() -> tuple[Batch, Samples]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(7, 90, (n,), generator=generator) for n in LENGTHS]
    batch = replace(batch_of(LENGTHS, prompt=1), ids=ids)
    tokens = int(batch.offsets_B1[-1])
    advantages, everything = torch.randn(tokens, generator=generator), torch.ones(tokens)
    return batch, Samples(torch.full((tokens,), -4.5), advantages, everything, everything.bool())


def updated(engine: Plain, layout: Layout, weight: float) -> tuple[dict[str, Tensor], dict[str, float], float]:
    batch, samples = step_data()
    method = method_of(Objective(mispo_loss, "tokens", 30, 0.0, 0.0))
    arguments = batch, targets_of(samples), method, settings_of(layout, mtp_weight=weight)
    (update,) = actor_updates(cast(TrainEngine, engine), *arguments)
    assert update is not None
    return engine.gradients(), dict(update.stats), update.loss


@pytest.mark.parametrize("layout", [Layout(10**6), Layout(24), Layout(40, packed=True), Layout(10**6, packed=True)])
def test_gradients_are_those_of_the_draft_loss_in_every_layout(layout: Layout) -> None:
    engine = actor(drafts=True)
    gradients, stats, _ = updated(engine, layout, WEIGHT)
    policy = cast(StepForCausalLM, engine.module.policy)
    policy.zero_grad()
    batch, _ = step_data()
    # By hand, one trajectory after the other, each behind a prompt of one token.
    total = sum(draft_loss(policy.draft(ids[None])[1], ids[None]) for ids in batch.ids if len(ids) > 2)
    (WEIGHT * total / int(batch.offsets_B1[-1])).backward()
    assert stats["draft_nll"] == pytest.approx(total.item(), rel=1e-5)
    heads = {name: p.grad for name, p in engine.module.named_parameters() if ".mtp." in name}
    assert len(heads) > 30
    for name, gradient in heads.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-9, name


def test_the_policy_does_not_feel_them() -> None:
    layout = Layout(24)
    without, _, loss = updated(actor(drafts=False), layout, 0.0)
    gradients, stats, same = updated(actor(drafts=True), layout, WEIGHT)
    assert same == pytest.approx(loss, rel=1e-5)
    assert stats["draft_nll"] > 0
    assert {name for name in gradients.keys() - without.keys() if ".mtp." not in name} == set()
    for name, gradient in without.items():
        assert torch.allclose(gradients[name], gradient, atol=1e-7), name
