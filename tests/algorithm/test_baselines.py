"""The losses, corrections and group baselines of other methods against plain loops in float64."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.advantage import group_advantages, monte_carlo
from mispo.algorithm.loss import (
    PolicyLoss,
    cispo_loss,
    critic_loss,
    gspo_loss,
    icepop,
    mispo_loss,
    no_correction,
    ppo_loss,
    truncated_importance,
    unbiased_kl,
)
from mispo.algorithm.objective import Objective, Samples
from support.ragged import Ragged, ragged

Coefficient = Callable[[float, float, float], tuple[float, float]]
"""(r, s, Â) → (a token's loss, its derivative by log π_θ)."""


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """−min(r·Â, clip(r)·Â): the gradient is −r·Â, or 0 where the clip binds."""
    free, bounded = ratio * advantage, min(max(ratio, low), high) * advantage
    return (-free, -free) if free <= bounded else (-bounded, 0.0)


def ppo(r: float, s: float, advantage: float) -> tuple[float, float]:
    loss, slope = clipped(r, advantage, 0.8, 1.3)
    return (-3 * advantage, 0.0) if advantage < 0 and loss > -3 * advantage else (loss, slope)


def gspo(r: float, s: float, advantage: float) -> tuple[float, float]:
    return clipped(s, advantage, 0.9, 1.2)


def inputs(logprobs: Tensor, batch: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """π_old, Â and weights of which some are 0."""
    old = logprobs.detach() + batch.tokens("old", 0.7)
    return old, batch.tokens("advantages").double(), batch.tokens("weights").clamp_min(0).double()


@pytest.mark.parametrize(
    ("loss", "oracle"),
    [
        (partial(ppo_loss, clip=(0.2, 0.3), dual_clip=3.0), ppo),
        (partial(ppo_loss, clip=(0.2, 0.3), dual_clip=None), lambda r, s, a: clipped(r, a, 0.8, 1.3)),
        (partial(gspo_loss, clip=(0.1, 0.2)), gspo),
    ],
)
@given(batch=ragged)
def test_clipped_losses_and_their_gradients(loss: PolicyLoss, oracle: Coefficient, batch: Ragged) -> None:
    logprobs = (batch.tokens("logprobs").double() - 2).requires_grad_()
    old, advantages, weights = inputs(logprobs, batch)
    total, _ = loss(logprobs, old, advantages, weights, batch.offsets)
    total.backward()
    expected, gradient = 0.0, []
    parts = [batch.split(x.detach()) for x in (logprobs, old, advantages, weights)]
    for new_T, old_T, adv_T, weight_T in zip(*parts, strict=True):
        s = math.exp(sum(n - o for n, o in zip(new_T, old_T, strict=True)) / max(len(new_T), 1))
        for n, o, a, w in zip(new_T, old_T, adv_T, weight_T, strict=True):
            value, slope = oracle(math.exp(n - o), s, a)
            expected += w * value
            gradient.append(w * slope)
    assert total.item() == pytest.approx(expected, rel=1e-6, abs=1e-9)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-6, abs=1e-9)


@given(batch=ragged)
def test_cispo_bounds_the_weight_and_keeps_the_gradient(batch: Ragged) -> None:
    logprobs = (batch.tokens("logprobs").double() - 2).requires_grad_()
    old, advantages, weights = inputs(logprobs, batch)
    total, count = cispo_loss(logprobs, old, advantages, weights, batch.offsets, clip=(1.0, 0.5))
    total.backward()
    gradient, beyond = [], 0
    for n, o, a, w in zip(logprobs.tolist(), old.tolist(), advantages.tolist(), weights.tolist(), strict=True):
        gradient.append(-w * min(math.exp(n - o), 1.5) * a)
        beyond += w > 0 and math.exp(n - o) > 1.5
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-6, abs=1e-9)
    assert int(count) == beyond


def test_a_rejected_token_has_gradient_0_whatever_its_ratio() -> None:
    for loss in (
        mispo_loss,
        partial(ppo_loss, clip=(0.2, 0.2), dual_clip=3.0),
        partial(cispo_loss, clip=(1.0, 4.0)),
    ):
        logprobs = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
        old = torch.tensor([-1.0, -2000.0, -torch.inf])
        total, _ = loss(
            logprobs,
            old,
            torch.tensor([1.0, 5.0, torch.inf]),
            torch.tensor([1.0, 0.0, 0.0]),
            torch.tensor([0, 3]),
        )
        (gradient,) = torch.autograd.grad(total, logprobs)
        assert gradient.tolist() == [-1.0, 0.0, 0.0]


