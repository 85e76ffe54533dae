"""What a step teaches, against plain loops in float64: returns, advantages, selection and weights put together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from statistics import stdev
from typing import Any

import pytest
import torch

from mispo.algorithm.controller import QuantileFilter
from mispo.algorithm.filter import (
    Filter,
    FixedFilter,
    Proposal,
    bounds_filter,
    keep_all,
    metropolis,
    random_reject,
    token_only,
)
from mispo.algorithm.loss import icepop, mispo_loss, no_correction, truncated_importance
from mispo.algorithm.method import Method, Outcome, with_critic, within_group
from mispo.algorithm.objective import Objective
from support.batches import method_of
from support.ragged import Ragged, proposal

TOKEN, TRAJECTORY, CAP, ICEPOP = (0.8, 1.25), (0.96, 1.04), 1.1, (0.9, 1.15)
RANGE = (0.0, 1.0)
STEP = Ragged([5, 1, 7, 3, 4, 2, 6, 3], seed=4)
"""Four prompts with two samples each."""


def outcome_of(batch: Ragged, *, critic: bool = True) -> Outcome:
    """Odd trajectories are truncated, the fourth and the last one are left out; some bootstraps are out of range."""
    count = len(batch.lengths)
    return Outcome(
        rewards_B=batch.trajectories("rewards").abs(),
        penalties_B=-batch.trajectories("penalties").abs() / 4,
        truncated_B=torch.arange(count) % 2 == 1,
        included_B=torch.arange(count) % 4 != 3,
        values_N=batch.tokens("values") if critic else None,
        bootstrap_B=batch.trajectories("bootstrap") * 2 if critic else None,
        reference_N=batch.tokens("reference"),
        reduce=lambda x: x,
    )


def proposal_of(batch: Ragged, scale: float = 0.1) -> Proposal:
    old = batch.tokens("old") - 3
    return proposal(old, old + batch.tokens("shift", scale), batch.offsets, samples=2, seed=5)


def method(**changed: Any) -> Method:
    return replace(method_of(Objective(mispo_loss, "tokens", 30, 0.0, 0.0)), **changed)


def ends(outcome: Outcome, truncation: str, gamma: float) -> list[float]:
    """The last term of each trajectory's return, discounted where it is a value one step ahead."""
    found = []
    for b, reward in enumerate(outcome.rewards_B.tolist()):
        end, discount = reward, 1.0
        if outcome.truncated_B[b] and truncation == "bootstrap":
            assert outcome.bootstrap_B is not None
            end, discount = min(max(outcome.bootstrap_B[b].item(), RANGE[0]), RANGE[1]), gamma
        elif outcome.truncated_B[b] and truncation == "zero":
            end = 0.0
        found.append(discount * (end + outcome.penalties_B[b].item()))
    return found


def backwards(values: list[float], end: float, gamma: float, lam: float) -> list[float]:
    """Â_t = δ_t + γλ·Â_{t+1}."""
    found, after, following = [], 0.0, end
    for value in reversed(values):
        after = following - value + gamma * lam * after
        following = gamma * value
        found.append(after)
    return found[::-1]


def spread(batch: Ragged, per_trajectory: list[Any]) -> list[Any]:
    return [x for x, n in zip(per_trajectory, batch.lengths, strict=True) for _ in range(n)]


@pytest.mark.parametrize("truncation", ["bootstrap", "zero", "mask"])
@pytest.mark.parametrize(("gamma", "lam", "critic_lam"), [(1.0, 1.0, 1.0), (0.9, 0.8, 0.8), (0.9, 0.8, 0.5)])
def test_with_a_critic(truncation: str, gamma: float, lam: float, critic_lam: float) -> None:
    outcome = outcome_of(STEP)
    advantage = with_critic(gamma, lam, critic_lam, truncation == "bootstrap")
    targets = method(advantage=advantage, truncation=truncation).targets(proposal_of(STEP), outcome)
    assert outcome.values_N is not None
    assert targets.values is not None
    values = STEP.split(outcome.values_N)
    pairs = list(zip(values, ends(outcome, truncation, gamma), strict=True))
    advantages = [a for v, end in pairs for a in backwards(v, end, gamma, lam)]
    returns = [a + x for v, end in pairs for a, x in zip(backwards(v, end, gamma, critic_lam), v, strict=True)]
    included = spread(STEP, outcome.included_B.tolist())
    assert targets.samples.advantages.tolist() == pytest.approx(advantages, rel=1e-5, abs=1e-5)
    assert targets.values.targets.tolist() == pytest.approx(returns, rel=1e-5, abs=1e-5)
    assert targets.values.old is outcome.values_N
    assert targets.values.included.tolist() == targets.samples.included.tolist() == included
    assert targets.samples.reference is outcome.reference_N


