"""Chunked log-probs against the naive ones: values, gradients, memory."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mispo.trainer.logprob import CHUNK_BYTES, LogprobHead, chunked_logprobs


def naive(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, t: float) -> tuple[Tensor, Tensor]:
    logp = (torch.nn.functional.linear(hidden, weight, bias) / t).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def problem(count: int, vocabulary: int, *, bias: bool, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """[hidden, weight, bias?] in float32, targets, and gradients of both outputs."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, 8), (vocabulary, 8), *([(vocabulary,)] if bias else [])]
    inputs = [torch.randn(shape, generator=generator) for shape in shapes]
    targets = torch.randint(vocabulary, (count,), generator=generator)
    slopes = torch.randn(2, count, generator=generator)
    return inputs, targets, slopes[0], slopes[1]


@given(
    count=st.integers(0, 20),
    vocabulary=st.integers(1, 30),
    chunk=st.integers(1, 25),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    bias=st.booleans(),
    entropy_gradient=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_the_naive_ones(
    count: int, vocabulary: int, chunk: int, temperature: float, bias: bool, entropy_gradient: bool, seed: int
) -> None:
    inputs, targets, by_logprob, by_entropy = problem(count, vocabulary, bias=bias, seed=seed)
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    found = chunked_logprobs(ours[0], ours[1], ours[2] if bias else None, targets, temperature, chunk, entropy_gradient)
    expected = naive(exact[0], exact[1], exact[2] if bias else None, targets, temperature)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-5, atol=1e-5)
    assert found[1].requires_grad == entropy_gradient
    weight = float(entropy_gradient)
    total = (found[0] * by_logprob).sum() + (weight * (found[1] * by_entropy).sum() if entropy_gradient else 0)
    total.backward()
    ((expected[0] * by_logprob).sum() + weight * (expected[1] * by_entropy).sum()).backward()
    for a, b in zip(ours, exact, strict=True):
        assert torch.allclose(a.grad.double(), b.grad, rtol=1e-5, atol=1e-5 / temperature)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation gives back."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_holds_all_logits() -> None:
    inputs, targets, by_logprob, _ = problem(256, 100, bias=False)
    hidden, weight = (x.requires_grad_() for x in inputs)
    with Largest() as seen:
        logprobs, _ = chunked_logprobs(hidden, weight, None, targets, 1.0, 16, False)
        (logprobs * by_logprob).sum().backward()
    assert seen.elements == hidden.numel() > 16 * 100
    with Largest() as seen:
        naive(hidden, weight, None, targets, 1.0)
    assert seen.elements == 256 * 100


def test_the_chunk_follows_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = []
    monkeypatch.setattr("mispo.trainer.logprob.chunked_logprobs", lambda *a: chunks.append(a[5]))
    for vocabulary in (100, 128_896, CHUNK_BYTES):
        with torch.device("meta"):
            head = torch.nn.Linear(4, vocabulary, bias=False)
        LogprobHead(head, torch.float32, entropy_gradient=False)(torch.zeros(1, 4), torch.zeros(1).long(), 1.0)
    assert chunks == [CHUNK_BYTES // 400, 130, 1]


def test_in_bf16_only_the_product_is_rounded() -> None:
    """Twice the same rounding of the inputs; softmax, entropy and sums are float32."""
    inputs, targets, by_logprob, _ = problem(64, 50, bias=False)
    rounded = [x.bfloat16() for x in inputs]
    weight = inputs[1].clone().requires_grad_()
    logprobs, entropy = chunked_logprobs(rounded[0].requires_grad_(), weight, None, targets, 1.0, 7, True)
    assert logprobs.dtype == entropy.dtype == torch.float32
    logits = (rounded[0] @ rounded[1].T).double()
    logp = logits.log_softmax(-1)
    assert torch.allclose(logprobs.double(), logp.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-5)
    (logprobs * by_logprob).sum().backward()
    slopes = (torch.nn.functional.one_hot(targets, 50) - logp.exp()) * by_logprob[:, None]
    expected = slopes.T @ rounded[0].double()
    assert weight.grad.dtype == torch.float32
    assert (weight.grad.double() - expected).norm() < 0.01 * expected.norm()
