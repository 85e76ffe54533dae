"""Count what follows from a model's shape, once: parameters, experts, FLOPs, KV bytes; and the peak of a card.

Nothing here computes with weights, so a model on the meta device will do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from model.critic import ValueHead
from model.moe.routers import find_routers, smallest_integer

PEAKS = (
    (r"GH200|H200 NVL", None),
    (r"H200", 989e12),
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H100", 989e12),
    (r"A100", 312e12),
    (r"L40S", 362e12),
)
"""Names of cards and their dense bf16 peak in FLOPs per second (NVIDIA's data sheets); the first match counts."""

DRAFT_HEADS = "mtp."
"""Prefix of the parameters that neither training nor sampling computes with."""


@dataclass(frozen=True)
class ForwardFlops:
    """Give the FLOPs of a forward: the products that the model needs, without padding and recomputation.

    Forward and backward of an update are three forwards.
    parameters: that a token is multiplied with, of the experts only those that it goes through.
    attention: per layer that attends, heads × head size and the window in tokens (None: everything before).
    """

    parameters: int
    attention: tuple[tuple[int, int | None], ...]

    def per_token(self, length: float) -> float:
        """Return the FLOPs of a forward per token, mean over a causal sequence of `length` tokens."""
        attended = sum(width * mean_keys(length, window) for width, window in self.attention)
        return 2.0 * self.parameters + 4.0 * attended


@dataclass(frozen=True)
class Facts:
    """Hold the numbers of a model.

    parameters: all. learning: of these, with a gradient. matrices: of those, in `hidden_matrices`.
    forward: FLOPs; forward.parameters are the active parameters of a token.
    moe_layers, experts, top_k: MoE layers, and experts of each and for a token; 0 for a dense model.
    windows: per decoder layer in tokens, None where attention is full.
    kv_numbers: keys and values of a token in a layer.
    vocabulary: tokens. positions: longest sequence in tokens, None = unlimited.
    """

    parameters: int
    learning: int
    matrices: int
    forward: ForwardFlops
    moe_layers: int
    experts: int
    top_k: int
    windows: tuple[int | None, ...]
    kv_numbers: int
    vocabulary: int
    positions: int | None

    def kv_bytes(self, length: int, itemsize: int) -> int:
        """Return the bytes of a sequence's KV cache.

        length: tokens. itemsize: bytes of a number. An upper bound for models that cache latents (DeepSeek's).
        """
        cells = sum(length if window is None else min(length, window) for window in self.windows)
        return cells * self.kv_numbers * itemsize

    @property
    def expert_bytes(self) -> int:
        """Bytes of a token's record of activated experts."""
        return self.moe_layers * self.top_k * smallest_integer(self.experts).itemsize


def facts_of(model: PreTrainedModel) -> Facts:
    """Count on the model, of any architecture of transformers, with or without an output head.

    Call it before adapters or ZeRO-3 change the shapes.
    """
    text = model.config.get_text_config()
    routers = find_routers(model)
    # Where a config has both numbers, the heads of the queries may differ between layers and are not read.
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Facts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        learning=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        matrices=sum(parameter.numel() for parameter in hidden_matrices(model)),
        forward=count_flops(model),
        moe_layers=len(routers),
        experts=routers[0].experts if routers else 0,
        top_k=routers[0].top_k if routers else 0,
        windows=windows_of(text),
        kv_numbers=2 * kv_heads * head_size,
        vocabulary=text.vocab_size,
        positions=getattr(text, "max_position_embeddings", None),
    )


def count_flops(model: PreTrainedModel) -> ForwardFlops:
    """Count the FLOPs of a forward, under the conditions of `facts_of`.

    Matrices only: norms and biases multiply nothing. The embedding table is looked up, not multiplied, unless it is
    the output's too.
    """
    routers = find_routers(model)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    looked_up = head is None or table is not head.weight
    active = 0
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 or (looked_up and parameter is table) or name.startswith(DRAFT_HEADS):
            continue
        split = _split(model, name, parameter) if routers else 1
        active += parameter.numel() if split == 1 else parameter.numel() // split * routers[0].top_k
    return ForwardFlops(active, _attention(model))


def windows_of(config: PreTrainedConfig) -> tuple[int | None, ...]:
    """Read the sliding window of each decoder layer, None where attention is full or of another kind."""
    kinds, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    if kinds is None:
        return (window,) * config.num_hidden_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """List the matrices of hidden layers that learn, stacks [experts, out, in] included.

    Embeddings, output heads and value heads are not among them.
    """
    ends = {id(parameter) for parameter in _ends(module)}
    return [p for p in module.parameters() if p.requires_grad and p.ndim in (2, 3) and id(p) not in ends]


class FlopCounter:
    """Count the FLOPs of an engine's forwards and backwards.

    backward: FLOPs of a backward pass, in forwards: 2; 1 where the weights are frozen.
    """

    def __init__(self, forward: ForwardFlops, backward: float = 2.0) -> None:
        self.forward = forward
        self.backward = backward
        self._sum = 0.0

    def of(self, length: int) -> float:
        """Return the FLOPs of a forward over one trajectory of `length` tokens."""
        return length * self.forward.per_token(length)

    def add(self, lengths: Sequence[int], *, backward: bool) -> None:
        """Add a forward over trajectories of these lengths in tokens, with or without its backward."""
        self._sum += (1.0 + self.backward * backward) * sum(self.of(length) for length in lengths)

    def take(self) -> float:
        """Return the sum since the last call and start again at 0."""
        total, self._sum = self._sum, 0.0
        return total


def mean_keys(length: float, window: int | None) -> float:
    """Return how many keys a token attends to, itself included, mean over a causal sequence of `length` tokens."""
    if window is None or length <= window:
        return (length + 1) / 2
    return window - window * (window - 1) / (2 * length)


def peak_flops(device_name: str) -> float | None:
    """Return a card's dense bf16 FLOPs per second by CUDA's name for it; None for a card that is not in `PEAKS`."""
    return next((peak for pattern, peak in PEAKS if re.search(rf"\b({pattern})\b", device_name)), None)


def _split(model: PreTrainedModel, name: str, parameter: nn.Parameter) -> int:
    """Return among how many experts a parameter is split; 1 for one that every token goes through."""
    before, found, _ = name.rpartition(".experts.")
    if not found:
        return 1
    module = model.get_submodule(f"{before}.experts")
    return len(module) if isinstance(module, nn.ModuleList) else parameter.shape[0]


def _attention(model: PreTrainedModel) -> tuple[tuple[int, int | None], ...]:
    """Read the output projection of each layer that has one, by the names of nearly all models of transformers."""
    windows = windows_of(model.config.get_text_config())
    return tuple(
        (module.o_proj.in_features, windows[module.layer_idx] if any(windows) else None)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "o_proj", None), nn.Linear) and not name.startswith(DRAFT_HEADS)
    )


def _ends(module: nn.Module) -> Iterator[Tensor]:
    """List the weights where tokens come in and values or logits go out."""
    for part in module.modules():
        if isinstance(part, nn.Embedding | ValueHead):
            yield part.weight
        head = part.get_output_embeddings() if isinstance(part, PreTrainedModel) else None
        if head is not None:
            yield head.weight
