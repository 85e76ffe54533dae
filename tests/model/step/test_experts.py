"""Grouped experts against transformers' loop over experts: forward, gradients, lonely and crowded experts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

from model.presets import preset_config
from model.step.experts import GroupedExperts

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


def test_no_tokens_are_no_output_and_no_gradient() -> None:
    grouped, _ = pair(0.5)
    x = torch.empty(0, H, requires_grad=True)
    out = grouped(x, torch.empty(0, K, dtype=torch.int64), torch.empty(0, K))
    assert out.shape == (0, H)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in grouped.parameters())


class HostReads(TorchDispatchMode):
    """Notes the operators whose result or shape the processor must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "bincount"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device() -> None:
    """On a GPU each wait empties its queue, twice per layer; transformers' loop waits for every expert."""
    seen = []
    for experts in pair(0.5):
        x, weights = torch.randn(9, H, requires_grad=True), torch.rand(9, K, requires_grad=True)
        with HostReads() as reads:
            experts(x, routes("spread", 9), weights).sum().backward()
        seen.append(reads.seen)
    assert seen[0] == []
    assert "nonzero" in seen[1]  # else this test could not see anything


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
