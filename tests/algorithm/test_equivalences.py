"""Methods that must be the same: gradients of whole methods, as a config builds them; REINFORCE in plain loops."""

import math
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mispo.algorithm.advantage import gae, group_advantages
from mispo.algorithm.objective import Samples
from mispo.algorithm.segments import owner_of
from mispo.build.algorithm import build_method
from mispo.config.load import load_config
from mispo.config.schema import MispoConfig
from support.ragged import Ragged, proposal

VOCABULARY, SAMPLES, LONGEST = 5, 4, 40

prompts = st.builds(
    Ragged,
    st.integers(1, 3).flatmap(lambda n: st.lists(st.integers(1, LONGEST), min_size=n * SAMPLES, max_size=n * SAMPLES)),
    st.integers(0, 2**31),
)
"""One to three prompts with four trajectories each."""


@cache
def config_of(*overrides: str) -> MispoConfig:
    return load_config([*overrides, f"rollout.max_new_tokens={LONGEST}"])


def toy(batch: Ragged) -> tuple[Tensor, Tensor]:
    """Separate logits for each token [N, V] float64, and the tokens taken [N]."""
    generator = torch.Generator().manual_seed(batch.seed)
    count = sum(batch.lengths)
    logits = torch.randn(count, VOCABULARY, generator=generator, dtype=torch.float64)
    return logits, torch.randint(VOCABULARY, (count,), generator=generator)


def gradient(overrides: list[str], batch: Ragged, advantages_N: Tensor, old_shift: float, mismatch: float) -> Tensor:
    """∂L/∂logits [N, V] of a method. π_old is old_shift away from π_θ, π_rollout is mismatch away from π_old."""
    method = build_method(config_of(*overrides), (0.0, 1.0))
    logits, tokens = toy(batch)
    logits.requires_grad_()
    logprobs_N = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    old_N = logprobs_N.detach() + batch.tokens("old", old_shift).double()
    rollout_N = old_N + batch.tokens("rollout", mismatch).double()
    proposed = proposal(old_N, rollout_N, batch.offsets, samples=SAMPLES)
    included_N = torch.ones_like(old_N, dtype=torch.bool)
    weights_N = method.weights(method.filter(proposed), proposed.log_x_N, batch.offsets, included_N)
    samples = Samples(old_N, advantages_N, weights_N, included_N)
    scale = method.objective.scale(samples, batch.offsets, lambda number: number)
    loss, _ = method.objective(logprobs_N, torch.zeros_like(old_N), samples, batch.offsets, scale)
    (found,) = torch.autograd.grad(loss, logits)
    return found


def reinforce(batch: Ragged, advantages: list[list[float]], per_token: list[float]) -> Tensor:
    """−Σ_b Σ_t per_token_b·Â_bt·∇ log π(a_bt), where ∂ log π(a)/∂ logit_v = 1[v = a] − π(v)."""
    logits, tokens = toy(batch)
    rows, place = [], 0
    for advantages_T, share in zip(advantages, per_token, strict=True):
        for advantage in advantages_T:
            numbers = [math.exp(x) for x in logits[place].tolist()]
            total = sum(numbers)
            rows.append(
                [-share * advantage * (float(v == tokens[place]) - numbers[v] / total) for v in range(VOCABULARY)]
            )
            place += 1
    return torch.tensor(rows, dtype=torch.float64)


def group_baseline(batch: Ragged, divide: bool) -> tuple[Tensor, list[list[float]]]:
    """(R − mean of the prompt) per token, divided by the deviation or not: as the code has it, and by hand."""
    returns = (batch.trajectories("returns") > 0).float()
    prompt = torch.arange(len(returns)) // SAMPLES
    everything = torch.ones(len(returns), dtype=torch.bool)
    found = group_advantages(returns, everything, prompt, "group_std" if divide else "group_mean")
    by_hand = []
    for start in range(0, len(returns), SAMPLES):
        group = returns[start : start + SAMPLES].tolist()
        mean = sum(group) / SAMPLES
        deviation = math.sqrt(sum((r - mean) ** 2 for r in group) / (SAMPLES - 1))
        by_hand += [(r - mean) / ((deviation or 1.0) if divide else 1.0) for r in group]
    tokens = [[a] * length for a, length in zip(by_hand, batch.lengths, strict=True)]
    return found[owner_of(batch.offsets)], tokens


