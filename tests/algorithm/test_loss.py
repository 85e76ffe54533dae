"""Losses and their gradients against plain loops in float64; a rejected token has a gradient of exactly 0."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.filter import bounds_filter
from mispo.algorithm.loss import critic_loss, mispo_loss
from support.ragged import Ragged, proposal, ragged


def mispo(logprobs: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """The sum; neither π_old nor the offsets matter."""
    nowhere = torch.full_like(logprobs, torch.nan)
    return mispo_loss(logprobs, nowhere, advantages, weights, torch.tensor([0, len(logprobs)]))[0]


@given(batch=ragged)
def test_the_loss_is_a_sum_over_kept_tokens_of_accepted_trajectories(batch: Ragged) -> None:
    """−1/D Σ_b I(ρ̄_b) Σ_t I(x_bt)·Â_bt·log π(a_bt), and its gradient."""
    logprobs = (batch.tokens("logprobs") - 2).requires_grad_()
    advantages = batch.tokens("advantages")
    rollout = logprobs.detach() + batch.tokens("shift", 0.01)
    chosen = bounds_filter(proposal(logprobs.detach(), rollout, batch.offsets), (0.99, 1.01), (0.996, 1.001))
    tokens = max(sum(batch.lengths), 1)

    expected, gradient = 0.0, []
    keeps = batch.split(chosen.keep_N)
    for b, (logp_T, adv_T) in enumerate(zip(batch.split(logprobs.detach()), batch.split(advantages), strict=True)):
        for t, (logp, advantage) in enumerate(zip(logp_T, adv_T, strict=True)):
            counts = keeps[b][t] * int(chosen.multiplicity_B[b])
            expected -= counts * advantage * logp / tokens
            gradient.append(-counts * advantage / tokens)

    loss = mispo(logprobs, advantages, chosen.weights(batch.offsets)) / tokens
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx(gradient, rel=1e-5, abs=1e-7)


def test_a_rejected_token_has_gradient_exactly_0_even_where_its_logprob_is_infinite() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, -torch.inf], [0.0, 1.0]], requires_grad=True)
    logprobs = logits.log_softmax(-1)[torch.arange(3), torch.tensor([0, 1, 1])]
    loss = mispo(logprobs, torch.tensor([1.0, 5.0, torch.inf]), torch.tensor([1.0, 0.0, 0.0])) / 3
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert gradient.tolist() == [pytest.approx(-1 / 3), 0.0, 0.0]
    assert torch.isfinite(loss)


def test_a_multiplicity_counts_a_trajectory_that_often() -> None:
    logprobs, ones = torch.tensor([-1.0, -2.0]), torch.ones(2)
    loss = mispo(logprobs, ones, torch.tensor([3.0, 1.0])) / 2
    assert loss.item() == pytest.approx((3 * 1 + 1 * 2) / 2)


def test_no_importance_weight_and_no_clip() -> None:
    """The gradient of an accepted token is −Â/D wherever the current policy has moved to."""
    for moved in (-5.0, 0.0, 5.0):
        logprob = torch.tensor([-1.0 + moved], requires_grad=True)
        (mispo(logprob, torch.tensor([2.0]), torch.tensor([1.0])) / 4).backward()
        assert logprob.grad is not None
        assert logprob.grad.item() == -0.5


@given(batch=ragged, cut=st.floats(0, 1))
def test_microbatches_add_up(batch: Ragged, cut: float) -> None:
    logprobs, advantages = batch.tokens("logprobs"), batch.tokens("advantages")
    weights = (batch.tokens("weights") > 0).float()
    place = int(cut * len(logprobs))
    parts = [mispo(logprobs[s], advantages[s], weights[s]) for s in (slice(place), slice(place, None))]
    assert torch.allclose(sum(parts), mispo(logprobs, advantages, weights), atol=1e-4)


@given(batch=ragged)
def test_the_critic_loss_is_a_mean_of_squares_over_what_is_included(batch: Ragged) -> None:
    values = batch.tokens("values").requires_grad_()
    targets, included = batch.tokens("targets"), batch.tokens("included") > 0
    count = max(int(included.sum()), 1)
    loss = critic_loss(values, targets, targets, included, torch.tensor(float(count)), None)
    loss.backward()
    expected, gradient = 0.0, []
    for v, r, i in zip(values.tolist(), targets.tolist(), included.tolist(), strict=True):
        expected += i * (v - r) ** 2 / count
        gradient.append(i * 2 * (v - r) / count)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx(gradient, rel=1e-4, abs=1e-6)
