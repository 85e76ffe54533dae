"""Model FLOPs of a forward, counted on the model itself, and what the card could do: together MFU.

Counted are the products that the model needs: no padding, no recomputation, of the experts those that a token goes
through. Forward and backward of an update are three forwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

PEAKS = (
    (r"GH200|H200 NVL", None),
    (r"H200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
)
"""Names of cards and their dense bf16 peak, FLOPs per second (NVIDIA's data sheets); the first that matches counts."""

DRAFT_HEADS = "mtp."
"""Beginning of the names of parameters that neither training nor sampling computes with."""


@dataclass(frozen=True)
class ForwardFlops:
    """parameters: that a token is multiplied with. attention: per layer that attends, heads × head size and the window
    in tokens (None: everything before)."""

    parameters: int
    attention: tuple[tuple[int, int | None], ...]

    def per_token(self, length: float) -> float:
        """FLOPs of a forward per token, mean over a causal sequence of `length` tokens."""
        attended = sum(width * mean_keys(length, window) for width, window in self.attention)
        return 2.0 * self.parameters + 4.0 * attended


def count_flops(model: PreTrainedModel) -> ForwardFlops:
    """Count on the model as it is, any architecture of transformers, with or without an output head.

    Matrices only: norms and biases multiply nothing. The embedding table is looked up, not multiplied, unless it is
    the output's too. Call it before adapters or ZeRO-3 change the shapes.
    """
    text = model.config.get_text_config()
    top_k = getattr(text, "num_experts_per_tok", None)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = head is None or table is not head.weight
    active = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (looked_up and parameter is table) or name.startswith(DRAFT_HEADS):
            continue
        experts = _experts(model, name, parameter)
        active += parameter.numel() if experts is None else parameter.numel() // experts * int(top_k)
    return ForwardFlops(active, _attention(model, text))


class FlopCounter:
    """FLOPs of an engine's forwards and backwards since the last look.

    backward: of a backward pass, in forwards: 2; 1 where the weights are frozen.
    """

    def __init__(self, forward: ForwardFlops, backward: float = 2.0) -> None:
        self.forward = forward
        self.backward = backward
        self._sum = 0.0

    def of(self, length: int) -> float:
        """A forward over one trajectory of so many tokens."""
        return length * self.forward.per_token(length)

    def add(self, lengths: Sequence[int], *, backward: bool) -> None:
        """A forward over trajectories of these lengths; backward: which is followed by the other one."""
        self._sum += (1.0 + self.backward * backward) * sum(self.of(length) for length in lengths)

    def take(self) -> float:
        """What was counted; it begins anew."""
        total, self._sum = self._sum, 0.0
        return total


def mean_keys(length: float, window: int | None) -> float:
    """How many keys a token attends to, itself included, mean over a causal sequence of `length` tokens."""
    if window is None or length <= window:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOPs per second of a card by the name that CUDA gives it; None for one that is not in the table."""
    return next((peak for pattern, peak in PEAKS if re.search(rf"\b({pattern})\b", device_name)), None)


def _experts(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> int | None:
    """Among how many experts a parameter is split; None for one that every token goes through."""
    before, found, _ = name.rpartition(".experts.")
    if not found:
        return None
    module = model.get_submodule(f"{before}.experts")
    return len(module) if isinstance(module, nn.ModuleList) else parameter.shape[0]


def _attention(model: PreTrainedModel, text: Any) -> tuple[tuple[int, int | None], ...]:
    """From the output projection of each layer that has one; by the names that transformers gives nearly all models."""
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    found: list[tuple[int, int | None]] = []
    for name, module in model.named_modules():
        if isinstance(getattr(module, "o_proj", None), nn.Linear) and not name.startswith(DRAFT_HEADS):
            slides = window is not None and (kinds is None or kinds[module.layer_idx] == "sliding_attention")
            found.append((module.o_proj.in_features, window if slides else None))
    return tuple(found)
