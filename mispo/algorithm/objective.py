"""The actor's objective: a policy loss over its denominator, a KL term and an entropy bonus."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mispo.algorithm.loss import PolicyLoss, unbiased_kl
from mispo.algorithm.segments import lengths_of, owner_of, segment_sum


@dataclass(frozen=True)
class Samples:
    """What the actor learns from, constant over the step; all [N].

    old_logprobs: log π_old. advantages: Â. weights: of each token in the policy loss, 0 = rejected. included: bool,
    false for tokens of trajectories that are left out everywhere. reference: log π_ref, None without a KL term.
    """

    old_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    included: Tensor
    reference: Tensor | None = None

    def at(self, places: Tensor, device: torch.device) -> Samples:
        """Return the tokens at these places, in this order, on the device."""
        return Samples(
            self.old_logprobs[places].to(device),
            self.advantages[places].to(device),
            self.weights[places].to(device),
            self.included[places].to(device),
            None if self.reference is None else self.reference[places].to(device),
        )

    def reweighted(self, places: Tensor, weights: Tensor) -> Samples:
        """Return the same samples with other weights at some tokens."""
        return replace(self, weights=self.weights.index_put((places,), weights))


@dataclass(frozen=True)
class Scale:
    """Denominators of a mini-batch over all ranks.

    policy: of the policy loss. everything: of KL and entropy, which count rejected tokens too. kept: number of tokens
    with a weight.
    """

    policy: float
    everything: float
    kept: int


@dataclass(frozen=True)
class Objective:
    """The actor's loss L = Σ loss/D + kl·Σ KL/D' − entropy·Σ H/D'.

    norm: what D counts over the mini-batch and all ranks. "tokens": all included tokens; "accepted": tokens with a
    weight; "sequence": trajectories, each the mean over its tokens; "constant": trajectories times max_tokens.
    """

    loss: PolicyLoss
    norm: str
    max_tokens: int
    kl: float
    entropy: float

    @property
    def everywhere(self) -> bool:
        """Whether rejected tokens have a gradient too."""
        return self.kl > 0 or self.entropy > 0

    def scale(self, samples: Samples, offsets_b1: Tensor, count: Callable[[int], int]) -> Scale:
        """Compute the denominators of a mini-batch. count: sums an integer over all ranks."""
        kept = count(int((samples.weights > 0).sum()))
        tokens = count(int(samples.included.sum()))
        if self.norm in ("sequence", "constant"):
            trajectories = count(int((segment_sum(samples.included, offsets_b1) > 0).sum()))
            each = float(max(trajectories, 1) * (self.max_tokens if self.norm == "constant" else 1))
            return Scale(each, each, kept)
        # Where nothing counts, the sums are 0 and the divisor has no effect.
        return Scale(float(max(kept if self.norm == "accepted" else tokens, 1)), float(max(tokens, 1)), kept)

    def __call__(
        self, logprobs_n: Tensor, entropy_n: Tensor, samples: Samples, offsets_b1: Tensor, scale: Scale
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute a micro-batch's share of the loss, and sums for metrics: clipped, kl_old, kl_ref, tokens."""
        share_n = self._share(offsets_b1).to(logprobs_n)
        total, clipped = self.loss(
            logprobs_n, samples.old_logprobs, samples.advantages, samples.weights * share_n, offsets_b1
        )
        loss = total / scale.policy
        included_n = samples.included.to(logprobs_n)
        moved_n = torch.where(samples.included, logprobs_n.detach() - samples.old_logprobs, 0.0).double()
        sums = {
            "clipped": clipped,
            "kl_old": (moved_n.exp() - 1 - moved_n).sum(),
            "tokens": samples.included.sum(),
        }
        if self.kl > 0:
            assert samples.reference is not None, "a KL term needs the reference's log-probs"
            arguments = (logprobs_n, samples.old_logprobs, samples.reference)
            loss = loss + self.kl * unbiased_kl(*arguments, included_n * share_n) / scale.everything
            sums["kl_ref"] = unbiased_kl(logprobs_n.detach(), *arguments[1:], included_n)
        if self.entropy > 0:
            loss = loss - self.entropy * (included_n * share_n * entropy_n).sum() / scale.everything
        return loss, sums

    def _share(self, offsets_b1: Tensor) -> Tensor:
        lengths_b = lengths_of(offsets_b1)[owner_of(offsets_b1)]
        return 1.0 / lengths_b if self.norm == "sequence" else torch.ones_like(lengths_b, dtype=torch.float32)
