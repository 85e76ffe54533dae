"""The row of a training step, each number computed by hand; and two ranks give the row of one."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import pvariance

import pytest
import torch
from torch import Tensor

from mispo.algorithm.filter import Selection
from mispo.algorithm.method import Targets, ValueTargets
from mispo.algorithm.objective import Samples
from mispo.metrics.record import LowConfidence, StepRecord
from mispo.metrics.step import About, rollout_experts, step_metrics
from mispo.trainer.batch import Batch, Packing, pack
from mispo.trainer.engine import Update
from mispo.trainer.learner import Updates
from mispo.trainer.ranks import Ranks
from mispo.trainer.scoring import PolicyScores, Scores, Values
from model.moe.routers import Routing
from rollouts.trajectory import FinishReason, Trajectory
from support.threads import on_ranks
from support.trajectories import made_trajectory

ALONE = Ranks(0, 1, torch.device("cpu"))
ABOUT = About(num_experts=0, reward_range=(-1.0, 1.0))
PACKING = Packing("bootstrap", prompts_per_step=2, samples_per_prompt=2, penalty=lambda n: -0.5 if n > 3 else 0.0)
VERSION = 10


@dataclass(frozen=True)
class Made:
    """A trajectory and what was scored: entropy and V of each of its scored tokens, V(s_T), its critic targets."""

    length: int
    reward: float
    parts: dict[str, float]
    reason: FinishReason
    version: int
    outcome: str
    entropy: list[float]
    values: list[float]
    bootstrap: float
    targets: list[float]


STEP = [
    Made(2, 1.0, {"task": 1.0, "form": 1.0}, "stop", 9, "ok", [0.1, 0.3], [0.5, 0.7], 0.3, [0.9, 1.0]),
    Made(
        4,
        0.0,
        {"task": 0.0, "form": 1.0},
        "length",
        9,
        "ok",
        [0.2, 0.4, 0.6, 0.8],
        [0.6, 0.8, 0.9, 0.9],
        0.9,
        [0.9] * 4,
    ),
    Made(1, 1.0, {"task": 1.0, "form": 0.0}, "stop", 7, "timeout", [1.0], [0.8], 0.6, [1.0]),
    Made(3, 0.25, {"task": 0.25, "form": 0.0}, "loop", 8, "ok", [0.5, 0.7], [0.2, 0.4], 0.1, [0.3, 0.25]),
]
"""Two prompts with two samples each. The last one has a token that no engine wrote."""

TOKENS = 9
"""Scored tokens of STEP."""

REJECTED = 2
"""The trajectory that the filter rejects."""

UPDATES = Updates(
    actor=[
        Update(0.5, 2.0, 1e-3, True, {"tokens": 4, "clipped": 1, "kl_old": 0.2, "kl_ref": 0.4, "draft_nll": 8.0}),
        None,
        Update(9.0, 9.0, 2e-3, False, {"tokens": 2, "clipped": 2, "kl_old": 0.1, "kl_ref": 0.2, "draft_nll": 1.0}),
        Update(1.5, 4.0, 3e-3, True, {"tokens": 2, "clipped": 0, "kl_old": 0.1, "kl_ref": 0.0, "draft_nll": 3.0}),
    ],
    critic=[Update(0.2, 1.0, 4e-3, True), Update(7.0, 7.0, 5e-3, False), Update(0.4, 2.0, 6e-3, True)],
)


def trajectory(number: int, made: Made) -> Trajectory:
    written = torch.arange(made.length) < len(made.entropy)
    return made_trajectory(
        number,
        length=made.length,
        action_mask=written,
        finish_reason=made.reason,
        weight_version=made.version,
        reward=made.reward,
        reward_info={"outcome": made.outcome},
        reward_parts=made.parts,
    )


def batch_of(members: list[int], ranks: Ranks) -> Batch:
    trajectories = [trajectory(b, STEP[b]) for b in members]
    positions = torch.tensor(members, dtype=torch.int64)
    return pack(trajectories, positions, PACKING, step=1, version=VERSION, ranks=ranks)


def flat(members: list[int], name: str) -> Tensor:
    return torch.tensor([x for b in members for x in getattr(STEP[b], name)], dtype=torch.float32)


def record_of(members: list[int], ranks: Ranks = ALONE, *, critic: bool = True) -> StepRecord:
    """A step in which the trainer finds every token 1 % less likely than the rollout did, and one trajectory is
    rejected."""
    batch = batch_of(members, ranks)
    tokens = len(batch.rollout_logprobs_N)
    everything = torch.ones(tokens, dtype=torch.bool)
    log_x_N = torch.full((tokens,), math.log(0.99), dtype=torch.float64)
    old_N, values_N, returns_N = batch.rollout_logprobs_N + log_x_N, flat(members, "values"), flat(members, "targets")
    bootstrap_B = torch.tensor([STEP[b].bootstrap for b in members])
    values = Values(values_N, bootstrap_B) if critic else None
    accepted_B = torch.tensor([int(b != REJECTED) for b in members])
    targets = Targets(
        samples=Samples(old_N, torch.zeros(tokens), torch.ones(tokens), everything),
        values=ValueTargets(values_N, returns_N, everything) if critic else None,
        selection=Selection(everything, accepted_B, torch.full((len(members),), math.log(0.99), dtype=torch.float64)),
        log_x_N=log_x_N,
    )
    scores = Scores(PolicyScores(old_N, flat(members, "entropy"), None), values, None)
    return StepRecord(batch, scores, targets, None)


def row_of() -> dict[str, float]:
    return step_metrics(record_of([0, 1, 2, 3]), UPDATES, ABOUT)


def test_how_the_step_ended() -> None:
    expected = {
        "reward/mean": (1 + 0 + 1 + 0.25) / 4,
        "reward/failed": 1 / 4,
        "reward/overlong_penalty": -0.5 / 4,
        "reward/finished_mean": (1 + 1 + 0.25) / 3,
        "reward/task": (1 + 0 + 1 + 0.25) / 4,
        "reward/form": (1 + 1 + 0 + 0) / 4,
        "response_length/mean": (2 + 4 + 1 + 3) / 4,
        "response_length/max": 4.0,
        "response_length/clip_ratio": 1 / 4,
        "trunc/rate": 1 / 4,
        "rollout/lag": VERSION - 7,
        "actor/entropy": (0.1 + 0.3 + 0.2 + 0.4 + 0.6 + 0.8 + 1.0 + 0.5 + 0.7) / TOKENS,
    }
    row = row_of()
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_what_the_filter_kept() -> None:
    """The rejected trajectory is one of the two that are better than the mean; lengths count all of their tokens."""
    rollout = sum(0.1 * t for made in STEP for t in range(1, len(made.entropy) + 1))
    expected = {
        "mismatch/k1": -math.log(0.99),
        "mismatch/ppl_rollout": math.exp(rollout / TOKENS),
        "mismatch/ppl_old": math.exp(rollout / TOKENS) / 0.99,
        "mis/token_accept": 1.0,
        "mis/traj_accept": 3 / 4,
        "mis/accept_pos": 1 / 2,
        "mis/accept_neg": 1.0,
        "mis/accept_len/0": 3 / 4,
        "mis/accept_lag/1": 1.0,
        "mis/accept_lag/2": 1.0,
        "mis/accept_lag/3": 0.0,
    }
    row = row_of()
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_what_the_critic_knew() -> None:
    values, targets = [x for made in STEP for x in made.values], [x for made in STEP for x in made.targets]
    errors = [target - value for target, value in zip(targets, values, strict=True)]
    expected = {
        "critic/vf_explained_var": 1 - pvariance(errors) / pvariance(targets),
        "critic/value_mean": sum(values) / TOKENS,
        "critic/value_pos": ((0.5 + 0.7) / 2 + 0.8) / 2,  # of those whose reward is above the mean of 0.5625
        "critic/value_neg": ((0.6 + 0.8 + 0.9 + 0.9) / 4 + (0.2 + 0.4) / 2) / 2,
        "trunc/bootstrap_mean": 0.9,
        "trunc/bootstrap_gap": (0.9 - 0.75) / 2,
        "critic/loss": (0.2 + 0.4) / 2,
        "critic/grad_norm": (1 + 2) / 2,
        "critic/lr": 6e-3,
        "critic/updates": 2.0,
        "critic/skipped": 1.0,
    }
    row = row_of()
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert 0 < row["critic/vf_explained_var"] < 1


def test_what_the_updates_did() -> None:
    """Losses are means over the applied updates; what moved is a mean over tokens, those of a skipped update too."""
    expected = {
        "actor/loss": (0.5 + 1.5) / 2,
        "actor/grad_norm": (2 + 4) / 2,
        "actor/lr": 3e-3,
        "actor/updates": 2.0,
        "actor/skipped": 1.0,
        "actor/clip_frac": (1 + 2 + 0) / 8,
        "actor/kl_old": (0.2 + 0.1 + 0.1) / 8,
        "actor/kl_ref": (0.4 + 0.2 + 0.0) / 8,
        "actor/draft_loss": (8 + 1 + 3) / 8,
        "mis/empty_minibatches": 1.0,
    }
    row = row_of()
    assert {name: row[name] for name in expected} == pytest.approx(expected)


def test_what_a_run_does_not_have_is_not_in_its_rows() -> None:
    """No critic, no truncated trajectory, no update: their names are missing, they are not 0."""
    made = record_of([0, 1, 2, 3], critic=False)
    row = step_metrics(made, Updates([None, None], []), ABOUT)
    assert [name for name in row if name.startswith(("critic/", "trunc/bootstrap", "moe/"))] == []
    assert row["mis/empty_minibatches"] == 2.0
    assert {name for name in row if name.startswith("actor/")} == {"actor/entropy", "actor/updates", "actor/skipped"}
    cut = replace(made.batch, truncated_B=torch.ones(4, dtype=torch.bool))
    row = step_metrics(replace(made, batch=cut), Updates([], []), ABOUT)
    assert row["trunc/rate"] == 1.0
    assert "reward/finished_mean" not in row


def test_no_trajectory_is_better_than_the_mean_where_all_rewards_agree() -> None:
    made = record_of([0, 1, 2, 3])
    row = step_metrics(replace(made, batch=replace(made.batch, rewards_B=torch.ones(4))), UPDATES, ABOUT)
    assert "critic/value_pos" not in row
    means = [0.6, 0.8, 0.8, 0.3]
    assert row["critic/value_neg"] == pytest.approx(sum(means) / 4)


def test_the_explained_variance_of_equal_targets_is_no_number() -> None:
    made = record_of([0, 1, 2, 3])
    assert made.targets.values is not None
    same = replace(made.targets, values=replace(made.targets.values, targets=torch.full((TOKENS,), 0.5)))
    row = step_metrics(replace(made, targets=same), UPDATES, ABOUT)
    assert math.isnan(row["critic/vf_explained_var"])


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[2, 3], [0, 1]], [[0, 1, 2, 3], []]])
def test_two_ranks_give_the_row_of_one(shares: list[list[int]]) -> None:
    """With any share of the prompts, and with none on one rank."""
    for row in on_ranks(2, lambda ranks: step_metrics(record_of(shares[ranks.rank], ranks), UPDATES, ABOUT)):
        assert row == pytest.approx(row_of())


def routing(confidence: list[float]) -> Routing:
    tokens = len(confidence)
    return Routing(
        confidence=torch.tensor([confidence]),
        experts=torch.zeros((1, tokens, 1), dtype=torch.int64),
        own=torch.zeros((1, tokens, 1), dtype=torch.int64),
        margin=torch.zeros((1, tokens)),
    )


def test_what_the_rollout_activated_is_read_where_a_scored_token_was_decided() -> None:
    """Behind prompt [5, 6]: token t of the completion was decided at position 1 + t."""
    positions = [torch.arange(b * 10, b * 10 + 2 + STEP[b].length - 1).reshape(-1, 1, 1) for b in (0, 3)]
    trajectories = [replace(trajectory(b, STEP[b]), routed_experts=p) for b, p in zip((0, 3), positions, strict=True)]
    found_LNk = rollout_experts(trajectories, routing([0.5] * 4))
    assert found_LNk.shape == (1, 4, 1)
    assert found_LNk.flatten().tolist() == [1, 2, 31, 32]


def test_low_confidence_is_fitted_once_and_survives_a_resume() -> None:
    first, later = routing([0.1 * t for t in range(1, 10)]), routing([0.9] * 9)
    remembers = LowConfidence()
    assert remembers.fit(None, ALONE.sum) is None
    low_L = remembers.fit(first, ALONE.sum)
    assert low_L is not None
    assert 0.05 < low_L.item() <= 0.2
    assert remembers.fit(later, ALONE.sum) is low_L
    resumed = LowConfidence()
    resumed.restore(remembers.state())
    assert resumed.fit(later, ALONE.sum).tolist() == low_L.tolist()
