"""Acceptance and mismatch metrics on batches that can be counted by hand; and the room's purity."""

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mispo.algorithm
from mispo.algorithm.filter import bounds_filter, keep_all
from mispo.metrics.mismatch import acceptance_metrics, mismatch_metrics, mismatch_sums, ratio_histogram
from support.ragged import proposal

BOUNDS = (0.996, 1.001)


def test_acceptance_is_split_by_side_reward_and_length() -> None:
    log_x = torch.cat([torch.full((20,), -0.1), torch.full((20,), 0.1), torch.zeros(4), torch.zeros(100)])
    lengths = torch.tensor([20, 20, 4, 100])
    offsets = torch.tensor([0, 20, 40, 44, 144])
    chosen = bounds_filter(proposal(log_x, torch.zeros(144), offsets), (0.5, 2.0), BOUNDS)
    metrics = acceptance_metrics(chosen, lengths, torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 2, 2]))
    assert metrics["mis/traj_accept"] == 0.5
    assert metrics["mis/accept_lag/0"] == 0.0
    assert metrics["mis/accept_lag/2"] == 1.0
    assert metrics["mis/traj_reject_low"] == 0.25
    assert metrics["mis/traj_reject_high"] == 0.25
    assert metrics["mis/accept_pos"] == 0.5
    assert metrics["mis/accept_neg"] == 0.5
    assert {k: v for k, v in metrics.items() if "accept_len" in k} == {
        "mis/accept_len/0": 1.0,
        "mis/accept_len/16": 0.0,
        "mis/accept_len/64": 1.0,
    }
    assert metrics["mis/log_rho_mean"] == pytest.approx(0.0, abs=1e-9)
    assert metrics["mis/rho_p05"] < 1 < metrics["mis/rho_p95"]


def test_without_a_window_there_is_no_low_and_no_high() -> None:
    everything = keep_all(proposal(torch.ones(2), torch.zeros(2), torch.tensor([0, 1, 2])))
    metrics = acceptance_metrics(everything, torch.ones(2), torch.ones(2), torch.zeros(2))
    assert metrics["mis/traj_accept"] == 1.0
    assert not {"mis/traj_reject_low", "mis/traj_reject_high", "mis/window_high"} & set(metrics)


def test_equal_rewards_leave_out_the_better_ones() -> None:
    chosen = bounds_filter(proposal(torch.zeros(2), torch.zeros(2), torch.tensor([0, 1, 2])), (0.5, 2.0), BOUNDS)
    metrics = acceptance_metrics(chosen, torch.ones(2), torch.ones(2), torch.zeros(2))
    assert "mis/accept_pos" not in metrics
    assert metrics["mis/accept_neg"] == 1.0


def test_mismatch_follows_its_formulas() -> None:
    log_x = [0.1, -0.2, 0.0]
    old, rollout = torch.tensor(log_x, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    sums = mismatch_sums(old - rollout, rollout, torch.tensor([True, False, True]), torch.tensor([0, 2, 3]))
    metrics = mismatch_metrics(sums, ratio_histogram(old - rollout))
    assert metrics["mismatch/k1"] == pytest.approx(sum(-x for x in log_x) / 3)
    assert metrics["mismatch/k3"] == pytest.approx(sum(math.exp(x) - 1 - x for x in log_x) / 3)
    x = [math.exp(value) for value in log_x]
    assert metrics["mismatch/chi2"] == pytest.approx(sum(v * v for v in x) / 3 - 1)
    assert metrics["mismatch/ess"] == pytest.approx(sum(x) ** 2 / (3 * sum(v * v for v in x)))
    assert metrics["mismatch/max_abs"] == pytest.approx(0.2)
    assert metrics["mismatch/ppl_rollout"] == pytest.approx(1.0)
    assert metrics["mismatch/ppl_old"] == pytest.approx(math.exp(0.1 / 3))
    assert metrics["mismatch/p50_abs"] == pytest.approx(0.1, rel=0.06)
    assert metrics["mismatch/p99_abs"] == pytest.approx(0.2, rel=0.06)
    assert metrics["mis/token_accept"] == pytest.approx(2 / 3)
    assert sums.max_abs_B.tolist() == pytest.approx([0.2, 0.0])


def metrics_of(old: Tensor, rollout: Tensor, offsets: Tensor) -> dict[str, float]:
    log_x = old.double() - rollout.double()
    sums = mismatch_sums(log_x, rollout, torch.ones_like(old, dtype=torch.bool), offsets)
    return mismatch_metrics(sums, ratio_histogram(log_x))


def test_the_effective_sample_size_survives_ratios_that_overflow() -> None:
    """One token outweighs all others: of four samples one is left."""
    offsets = torch.tensor([0, 2, 2, 4])
    assert metrics_of(torch.tensor([0.0, 900, 0, 0]), torch.zeros(4), offsets)["mismatch/ess"] == pytest.approx(0.25)
    agreed = metrics_of(torch.zeros(4), torch.zeros(4), offsets)
    assert agreed["mismatch/ess"] == pytest.approx(1.0)
    assert agreed["mismatch/chi2"] == pytest.approx(0.0, abs=1e-12)


def test_k1_and_k3_estimate_the_divergence_of_rollout_from_trainer() -> None:
    generator = torch.Generator().manual_seed(0)
    rollout, old = (torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    drawn = torch.multinomial(rollout.exp(), 200_000, replacement=True, generator=generator)
    metrics = metrics_of(old[drawn], rollout[drawn], torch.tensor([0, len(drawn)]))
    exact = (rollout.exp() * (rollout - old)).sum().item()
    assert metrics["mismatch/k1"] == pytest.approx(exact, rel=0.02)
    assert metrics["mismatch/k3"] == pytest.approx(exact, rel=0.02)


@given(
    log_x=st.lists(st.one_of(st.floats(-50, 50), st.sampled_from([0.0, math.inf, -math.inf])), min_size=1),
    share=st.sampled_from([0.5, 0.99]),
)
def test_the_histogram_brackets_the_quantiles_of_the_ratios(log_x: list[float], share: float) -> None:
    old = torch.tensor(log_x, dtype=torch.float64)
    found = metrics_of(old, torch.zeros_like(old), torch.tensor([0, len(log_x)]))[f"mismatch/p{share * 100:.0f}_abs"]
    expected = sorted(map(abs, log_x))[math.ceil(share * len(log_x)) - 1]
    assert found == pytest.approx(min(expected, 100.0) if expected >= 1e-8 else 0.0, rel=0.06, abs=1.1e-8)


def test_the_algorithm_knows_tensors_only() -> None:
    """No process groups, models, configs or files: that is what makes it quotable."""
    for path in Path(mispo.algorithm.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        outside = {name for name in names if not name.startswith("mispo.algorithm")}
        assert outside <= {"__future__", "torch", "math", "dataclasses", "collections.abc", "functools", "typing"}, (
            path.name
        )
