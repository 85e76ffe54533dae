"""GAE with truncation bootstrap against plain loops in float64; whitening over several ranks."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.advantage import gae, terminal_values, whiten
from support.ragged import Ragged, ragged


def oracle(
    values: list[list[float]], terminal: list[float], discounted: list[bool], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """The recursion Â_t = δ_t + γλ·Â_{t+1}, backwards."""
    advantages, targets = [], []
    for values_T, end, is_value in zip(values, terminal, discounted, strict=True):
        after = 0.0
        backwards = []
        for t in reversed(range(len(values_T))):
            if t == len(values_T) - 1:
                delta = (gamma if is_value else 1.0) * end - values_T[t]
            else:
                delta = gamma * values_T[t + 1] - values_T[t]
            after = delta + gamma * lam * after
            backwards.append(after)
        advantages += backwards[::-1]
        targets += [a + v for a, v in zip(backwards[::-1], values_T, strict=True)]
    return advantages, targets


@given(
    batch=ragged,
    gamma=st.sampled_from([1.0, 0.99, 0.5]),
    lam=st.sampled_from([1.0, 0.95, 0.0]),
)
def test_gae_is_the_backward_recursion(batch: Ragged, gamma: float, lam: float) -> None:
    values, terminal = batch.tokens("values"), batch.trajectories("terminal")
    discounted = batch.trajectories("discounted") > 0
    advantages, targets = gae(values, terminal, discounted, batch.offsets, gamma, lam)
    expected = oracle(batch.split(values), terminal.double().tolist(), discounted.tolist(), gamma, lam)
    assert advantages.tolist() == pytest.approx(expected[0], rel=1e-5, abs=1e-5)
    assert targets.tolist() == pytest.approx(expected[1], rel=1e-5, abs=1e-5)


@given(batch=ragged)
def test_with_gamma_and_lambda_1_the_advantage_is_the_return_minus_the_value(batch: Ragged) -> None:
    values, terminal = batch.tokens("values"), batch.trajectories("terminal")
    discounted = torch.zeros(len(terminal), dtype=torch.bool)
    advantages, targets = gae(values, terminal, discounted, batch.offsets, 1.0, 1.0)
    returns = torch.repeat_interleave(terminal, torch.tensor(batch.lengths))
    assert torch.allclose(targets, returns, atol=1e-5)
    assert torch.allclose(advantages, returns - values, atol=1e-5)


def test_a_long_trajectory_stays_exact() -> None:
    length, gamma, lam = 5000, 0.999, 0.95
    values = torch.randn(length, generator=torch.Generator().manual_seed(1))
    advantages, _ = gae(values, torch.tensor([1.0]), torch.tensor([False]), torch.tensor([0, length]), gamma, lam)
    expected, _ = oracle([values.double().tolist()], [1.0], [False], gamma, lam)
    assert advantages.tolist() == pytest.approx(expected, abs=1e-5)


def test_a_truncated_return_is_the_value_after_the_last_token() -> None:
    """A critic that answers with the position: s_T of a 3-token trajectory is 3, for every reward."""
    rewards, after = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 2.0])
    truncated = torch.tensor([True, False])
    returns = terminal_values(rewards, after, truncated, "bootstrap", (0.0, 10.0))
    assert returns.tolist() == [3.0, 1.0]
    offsets = torch.tensor([0, 3, 5])
    advantages, targets = gae(torch.tensor([0.0, 1, 2, 0, 1]), returns, truncated, offsets, 1.0, 1.0)
    assert targets.tolist() == [3.0, 3, 3, 1, 1]
    assert advantages.tolist() == [3.0, 2, 1, 1, 0]


def test_a_bootstrap_is_a_value_one_step_ahead_and_is_discounted() -> None:
    _, targets = gae(torch.zeros(2), torch.tensor([1.0]), torch.tensor([True]), torch.tensor([0, 2]), 0.5, 1.0)
    assert targets.tolist() == [0.25, 0.5]
    _, targets = gae(torch.zeros(2), torch.tensor([1.0]), torch.tensor([False]), torch.tensor([0, 2]), 0.5, 1.0)
    assert targets.tolist() == [0.5, 1.0]


@pytest.mark.parametrize(("truncation", "expected"), [("bootstrap", 1.0), ("zero", 0.0), ("mask", 0.25)])
def test_the_truncation_modes(truncation: str, expected: float) -> None:
    """Bootstraps are clipped to the reward's range; finished trajectories keep their reward under every mode."""
    returns = terminal_values(
        torch.tensor([0.25, 0.5]), torch.tensor([7.0, 7.0]), torch.tensor([True, False]), truncation, (0.0, 1.0)
    )
    assert returns.tolist() == [expected, 0.5]


@given(batch=ragged)
def test_whitening_has_mean_0_and_deviation_1_over_what_is_included(batch: Ragged) -> None:
    advantages = batch.tokens("advantages", 3.0)
    included = batch.tokens("included") > -1
    chosen = whiten(advantages, included, lambda x: x)[included].double()
    if len(chosen) > 1 and advantages[included].std() > 0.1:
        assert chosen.mean().abs() < 1e-5
        assert chosen.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_whitening_over_two_ranks_is_whitening_of_the_whole_step() -> None:
    advantages = torch.randn(50, generator=torch.Generator().manual_seed(0))
    included = torch.arange(50) % 7 > 0
    barrier = Barrier(2, timeout=10)
    slots: dict[int, Tensor] = {}

    def whiten_on(rank: int) -> Tensor:
        def reduce(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait()
            total = slots[0] + slots[1]
            barrier.wait()
            return total

        mine = slice(0, 13) if rank == 0 else slice(13, None)
        return whiten(advantages[mine], included[mine], reduce)

    with ThreadPoolExecutor(2) as executor:
        parts = list(executor.map(whiten_on, range(2)))
    assert torch.allclose(torch.cat(parts), whiten(advantages, included, lambda x: x), atol=1e-6)


def test_a_step_in_which_all_agree_is_not_blown_up() -> None:
    nearly_equal = torch.full((10,), 0.5) + torch.linspace(-1e-6, 1e-6, 10)
    assert whiten(nearly_equal, torch.ones(10, dtype=torch.bool), lambda x: x).abs().max() < 1e-3
    nothing = torch.zeros(10, dtype=torch.bool)
    assert torch.isfinite(whiten(nearly_equal, nothing, lambda x: x)).all()
