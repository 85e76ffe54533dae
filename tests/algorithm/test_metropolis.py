"""The independence chain has the target as its stationary law; the quantile controller finds its acceptance."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mispo.algorithm.controller import NARROWEST, WIDEST, QuantileFilter, half_width
from mispo.algorithm.filter import metropolis
from mispo.algorithm.segments import offsets_of
from support.ragged import Ragged, proposal, ragged

LETTERS, LENGTH = 3, 2
"""A state is a word of two letters: nine states, each a trajectory of two tokens."""

CHI2_999 = {8: 26.12}
"""99.9 % quantile of χ² by degrees of freedom."""


def draw_words(samples: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Words from a rollout policy: (words [samples], old and rollout log-probs [samples·2], target law [9])."""
    generator = torch.Generator().manual_seed(11)
    rollout, old = (torch.randn(LENGTH, LETTERS, generator=generator, dtype=torch.float64).log_softmax(1) for _ in "ab")
    letters = torch.stack(
        [torch.multinomial(rollout[t].exp(), samples, replacement=True, generator=generator) for t in range(LENGTH)], 1
    )
    place = torch.arange(LENGTH).expand_as(letters)
    target = (old[0][:, None] + old[1][None, :]).exp().flatten()
    words = letters[:, 0] * LETTERS + letters[:, 1]
    return words, old[place, letters].flatten(), rollout[place, letters].flatten(), target