@given(batch=prompts)
def test_grpo_with_one_update_is_reinforce_with_a_group_baseline(batch: Ragged) -> None:
    advantages_N, by_hand = group_baseline(batch, divide=True)
    found = gradient(["algorithm=grpo"], batch, advantages_N, old_shift=0.0, mismatch=0.0)
    shares = [1 / len(batch.lengths) / length for length in batch.lengths]
    assert torch.allclose(found, reinforce(batch, by_hand, shares), atol=1e-7)


@given(batch=prompts)
def test_dr_grpo_with_one_update_divides_by_a_constant(batch: Ragged) -> None:
    advantages_N, by_hand = group_baseline(batch, divide=False)
    found = gradient(["algorithm=dr_grpo"], batch, advantages_N, old_shift=0.0, mismatch=0.0)
    shares = [1 / len(batch.lengths) / LONGEST] * len(batch.lengths)
    assert torch.allclose(found, reinforce(batch, by_hand, shares), atol=1e-7)


@given(batch=prompts, mismatch=st.sampled_from([0.0, 3.0]))
def test_mispo_with_open_bounds_is_reinforce_with_a_critics_baseline(batch: Ragged, mismatch: float) -> None:
    """On policy; and off policy too, since no ratio ever weighs a gradient."""
    returns, values = batch.trajectories("returns"), batch.tokens("values")
    finished = torch.zeros(len(returns), dtype=torch.bool)
    advantages_N, _ = gae(values, returns, finished, batch.offsets, 1.0, 1.0)
    by_hand = [
        [end - value for value in values_T] for end, values_T in zip(returns.tolist(), batch.split(values), strict=True)
    ]
    wide = "[1e-30,1e30]"
    overrides = [f"algorithm.filter.token_bounds={wide}", f"algorithm.filter.trajectory_bounds={wide}"]
    found = gradient(["algorithm=mispo", *overrides], batch, advantages_N, old_shift=mismatch, mismatch=mismatch)
    shares = [1 / sum(batch.lengths)] * len(batch.lengths)
    assert torch.allclose(found, reinforce(batch, by_hand, shares), atol=1e-6)


@given(batch=prompts, old_shift=st.sampled_from([0.0, 0.5]))
def test_tis_without_a_cap_and_without_a_mismatch_is_ppo(batch: Ragged, old_shift: float) -> None:
    advantages_N = batch.tokens("advantages")
    tis = ["algorithm=tis", "algorithm.correction.cap=inf"]
    found = gradient(tis, batch, advantages_N, old_shift, mismatch=0.0)
    assert torch.equal(found, gradient(["algorithm=ppo"], batch, advantages_N, old_shift, mismatch=0.0))


@given(batch=prompts)
def test_tis_without_a_cap_weighs_by_the_importance_ratio(batch: Ragged) -> None:
    """The gradient of each token is x times PPO's."""
    advantages_N = batch.tokens("advantages")
    found = gradient(["algorithm=tis", "algorithm.correction.cap=inf"], batch, advantages_N, 0.3, mismatch=0.5)
    ppo = gradient(["algorithm=ppo"], batch, advantages_N, 0.3, mismatch=0.5)
    x_N = (-batch.tokens("rollout", 0.5).double()).exp()
    assert torch.allclose(found, ppo * x_N[:, None], rtol=1e-5, atol=1e-9)


@given(batch=prompts)
def test_without_a_mismatch_the_window_and_the_weights_of_all_methods_are_open(batch: Ragged) -> None:
    advantages_N = batch.tokens("advantages")

    def of(*names: str) -> list[Tensor]:
        return [gradient([f"algorithm={name}"], batch, advantages_N, 0.2, mismatch=0.0) for name in names]

    mispo, *family = of("mispo", "mispo_quantile", "mispo_metropolis", "token_only", "random_reject", "no_filter")
    assert all(torch.equal(other, mispo) for other in family)
    ppo, *corrected = of("ppo", "tis", "icepop")
    assert all(torch.equal(other, ppo) for other in corrected)


@pytest.mark.parametrize("name", ["grpo", "dapo"])
def test_a_group_in_which_all_agree_teaches_nothing(name: str) -> None:
    batch = Ragged([3, 5, 2, 7], 1)
    advantages_B = group_advantages(torch.ones(4), torch.ones(4, dtype=torch.bool), torch.zeros(4).long(), "group_std")
    found = gradient([f"algorithm={name}"], batch, advantages_B[owner_of(batch.offsets)], 0.0, 0.0)
    assert not found.any()
