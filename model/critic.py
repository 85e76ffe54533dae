"""The critic: a backbone, by default a copy of the policy's, with a scalar head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ValueHead(nn.Linear):
    """Map the last hidden state to V(s), in float32 also under a backbone in bf16.

    init_std: standard deviation of the weight at the start; the bias starts at 0.
    """

    def __init__(self, backbone: PreTrainedModel, init_std: float, seed: int) -> None:
        embedding = backbone.get_input_embeddings().weight
        super().__init__(embedding.shape[1], 1, device=embedding.device, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * init_std)
            self.bias.zero_()

    def forward(self, hidden_nH: Tensor) -> Tensor:
        """Map [n, H] to [n] float32."""
        with torch.autocast(hidden_nH.device.type, enabled=False):
            return super().forward(hidden_nH.float()).squeeze(-1)


class Critic(nn.Module):
    """Compute V(s) at any position of a batch (report §5.2.2: separate value model).

    backbone: decoder without a language-model head. head_init_std: see `ValueHead`.
    """

    def __init__(self, backbone: PreTrainedModel, head_init_std: float, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = ValueHead(backbone, head_init_std, seed)

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, head_init_std: float, seed: int) -> Critic:
        """Build a critic whose backbone is an independent copy of the policy's decoder."""
        return cls(copy.deepcopy(policy.get_decoder()), head_init_std, seed)

    def forward(self, input_ids: Tensor, rows: Tensor, columns: Tensor, positions: Tensor | None = None) -> Tensor:
        """Return the values [n] float32 at (rows [n], columns [n]) of input_ids [B, S], padded on the right or packed.

        positions [1, S]: of packed sequences, each from 0. There is no attention mask: under causal attention no real
        token sees the padding on its right.
        """
        output = self.backbone(input_ids=input_ids, position_ids=positions, use_cache=False)
        return self.value_head(output.last_hidden_state[rows, columns])
