"""The parts of a causal language model that decoding with masks per slot needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from model.moe.routers import find_routers
from rollouts.native.cache import SlotCache, layer_windows


@dataclass(frozen=True)
class Decoder:
    """The parts of a model.

    stack: its layers and input embeddings. head: its output embeddings. windows: sliding window of each layer, None
    for full attention. kinds: name of each layer's attention in the model's config, where layers differ.
    routers: MoE layers, 0 for a dense model. eos_token_ids: tokens that end a completion. pad_token_id: fills rows.
    """

    model: PreTrainedModel
    stack: nn.Module
    head: nn.Module
    windows: Sequence[int | None]
    kinds: Sequence[str]
    routers: int
    eos_token_ids: tuple[int, ...]
    pad_token_id: int

    @property
    def embeddings(self) -> Tensor:
        """[V, H] weight of the input embeddings: its device and precision are those of the computation."""
        return _weight(self.model.get_input_embeddings())

    def padded(self, ids: Sequence[Tensor]) -> Tensor:
        """Lay token sequences out as [B, S] int64 on the device, padded on the right."""
        rows = nn.utils.rnn.pad_sequence(list(ids), batch_first=True, padding_value=self.pad_token_id)
        return rows.to(self.embeddings.device)

    def forward(self, ids: Tensor, positions: Tensor, masks: dict[int | None, Tensor], cache: SlotCache) -> Tensor:
        """Compute the last hidden states [B, S, H] of tokens at these positions, both [B, S].

        masks: of each window, as `SlotCache.prefill` or `SlotCache.decode` returned them.
        """
        dtype = self.embeddings.dtype
        additive = {window: torch.where(mask, 0.0, -torch.inf).to(dtype) for window, mask in masks.items()}
        mask: Tensor | dict[str, Tensor]
        if len(additive) > 1:
            mask = {kind: additive[window] for kind, window in zip(self.kinds, self.windows, strict=True)}
        else:
            (mask,) = additive.values()
        output = self.stack(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        hidden: Tensor = output.last_hidden_state
        return hidden


def take_apart(model: PreTrainedModel, eos_token_ids: Sequence[int], pad_token_id: int) -> Decoder:
    """Find the parts of a causal LM. ValueError for a model of a form that cannot be decoded in slots."""
    stack = model.get_decoder()
    head = model.get_output_embeddings()
    windows = layer_windows(stack.config)
    attention = stack.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ValueError(f"model.attention: {attention!r} takes no mask per slot; use sdpa or eager")
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings; give a causal language model")
    _check_form(model, stack, head)
    return Decoder(
        model=model,
        stack=stack,
        head=head,
        windows=windows,
        kinds=getattr(stack.config, "layer_types", None) or [],
        routers=len(find_routers(model)),
        eos_token_ids=tuple(eos_token_ids),
        pad_token_id=pad_token_id,
    )


@torch.inference_mode()
def _check_form(model: PreTrainedModel, stack: nn.Module, head: nn.Module) -> None:
    """Refuse models that scale or cap their logits after the output embeddings: those would be sampled wrongly."""
    ids = torch.arange(min(4, len(_weight(head))), device=_weight(head).device)[None]
    expected = model(input_ids=ids, use_cache=False).logits
    actual = head(stack(input_ids=ids, use_cache=False).last_hidden_state)
    if not torch.allclose(actual, expected, rtol=1e-2, atol=1e-3):
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embeddings; "
            "the native rollout engine cannot run it"
        )


def _weight(embeddings: nn.Module) -> Tensor:
    weight = embeddings.weight
    assert isinstance(weight, Tensor)
    return weight
