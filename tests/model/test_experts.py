"""Grouped experts against transformers' loop over experts: forward, gradients, lonely and crowded experts."""

import pytest
import torch
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from model.experts import GroupedExperts
from model.presets import preset_config

CONFIG = preset_config("micro", vocab_size=104, pad_token_id=0, eos_token_id=1)
E, K, H = CONFIG.n_routed_experts, CONFIG.num_experts_per_tok, CONFIG.hidden_size


def pair(limit: float | None) -> tuple[GroupedExperts, Step3p7Experts]:
    torch.manual_seed(0)
    grouped, loop = GroupedExperts(CONFIG, swiglu_limit=limit), Step3p7Experts(CONFIG, swiglu_limit=limit)
    for parameter in grouped.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    loop.load_state_dict(grouped.state_dict())
    return grouped, loop


def routes(kind: str, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "all on one":
        return torch.tensor([[3, 5]]).repeat(n, 1)
    if kind == "few experts":
        return torch.stack([torch.randperm(3, generator=generator)[:K] for _ in range(n)])
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(n)])


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("kind", ["spread", "few experts", "all on one"])
@pytest.mark.parametrize("n", [1, 7, 64])
def test_grouped_equals_the_loop(kind: str, n: int, limit: float | None) -> None:
    grouped, loop = pair(limit)
    index = routes(kind, n)
    results = []
    for experts in (grouped, loop):
        x = torch.randn(n, H, generator=torch.Generator().manual_seed(2)).requires_grad_()
        weights = torch.rand(n, K, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = experts(x, index, weights)
        out.square().sum().backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in experts.parameters()]
        results.append([out, x.grad, weights.grad, *grads])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1)


def test_the_same_input_twice_is_the_same_bit_for_bit() -> None:
    grouped, _ = pair(None)
    x, index, weights = torch.randn(200, H), routes("few experts", 200), torch.rand(200, K)
    assert torch.equal(grouped(x, index, weights), grouped(x, index, weights))


def test_autocast_sets_the_precision_of_the_products() -> None:
    grouped, _ = pair(None)
    x, index, weights = torch.randn(16, H), routes("spread", 16), torch.rand(16, K)
    exact = grouped(x, index, weights)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = grouped(x, index, weights)
    assert rough.dtype == x.dtype
    assert 0 < (rough - exact).norm() / exact.norm() < 0.02