def test_a_critic_that_does_not_learn_from_truncated_trajectories() -> None:
    outcome = outcome_of(STEP)
    targets = method(advantage=with_critic(1.0, 1.0, 1.0, True), learns_truncated=False).targets(
        proposal_of(STEP), outcome
    )
    assert targets.values is not None
    learnt = [b in (0, 2, 4, 6) for b in range(8)]
    assert targets.values.included.tolist() == spread(STEP, learnt)
    assert targets.samples.included.tolist() == spread(STEP, outcome.included_B.tolist())


@pytest.mark.parametrize("baseline", ["group_std", "group_mean", "rloo"])
@pytest.mark.parametrize("truncation", ["zero", "mask"])
def test_within_a_group(baseline: str, truncation: str) -> None:
    """Of prompts with a sample that is left out, one sample is left: it has nothing to be compared with."""
    outcome = replace(outcome_of(STEP, critic=False), included_B=torch.arange(8) != 3)
    targets = method(advantage=within_group(baseline), truncation=truncation).targets(proposal_of(STEP), outcome)
    terminal, expected = ends(outcome, truncation, 1.0), [0.0] * 8
    for pair in ((0, 1), (4, 5), (6, 7)):
        returns = [terminal[b] for b in pair]
        for b, other in zip(pair, reversed(pair), strict=True):
            centred = terminal[b] - sum(returns) / 2
            expected[b] = {
                "group_std": centred / stdev(returns),
                "group_mean": centred,
                "rloo": terminal[b] - terminal[other],
            }[baseline]
    assert targets.values is None
    assert targets.samples.advantages.tolist() == pytest.approx(spread(STEP, expected), rel=1e-5, abs=1e-6)


def test_whitening_takes_the_tokens_that_are_included() -> None:
    outcome, advantage = outcome_of(STEP), with_critic(0.9, 0.8, 0.8, True)
    plain = method(advantage=advantage).targets(proposal_of(STEP), outcome).samples.advantages.double().tolist()
    included = [a for a, i in zip(plain, spread(STEP, outcome.included_B.tolist()), strict=True) if i]
    mean = sum(included) / len(included)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in included) / len(included))
    white = method(advantage=advantage, whitens=True).targets(proposal_of(STEP), outcome).samples.advantages
    assert white.tolist() == pytest.approx([(a - mean) / deviation for a in plain], rel=1e-4, abs=1e-5)


@dataclass(frozen=True)
class Choice:
    """A function of mispo/algorithm, and what it does to one ratio, as a loop has it."""

    made: Any
    plain: Callable[..., float]


FILTERS = {
    "none": Choice(FixedFilter(keep_all), lambda x, rho: 1.0),
    "token_only": Choice(
        FixedFilter(partial(token_only, token_bounds=TOKEN)), lambda x, rho: float(TOKEN[0] <= x <= TOKEN[1])
    ),
    "bounds": Choice(
        FixedFilter(partial(bounds_filter, token_bounds=TOKEN, trajectory_bounds=TRAJECTORY)),
        lambda x, rho: float(TOKEN[0] <= x <= TOKEN[1] and TRAJECTORY[0] <= rho <= TRAJECTORY[1]),
    ),
}
CORRECTIONS = {
    "none": Choice(no_correction, lambda x: 1.0),
    "tis": Choice(partial(truncated_importance, cap=CAP), lambda x: min(x, CAP)),
    "icepop": Choice(partial(icepop, bounds=ICEPOP), lambda x: x if ICEPOP[0] <= x <= ICEPOP[1] else 0.0),
}


def expected_weights(
    batch: Ragged, made: Proposal, included: list[bool], kept: Choice, corrected: Choice
) -> list[float]:
    """Token by token; the trajectory's ratio is the geometric mean of its tokens'."""
    weights = []
    pairs = zip(batch.split(made.old_logprobs_N), batch.split(made.rollout_logprobs_N), included, strict=True)
    for old_T, rollout_T, counts in pairs:
        ratios = [math.exp(a - b) for a, b in zip(old_T, rollout_T, strict=True)]
        rho = math.exp(sum(a - b for a, b in zip(old_T, rollout_T, strict=True)) / len(ratios))
        weights += [kept.plain(x, rho) * corrected.plain(x) * counts for x in ratios]
    return weights


