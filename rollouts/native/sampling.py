"""From logits to tokens: inverse CDF with one uniform number per token, or the most likely token."""

from __future__ import annotations

import torch
from torch import Tensor


def request_uniforms(seed: int, count: int) -> Tensor:
    """[count] float64 in [0, 1): the random numbers of one request, whatever slot or batch it runs in."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pick_tokens(logits: Tensor, temperature: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample one token per row and say how likely it was.

    logits: [n, V]; temperature: [n] float32, 0 = most likely token; uniform: [n] float64.
    Returns token ids [n] int64 and their log-probs [n] float32 under softmax(logits / temperature)
    (temperature 1 where it is 0). The CDF is summed in float64: in float32 the rare tokens of a large
    vocabulary would drown in rounding, and the recorded log-prob would not be that of the sampler.
    """
    greedy = temperature == 0
    scaled = logits.float() / torch.where(greedy, 1.0, temperature)[:, None]
    logprobs = torch.log_softmax(scaled, dim=-1)
    cdf = logprobs.double().exp().cumsum(-1)
    sampled = torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0]
    sampled = sampled.clamp_max(logits.shape[-1] - 1)
    tokens = torch.where(greedy, logits.argmax(-1), sampled)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
