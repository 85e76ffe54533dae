"""Log-probs and entropies of tokens without their logits: no [tokens, vocabulary] tensor exists in either pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_BYTES = 64 * 2**20
"""Size of the float32 logits that exist at once; a few such tensors live together while a chunk is computed."""


class LogprobHead(nn.Module):
    """Output embeddings of a policy, which return log-probs of target tokens.

    head: a linear layer that stays where it is in the policy. dtype: of the product with its weight; all else is
    float32. entropy_gradient: whether the entropy has one.
    """

    def __init__(self, head: nn.Linear, dtype: torch.dtype, *, entropy_gradient: bool) -> None:
        super().__init__()
        # Not a child: its parameters must have one name. Under ZeRO-3 DeepSpeed gathers them when they are read here.
        self._head = [head]
        self.dtype = dtype
        self.entropy_gradient = entropy_gradient

    def forward(self, hidden_nH: Tensor, targets_n: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Compute log π(target) and entropy under softmax(logits / temperature); both [n] float32."""
        (head,) = self._head
        chunk = max(1, CHUNK_BYTES // (4 * head.out_features))
        return chunked_logprobs(
            hidden_nH.to(self.dtype), head.weight, head.bias, targets_n, temperature, chunk, self.entropy_gradient
        )


def chunked_logprobs(
    hidden_nH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_n: Tensor,
    temperature: float,
    chunk: int,
    entropy_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of targets_n and entropies under softmax((hidden·Wᵀ + bias)/temperature), both [n] float32.

    The products run in the dtype of hidden_nH, `chunk` tokens at a time, and once more in the backward pass.
    """
    logprobs_n, entropy_n = _Chunked.apply(
        hidden_nH, weight_VH, bias_V, targets_n, temperature, chunk, entropy_gradient
    )
    return logprobs_n, entropy_n if entropy_gradient else entropy_n.detach()


class _Chunked(torch.autograd.Function):
    """∂ log π(a)/∂ z_v = 1[v = a] − p_v and ∂H/∂ z_v = −p_v·(log p_v + H), z = logits/temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_nH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_n: Tensor,
        temperature: float,
        chunk: int,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropies = [], []
        weight = weight_VH.to(hidden_nH.dtype)
        for hidden_cH, targets_c in zip(hidden_nH.split(chunk), targets_n.split(chunk), strict=True):
            logp_cV = _log_softmax(hidden_cH, weight, bias_V, temperature)
            logprobs.append(logp_cV.gather(1, targets_c[:, None])[:, 0])
            entropies.append(-(logp_cV.exp() * logp_cV).sum(-1))
        entropy_n = torch.cat(entropies)
        ctx.save_for_backward(hidden_nH, weight_VH, bias_V, targets_n, entropy_n)
        ctx.settings = (temperature, chunk, entropy_gradient)
        return torch.cat(logprobs), entropy_n

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden_nH, weight_VH, bias_V, targets_n, entropy_n = ctx.saved_tensors
        temperature, chunk, entropy_gradient = ctx.settings
        by_logprob_n, by_entropy_n = gradients
        weight = weight_VH.to(hidden_nH.dtype)
        hidden_grad_nH = torch.empty_like(hidden_nH)
        weight_grad_VH = torch.zeros_like(weight_VH) if ctx.needs_input_grad[1] else None
        bias_grad_V = torch.zeros_like(bias_V) if ctx.needs_input_grad[2] else None
        for start in range(0, len(hidden_nH), chunk):
            part = slice(start, start + chunk)
            logp_cV = _log_softmax(hidden_nH[part], weight, bias_V, temperature)
            slope_cV = logp_cV.exp()
            if entropy_gradient:
                logp_cV.add_(entropy_n[part, None]).mul_(by_entropy_n[part, None]).add_(by_logprob_n[part, None])
                slope_cV.mul_(logp_cV).neg_()
            else:
                slope_cV.mul_(-by_logprob_n[part, None])
            slope_cV.scatter_add_(1, targets_n[part, None], by_logprob_n[part, None])
            slope_cV.div_(temperature)
            if bias_grad_V is not None:
                bias_grad_V += slope_cV.sum(0)
            slope = slope_cV.to(hidden_nH.dtype)
            hidden_grad_nH[part] = slope @ weight
            if weight_grad_VH is not None and slope.dtype == weight_grad_VH.dtype:
                weight_grad_VH.addmm_(slope.T, hidden_nH[part])  # without a second tensor of its size
            elif weight_grad_VH is not None:
                weight_grad_VH += slope.T @ hidden_nH[part]
        return hidden_grad_nH, weight_grad_VH, bias_grad_V, None, None, None, None


def _log_softmax(hidden_cH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    bias = None if bias_V is None else bias_V.to(hidden_cH.dtype)
    logits_cV = nn.functional.linear(hidden_cH, weight_VH, bias).float().div_(temperature)
    return logits_cV.log_softmax(-1)