@pytest.mark.parametrize(("kept", "corrected"), list(product(FILTERS, CORRECTIONS)))
def test_every_filter_with_every_correction(kept: str, corrected: str) -> None:
    made, outcome = proposal_of(STEP), outcome_of(STEP, critic=False)
    chosen, weighted = FILTERS[kept], CORRECTIONS[corrected]
    targets = method(filter=chosen.made, correct=weighted.made).targets(made, outcome)
    expected = expected_weights(STEP, made, outcome.included_B.tolist(), chosen, weighted)
    assert targets.samples.weights.tolist() == pytest.approx(expected, rel=1e-5)
    assert len({round(weight, 6) for weight in expected}) > 1
    shown = expected_weights(STEP, made, [True] * 8, FILTERS["none"], weighted)
    weighted_in = torch.tensor(shown) > 0
    assert not (targets.selection.keep_N & ~weighted_in).any(), "a token without a weight is shown as kept"


@pytest.mark.parametrize("corrected", CORRECTIONS)
def test_a_ratio_that_is_infinite_has_no_weight(corrected: str) -> None:
    """Behind the filter only: a correction alone would have to weigh it."""
    made = proposal_of(STEP)
    rollout = made.rollout_logprobs_N.clone()
    rollout[0], rollout[2] = -math.inf, math.nan
    made = replace(made, rollout_logprobs_N=rollout)
    chosen = method(filter=FILTERS["token_only"].made, correct=CORRECTIONS[corrected].made)
    weights = chosen.targets(made, outcome_of(STEP, critic=False)).samples.weights
    assert weights.isfinite().all()
    assert weights[[0, 2]].tolist() == [0.0, 0.0]


def test_the_multiplicity_of_a_chain_multiplies_the_correction() -> None:
    made, everything = proposal_of(STEP), replace(outcome_of(STEP), included_B=torch.ones(8, dtype=torch.bool))
    chain = FixedFilter(partial(metropolis, ratio="trajectory"))
    targets = method(filter=chain, correct=CORRECTIONS["tis"].made, advantage=within_group("rloo")).targets(
        made, everything
    )
    counts = targets.selection.multiplicity_B.tolist()
    assert sum(counts) == 8
    assert set(counts) == {0, 1, 2}
    tis = expected_weights(STEP, made, [True] * 8, FILTERS["none"], CORRECTIONS["tis"])
    expected = [count * weight for count, weight in zip(spread(STEP, counts), tis, strict=True)]
    assert targets.samples.weights.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_pretraining_has_the_discounted_rewards_of_what_was_finished(gamma: float) -> None:
    """Without the penalties: the critic is to know the reward."""
    outcome = outcome_of(STEP)
    values = method(gamma=gamma).pretraining(STEP.offsets, outcome)
    expected = [
        reward * gamma ** (n - 1 - t)
        for reward, n in zip(outcome.rewards_B.tolist(), STEP.lengths, strict=True)
        for t in range(n)
    ]
    assert values.targets.tolist() == pytest.approx(expected, rel=1e-5)
    assert values.included.tolist() == spread(STEP, [b in (0, 2, 4, 6) for b in range(8)])
    assert values.old is outcome.values_N


WITHOUT_MEMORY = {
    **{name: choice.made for name, choice in FILTERS.items()},
    "metropolis": FixedFilter(partial(metropolis, ratio="mean")),
    "random": FixedFilter(partial(random_reject, token_bounds=TOKEN, trajectory_bounds=TRAJECTORY)),
}


def tensors_of(*records: Any) -> list[torch.Tensor]:
    values = [getattr(record, declared.name) for record in records for declared in fields(record)]
    return [value for value in values if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize("name", WITHOUT_MEMORY)
def test_the_same_step_twice_gives_the_same_targets_and_is_left_as_it_was(name: str) -> None:
    made, outcome = proposal_of(STEP), outcome_of(STEP)
    before = [x.clone() for x in tensors_of(made, outcome)]
    chosen = method(filter=WITHOUT_MEMORY[name], advantage=with_critic(0.9, 0.8, 0.8, True), whitens=True)
    found = []
    for _ in range(2):
        targets = chosen.targets(made, outcome)
        found.append(tensors_of(targets.samples, targets.values, targets.selection, targets))
    assert len(found[0]) >= 11
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors_of(made, outcome), strict=True))


def test_a_filter_with_a_memory_moves_on_and_is_restored() -> None:
    def fresh() -> Filter:
        return QuantileFilter(TOKEN, (0.9, 0.3), 2)

    straight, first = fresh(), fresh()
    made, outcome = proposal_of(STEP, scale=0.01), outcome_of(STEP, critic=False)
    windows = [method(filter=straight).targets(made, outcome).selection.window_B2 for _ in range(2)]
    assert windows[0] is not None
    assert windows[1] is not None
    assert not torch.equal(windows[0], windows[1])
    method(filter=first).targets(made, outcome)
    second = fresh()
    second.restore(first.state())
    again = method(filter=second).targets(made, outcome).selection.window_B2
    assert again is not None
    assert torch.equal(again, windows[1])
