"""The filter against plain loops in float64, at its edges, and with ratios that are no numbers."""

import math
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.filter import Proposal, bounds_filter, keep_all, random_reject, token_only
from mispo.algorithm.segments import offsets_of
from mispo.config.algorithm_parts import Bounds
from support.ragged import Ragged, proposal, ragged

TOKEN, TRAJECTORY = (0.5, 2.0), (0.996, 1.001)


def oracle(
    old: list[list[float]], rollout: list[list[float]], token: tuple[float, float], trajectory: tuple[float, float]
) -> tuple[list[bool], list[int], list[float]]:
    """The report's two indicator functions, token by token."""
    keep, accepted, log_rho = [], [], []
    for old_T, rollout_T in zip(old, rollout, strict=True):
        total = 0.0
        for a, b in zip(old_T, rollout_T, strict=True):
            total += a - b
            keep.append(token[0] <= math.exp(a - b) <= token[1])
        mean = total / len(old_T) if old_T else 0.0
        accepted.append(int(trajectory[0] <= math.exp(mean) <= trajectory[1]))
        log_rho.append(mean)
    return keep, accepted, log_rho


@given(batch=ragged, scale=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_filter_is_the_two_indicator_functions(batch: Ragged, scale: float) -> None:
    old = batch.tokens("old") - 3
    rollout = old + batch.tokens("shift", scale)
    chosen = bounds_filter(proposal(old, rollout, batch.offsets), TOKEN, TRAJECTORY)
    keep, accepted, log_rho = oracle(batch.split(old), batch.split(rollout), TOKEN, TRAJECTORY)
    assert chosen.keep_N.tolist() == keep
    assert chosen.multiplicity_B.tolist() == accepted
    assert chosen.log_rho_B.tolist() == pytest.approx(log_rho, abs=1e-12)
    weights = [float(k * m) for k, m in zip(keep, spread(accepted, batch.lengths), strict=True)]
    assert chosen.weights(batch.offsets).tolist() == weights


def spread(per_trajectory: list[int], lengths: list[int]) -> list[int]:
    return list(chain.from_iterable([x] * n for x, n in zip(per_trajectory, lengths, strict=True)))


def select(log_x: list[float], lengths: list[int]) -> tuple[list[bool], list[int]]:
    log_x_N = torch.tensor(log_x, dtype=torch.float64)
    proposed = proposal(log_x_N, torch.zeros_like(log_x_N), offsets_of(torch.tensor(lengths)))
    chosen = bounds_filter(proposed, TOKEN, TRAJECTORY)
    return chosen.keep_N.tolist(), chosen.multiplicity_B.tolist()


def test_the_papers_constants_are_the_defaults() -> None:
    assert Bounds().name == "bounds"
    assert tuple(Bounds().token_bounds) == TOKEN
    assert tuple(Bounds().trajectory_bounds) == TRAJECTORY


def test_both_ends_belong_to_the_window() -> None:
    below, above = math.log(0.5), math.log(2.0)
    keep, _ = select([below, above, math.nextafter(below, -9), math.nextafter(above, 9)], [4])
    assert keep == [True, True, False, False]
    low, high = math.log(0.996), math.log(1.001)
    _, accepted = select([low, high, math.nextafter(low, -9), math.nextafter(high, 9)], [1, 1, 1, 1])
    assert accepted == [1, 1, 0, 0]


def test_the_window_is_lopsided() -> None:
    """A trajectory that the trainer finds 0.3 % less likely per token stays, one 0.3 % more likely goes."""
    assert select([-0.003] * 5 + [0.003] * 5, [5, 5])[1] == [1, 0]


def test_the_trajectory_ratio_counts_tokens_that_the_token_test_rejects() -> None:
    keep, accepted = select([1.0, -1.0], [2])
    assert keep == [False, False]
    assert accepted == [1]


def test_ratios_that_are_no_numbers_are_rejected_and_infect_nothing() -> None:
    keep, accepted = select([math.nan, 0.0, math.inf, 0.0, -math.inf, 0.0, 0.0], [2, 2, 2, 1])
    assert keep == [False, True, False, True, False, True, True]
    assert accepted == [0, 0, 0, 1]


def test_a_token_impossible_under_both_policies_is_rejected() -> None:
    infinite = torch.tensor([-math.inf, -1.0])
    chosen = bounds_filter(proposal(infinite, infinite.clone(), torch.tensor([0, 1, 2])), TOKEN, TRAJECTORY)
    assert chosen.multiplicity_B.tolist() == [0, 1]
    assert chosen.weights(torch.tensor([0, 1, 2])).tolist() == [0.0, 1.0]


def test_empty_trajectories_and_batches() -> None:
    assert select([0.0], [0, 1, 0]) == ([True], [1, 1, 1])
    empty = torch.empty(0)
    nothing = proposal(empty, empty, torch.zeros(1, dtype=torch.int64))
    assert len(bounds_filter(nothing, TOKEN, TRAJECTORY).multiplicity_B) == 0


@given(batch=ragged)
def test_no_filter_keeps_everything(batch: Ragged) -> None:
    old: Tensor = batch.tokens("old")
    chosen = keep_all(proposal(old, batch.tokens("rollout", 5.0), batch.offsets))
    assert chosen.weights(batch.offsets).tolist() == [1.0] * sum(batch.lengths)


ACCEPTANCE = {
    1e-5: {64: 0.97, 256: 1.0, 1024: 1.0},
    1e-4: {64: 0.72, 256: 0.89, 1024: 0.99},
    1e-3: {64: 0.34, 256: 0.62, 1024: 0.91},
    4e-3: {64: 0.17, 256: 0.32, 1024: 0.46},
    1e-2: {64: 0.10, 256: 0.14, 1024: 0.08},
}
"""Share that the paper's window accepts, by KL per token and length, if log-ratios are Gaussian and independent."""


@pytest.mark.parametrize("kl", ACCEPTANCE)
def test_the_acceptance_of_gaussian_log_ratios_follows_its_closed_form(kl: float) -> None:
    """A Gaussian log x of a pair of policies with KL κ is N(−κ, 2κ), so log ρ̄ is N(−κ, 2κ/T)."""
    generator = torch.Generator().manual_seed(0)
    count = 2000
    for length, tabled in ACCEPTANCE[kl].items():
        log_x = torch.randn(count * length, generator=generator, dtype=torch.float64) * math.sqrt(2 * kl) - kl
        offsets = offsets_of(torch.full((count,), length))
        accepted = bounds_filter(proposal(log_x, torch.zeros_like(log_x), offsets), TOKEN, TRAJECTORY).multiplicity_B
        low, high = ((math.log(bound) + kl) / math.sqrt(4 * kl / length) for bound in TRAJECTORY)
        expected = (math.erf(high) - math.erf(low)) / 2
        assert expected == pytest.approx(tabled, abs=0.006)
        error = math.sqrt(expected * (1 - expected) / count)
        assert abs(accepted.double().mean().item() - expected) < 4 * error + 1e-9


@given(batch=ragged, seed=st.integers(0, 1000))
def test_random_reject_accepts_as_many_as_the_window_whatever_they_are(batch: Ragged, seed: int) -> None:
    old = batch.tokens("old")
    proposed = proposal(old, old + batch.tokens("shift", 0.004), batch.offsets, seed=seed)
    window = bounds_filter(proposed, TOKEN, TRAJECTORY)
    chosen = random_reject(proposed, TOKEN, TRAJECTORY)
    assert chosen.multiplicity_B.sum() == window.multiplicity_B.sum()
    assert torch.equal(chosen.keep_N, window.keep_N)
    assert torch.equal(chosen.multiplicity_B, random_reject(proposed, TOKEN, TRAJECTORY).multiplicity_B)


def test_random_reject_does_not_look_at_the_ratios() -> None:
    """Half of the trajectories lie in the window; the others are chosen as often."""
    log_x = torch.cat([torch.zeros(50), torch.full((50,), 0.1)])
    counts = torch.zeros(100)
    for seed in range(200):
        counts += random_reject(
            proposal(log_x, torch.zeros(100), torch.arange(101), seed=seed), TOKEN, TRAJECTORY
        ).multiplicity_B
    assert counts.sum() == 200 * 50
    assert abs(counts[:50].mean() - counts[50:].mean()) < 4


def test_two_ranks_choose_at_random_what_one_would() -> None:
    generator = torch.Generator().manual_seed(0)
    log_x = torch.randn(12, generator=generator, dtype=torch.float64) * 0.003
    whole = random_reject(proposal(log_x, torch.zeros(12), torch.arange(13), seed=5), TOKEN, TRAJECTORY)
    parts = []
    for share in (slice(0, 4), slice(4, 12)):
        count = share.stop - share.start
        mine = Proposal(
            log_x[share],
            torch.zeros(count),
            torch.arange(count + 1),
            torch.arange(share.start, share.stop),
            torch.arange(share.start, share.stop),
            5,
            lambda x_B: log_x,  # what a gather over both ranks returns
        )
        parts.append(random_reject(mine, TOKEN, TRAJECTORY).multiplicity_B)
    assert torch.equal(torch.cat(parts), whole.multiplicity_B)


def test_token_only_keeps_every_trajectory() -> None:
    log_x = torch.tensor([0.5, 1.0, -1.0])
    chosen = token_only(proposal(log_x, torch.zeros(3), torch.tensor([0, 2, 3])), TOKEN)
    assert chosen.keep_N.tolist() == [True, False, False]
    assert chosen.multiplicity_B.tolist() == [1, 1]