@given(batch=ragged)
def test_on_policy_all_losses_have_the_gradient_of_reinforce(batch: Ragged) -> None:
    """π_θ = π_old: the first mini-batch of any of them, with any advantages."""
    gradients = []
    for loss in (
        mispo_loss,
        partial(ppo_loss, clip=(0.2, 0.2), dual_clip=3.0),
        partial(gspo_loss, clip=(3e-4, 4e-4)),
        partial(cispo_loss, clip=(1.0, 4.0)),
    ):
        logprobs = (batch.tokens("logprobs").double() - 2).requires_grad_()
        ones = torch.ones_like(logprobs.detach())
        total, clips = loss(logprobs, logprobs.detach(), batch.tokens("advantages").double(), ones, batch.offsets)
        gradients.append(torch.autograd.grad(total, logprobs)[0])
        assert int(clips) == 0
    assert all(torch.allclose(gradient, -batch.tokens("advantages").double()) for gradient in gradients)


def test_the_corrections() -> None:
    ratios = [math.exp(-5), 0.5, 1.0, 3.0, 5.0]
    log_x = torch.tensor([*map(math.log, ratios), 900.0, -math.inf, math.nan], dtype=torch.float64)
    assert truncated_importance(log_x, 2.0).tolist() == pytest.approx([math.exp(-5), 0.5, 1, 2, 2, 2, 0, 0])
    assert icepop(log_x, (0.5, 5.0)).tolist() == pytest.approx([0, 0.5, 1, 3, 5, 0, 0, 0])
    agreed = torch.zeros(4, dtype=torch.float64)
    for weights in (no_correction(agreed), truncated_importance(agreed, math.inf), icepop(agreed, (0.5, 5.0))):
        assert weights.tolist() == [1.0] * 4


@given(
    rewards=st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=6), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    baseline=st.sampled_from(["group_std", "group_mean", "rloo"]),
)
def test_group_baselines(rewards: list[list[float]], seed: int, baseline: str) -> None:
    returns = torch.tensor([r for group in rewards for r in group], dtype=torch.float64)
    group = torch.tensor([7 + 3 * g for g, members in enumerate(rewards) for _ in members])
    included = torch.rand(len(returns), generator=torch.Generator().manual_seed(seed)) > 0.3
    expected = []
    for r, g, i in zip(returns.tolist(), group.tolist(), included.tolist(), strict=True):
        members = [
            x for x, h, j in zip(returns.tolist(), group.tolist(), included.tolist(), strict=True) if h == g and j
        ]
        if not i or len(members) < 2:
            expected.append(0.0)
            continue
        mean = sum(members) / len(members)
        if baseline == "rloo":
            expected.append(r - (sum(members) - r) / (len(members) - 1))
        elif baseline == "group_mean":
            expected.append(r - mean)
        else:
            deviation = math.sqrt(sum((x - mean) ** 2 for x in members) / (len(members) - 1))
            expected.append((r - mean) / max(deviation, 1e-6))
    found = group_advantages(returns, included, group, baseline)
    assert found.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_monte_carlo_returns_are_discounted_from_the_end() -> None:
    targets = monte_carlo(torch.tensor([1.0, 8.0]), torch.tensor([0, 1, 4]), 0.5)
    assert targets.tolist() == [1.0, 2.0, 4.0, 8.0]


def test_the_kl_term_is_unbiased_in_value_and_gradient() -> None:
    """Summed over all actions with probabilities π_old it is KL(π_θ ‖ π_ref), gradient included."""
    logits = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.1, -0.2, 0.4], dtype=torch.float64).log_softmax(-1)
    reference = torch.tensor([-0.5, 0.5, 0.0], dtype=torch.float64).log_softmax(-1)
    new = logits.log_softmax(-1)
    estimate = unbiased_kl(new, old, reference, old.exp())
    exact = (new.exp() * (new - reference)).sum()
    assert estimate.item() == pytest.approx(exact.item())
    ours, theirs = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (estimate, exact))
    assert ours.tolist() == pytest.approx(theirs.tolist())


def test_the_value_clip_takes_the_worse_of_both() -> None:
    values, old, targets = torch.tensor([1.0, 1.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 3.0])
    loss = critic_loss(values, old, targets, torch.tensor([True, True]), torch.tensor(1.0), 0.2)
    assert loss.item() == pytest.approx((0.2 - 1) ** 2 + (0.2 - 3) ** 2)