def law_of(ratio: str, prompts: int = 400, samples: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(chain's occupation of the nine states, rollout's own frequencies, target), from many independent chains."""
    words, old, rollout, target = draw_words(prompts * samples)
    offsets = offsets_of(torch.full((prompts * samples,), LENGTH))
    chosen = metropolis(proposal(old, rollout, offsets, samples=samples), ratio)
    assert chosen.multiplicity_B.view(prompts, samples).sum(1).eq(samples).all()
    occupied = torch.zeros(9, dtype=torch.float64).index_add_(0, words, chosen.multiplicity_B.double())
    return occupied / occupied.sum(), torch.bincount(words, minlength=9) / len(words), target


def test_with_the_product_of_token_ratios_the_chain_has_the_targets_law() -> None:
    """χ² with the chain's own spread: repeated states make neighbouring draws depend on each other."""
    prompts, samples = 400, 400
    words, old, rollout, target = draw_words(prompts * samples)
    offsets = offsets_of(torch.full((prompts * samples,), LENGTH))
    multiplicity = metropolis(proposal(old, rollout, offsets, samples=samples), "trajectory").multiplicity_B
    counts = torch.zeros(prompts, 9, dtype=torch.float64)
    counts.view(-1).index_add_(0, torch.arange(prompts).repeat_interleave(samples) * 9 + words, multiplicity.double())
    shares = counts / samples
    error = shares.mean(0) - target
    covariance = torch.cov(shares.T) / prompts
    # The nine shares add up to 1, so eight of them tell all.
    statistic = error[:8] @ torch.linalg.solve(covariance[:8, :8], error[:8])
    assert statistic < CHI2_999[8]


def test_the_law_is_not_the_rollouts_and_the_heuristic_is_not_exact() -> None:
    exact, proposed, target = law_of("trajectory")
    heuristic, _, _ = law_of("mean")
    assert (exact - target).abs().sum() < 0.04
    assert (proposed - target).abs().sum() > 0.2
    assert (heuristic - target).abs().sum() > 0.1


def test_a_proposal_that_is_the_target_is_always_accepted() -> None:
    logp = torch.randn(40)
    chosen = metropolis(proposal(logp, logp.clone(), torch.arange(41), samples=8), "trajectory")
    assert chosen.multiplicity_B.tolist() == [1] * 40


@given(batch=ragged, samples=st.integers(1, 5))
def test_multiplicities_of_a_prompt_add_up_to_its_samples(batch: Ragged, samples: int) -> None:
    old = batch.tokens("old")
    proposed = proposal(old, old + batch.tokens("shift"), batch.offsets, samples=samples)
    chosen = metropolis(proposed, "trajectory")
    for group in proposed.group_B.unique():
        members = proposed.group_B == group
        assert chosen.multiplicity_B[members].sum() == members.sum()


def test_samples_that_are_no_numbers_are_never_a_state() -> None:
    log_x = torch.tensor([math.nan, 0.1, math.inf, 0.0, math.nan, math.nan])
    chosen = metropolis(proposal(log_x, torch.zeros(6), torch.arange(7), samples=2), "trajectory")
    accepted = chosen.multiplicity_B.tolist()
    assert accepted[0] == accepted[2] == accepted[4] == accepted[5] == 0
    assert accepted[1] in (1, 2)
    assert torch.isfinite(chosen.weights(torch.arange(7))).all()


def test_the_first_width_is_the_quantile_and_later_ones_move_towards_it() -> None:
    log_rho = torch.linspace(-0.008, 0.008, 101, dtype=torch.float64)
    first = half_width(None, log_rho, 0.5)
    assert first == pytest.approx(0.004, rel=0.05)
    assert half_width(first, log_rho * 0.5, 0.5) == pytest.approx(0.9 * first + 0.1 * first / 2, rel=0.02)


def test_the_width_has_limits_and_survives_what_is_not_finite() -> None:
    assert half_width(None, torch.full((5,), 9.0), 0.5) == WIDEST
    assert half_width(None, torch.zeros(5), 0.5) == NARROWEST
    assert half_width(None, torch.tensor([math.nan, math.inf, -math.inf, 0.0]), 0.9) == WIDEST
    assert half_width(0.005, torch.tensor([math.nan] * 3), 0.2) == pytest.approx(0.9 * 0.005 + 0.1 * WIDEST)


def test_the_controller_reaches_its_target_and_follows_its_schedule() -> None:
    generator = torch.Generator().manual_seed(0)
    filter_ = QuantileFilter((0.5, 2.0), (0.4, 0.2), target_steps=50)
    accepted = []
    for _ in range(120):
        log_x = torch.randn(400, generator=generator, dtype=torch.float64) * 0.004
        chosen = filter_(proposal(log_x, torch.zeros(400, dtype=torch.float64), torch.arange(401)))
        accepted.append(chosen.multiplicity_B.double().mean().item())
        assert chosen.window_B2 is not None
        width = filter_.widths[0]
        assert chosen.window_B2[0].tolist() == pytest.approx([math.exp(-width), math.exp(width)])
    assert accepted[0] == pytest.approx(0.4, abs=0.01)
    assert sum(accepted[-40:]) / 40 == pytest.approx(0.2, abs=0.02)


def test_a_restored_controller_goes_on_as_if_nothing_had_been() -> None:
    generator = torch.Generator().manual_seed(0)
    steps = [torch.randn(50, generator=generator, dtype=torch.float64) * 0.004 for _ in range(6)]
    straight, first, second = (QuantileFilter((0.5, 2.0), (0.4, 0.2), 4) for _ in range(3))
    widths = []
    for number, log_x in enumerate(steps):
        if number == 3:
            second.restore(first.state())
        part = first if number < 3 else second
        for filter_ in (straight, part):
            filter_(proposal(log_x, torch.zeros_like(log_x), torch.arange(51)))
        widths.append((straight.state(), part.state()))
    assert all(a == b for a, b in widths)


def test_a_controller_by_length_gives_each_bucket_its_own_window() -> None:
    """Short traces scatter more: one window would take the long ones only."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([4] * 100 + [100] * 100)
    log_x = torch.randn(int(lengths.sum()), generator=generator, dtype=torch.float64) * 0.01
    batch = proposal(log_x, torch.zeros_like(log_x), torch.nn.functional.pad(lengths.cumsum(0), (1, 0)))
    shares = {}
    for by_length in (False, True):
        accepted = QuantileFilter((0.5, 2.0), (0.5, 0.5), 1, by_length)(batch).multiplicity_B.double()
        shares[by_length] = (accepted[:100].mean().item(), accepted[100:].mean().item())
    assert shares[True] == (pytest.approx(0.5, abs=0.02), pytest.approx(0.5, abs=0.02))
    assert shares[False][1] - shares[False][0] > 0.5
