"""The critic: a backbone, by default the policy's, copied, with a scalar head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class ValueHead(nn.Linear):
    """From the last hidden state to V(s). Computes in float32 whatever the backbone's precision.

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
        """[n, H] → [n] float32."""
        with torch.autocast(hidden_nH.device.type, enabled=False):
            return super().forward(hidden_nH.float()).squeeze(-1)


class Critic(nn.Module):
    """V(s) at any position of a batch (report §5.2.2: separate value model).

    backbone: decoder without a language-model head. head_init_std: see `ValueHead`.
    """

    def __init__(self, backbone: PreTrainedModel, head_init_std: float, seed: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = ValueHead(backbone, head_init_std, seed)

    @classmethod
    def from_policy(cls, policy: PreTrainedModel, head_init_std: float, seed: int) -> Critic:
        """A critic whose backbone is an independent copy of the policy's decoder."""
        return cls(copy.deepcopy(policy.get_decoder()), head_init_std, seed)

    def forward(self, input_ids: Tensor, rows: Tensor, columns: Tensor, positions: Tensor | None = None) -> Tensor:
        """input_ids [B, S], padded on the right or packed; values at (rows [n], columns [n]) → [n] float32.

        positions [1, S]: of packed sequences, each from 0. No attention mask: under causal attention nothing real ever
        sees the padding on its right.
        """
        output = self.backbone(input_ids=input_ids, position_ids=positions, use_cache=False)
        return self.value_head(output.last_hidden_state[rows, columns])