@pytest.mark.parametrize(
    ("norm", "denominators"),
    [("tokens", (6, 6)), ("accepted", (3, 6)), ("sequence", (2, 2)), ("constant", (20, 20))],
)
def test_the_denominators(norm: str, denominators: tuple[float, float]) -> None:
    """Three trajectories of 2, 4 and 1 tokens; the last one is left out everywhere."""
    included = torch.tensor([True] * 6 + [False])
    weights = torch.tensor([1.0, 1, 0, 0, 0, 2, 0])
    samples = Samples(torch.zeros(7), torch.ones(7), weights, included)
    objective = Objective(mispo_loss, norm, 10, 0.0, 0.0)
    offsets = torch.tensor([0, 2, 6, 7])
    scale = objective.scale(samples, offsets, lambda number: number)
    assert (scale.policy, scale.everything, scale.kept) == (*denominators, 3)
    logprobs = torch.full((7,), -1.0, requires_grad=True)
    loss, sums = objective(logprobs, torch.zeros(7), samples, offsets, scale)
    share = torch.tensor([1 / 2] * 2 + [1 / 4] * 4 + [1.0]) if norm == "sequence" else torch.ones(7)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == pytest.approx((-weights * share / denominators[0]).tolist())
    assert int(sums["tokens"]) == 6


def test_kl_and_entropy_reach_rejected_tokens_too() -> None:
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    entropy = torch.tensor([0.5, 0.25], requires_grad=True)
    samples = Samples(
        torch.tensor([-1.0, -2.0]),
        torch.ones(2),
        torch.tensor([1.0, 0.0]),
        torch.ones(2, dtype=torch.bool),
        reference=torch.tensor([-1.5, -1.0]),
    )
    objective = Objective(mispo_loss, "tokens", 10, 0.1, 0.01)
    offsets = torch.tensor([0, 1, 2])
    loss, sums = objective(logprobs, entropy, samples, offsets, objective.scale(samples, offsets, int))
    k3 = [math.exp(q) - q - 1 for q in (-0.5, 1.0)]
    assert loss.item() == pytest.approx(1 / 2 + 0.1 * sum(k3) / 2 - 0.01 * 0.75 / 2, rel=1e-5)
    assert sums["kl_ref"].item() == pytest.approx(sum(k3), rel=1e-5)
    gradients = torch.autograd.grad(loss, [logprobs, entropy])
    assert gradients[0][1] != 0
    assert gradients[1].tolist() == pytest.approx([-0.005, -0.005])


@given(
    batch=ragged,
    norm=st.sampled_from(["tokens", "accepted", "sequence", "constant"]),
    loss=st.sampled_from(
        [mispo_loss, partial(ppo_loss, clip=(0.2, 0.2), dual_clip=3.0), partial(gspo_loss, clip=(0.1, 0.1))]
    ),
    cut=st.floats(0, 1),
    seed=st.integers(0, 100),
)
def test_objectives_do_not_depend_on_order_or_split(
    batch: Ragged, norm: str, loss: PolicyLoss, cut: float, seed: int
) -> None:
    """Float64: the gradient of a shuffled batch in two micro-batches is that of the whole one, to 1e-10."""
    objective = Objective(loss, norm, 40, 0.02, 0.01)
    logprobs = batch.tokens("logprobs").double() - 2
    samples = Samples(
        logprobs + batch.tokens("old", 0.3),
        batch.tokens("advantages").double(),
        batch.tokens("weights").clamp_min(0).double(),
        batch.tokens("included") > -1,
        reference=logprobs + batch.tokens("reference", 0.3),
    )
    samples = Samples(**{**vars(samples), "weights": samples.weights * samples.included})
    scale = objective.scale(samples, batch.offsets, int)
    if scale.kept == 0:
        return
    order = torch.randperm(len(batch.lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    place = round(cut * len(order))
    gradients, totals = [], []
    for parts in ([list(range(len(order)))], [order[:place], order[place:]]):
        moving = logprobs.clone().requires_grad_()
        entropy = (moving * 0.5).square()
        total = torch.zeros((), dtype=torch.float64)
        for members in parts:
            spans = [torch.arange(int(batch.offsets[b]), int(batch.offsets[b + 1])) for b in members]
            at = torch.cat([*spans, torch.empty(0, dtype=torch.int64)])
            offsets = torch.tensor([0, *(batch.lengths[b] for b in members)]).cumsum(0)
            share, _ = objective(moving[at], entropy[at], samples.at(at, at.device), offsets, scale)
            total = total + share
        total.backward()
        totals.append(total.item())
        gradients.append(moving.grad)
    assert totals[1] == pytest.approx(totals[0], rel=1e-10, abs=1e-10)
    assert torch.allclose(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)
