"""What a router's weights are made of, recognised from what it returns: so that they can be made anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-2
"""Relative. Routers that round their weights to bf16 are off by 4e-3."""


SAMPLE = 64
"""Tokens that a form is recognised from: more would tell nothing new."""


@dataclass(frozen=True)
class RouterForm:
    """weights = scale · s, over the sum of s over the activated experts if normalised; s = kind of the logits.

    kind: sigmoid or softmax.
    """

    kind: str
    normalised: bool
    scale: float

    def scores(self, logits: Tensor) -> Tensor:
        """[tokens, E] float32, of all experts, before any bias of the selection."""
        logits = logits.float()
        return logits.sigmoid() if self.kind == "sigmoid" else logits.softmax(-1)

    def weights(self, logits: Tensor, experts: Tensor) -> Tensor:
        """[tokens, k] float32: the weights that this router gives to these experts; with the logits' gradient."""
        selected = self.scores(logits).gather(1, experts)
        if self.normalised:
            selected = selected / selected.sum(-1, keepdim=True).clamp_min(1e-20)
        return self.scale * selected


@torch.no_grad()
def recognise(logits: Tensor, weights: Tensor, experts: Tensor, name: str = "router") -> RouterForm:
    """The form whose weights come nearest to these; one host synchronisation.

    logits [tokens, E], weights and experts [tokens, k], tokens ≥ 1. ValueError for weights of none of the forms.
    """
    logits, weights, experts = logits[:SAMPLE], weights[:SAMPLE].float(), experts[:SAMPLE].long()
    largest = weights.abs().max()
    found = []
    for kind in ("sigmoid", "softmax"):
        for normalised in (False, True):
            made = RouterForm(kind, normalised, 1.0).weights(logits, experts)
            scale = (weights.sum(-1) / made.sum(-1).clamp_min(1e-20)).median()
            error = (scale * made - weights).abs().max() / largest
            found.append((error, kind, normalised, scale))
    errors, scales = torch.stack([torch.stack([error, scale]) for error, _, _, scale in found]).T.tolist()
    best = min(range(len(found)), key=errors.__getitem__)
    if not errors[best] < TOLERANCE:
        raise ValueError(
            f"{name}: its weights are neither sigmoid nor softmax scores of its logits (relative difference "
            f"{errors[best]:.2g}); routing confidence and replay are not defined for it"
        )
    return RouterForm(found[best][1], found[best][2], scales[best])
