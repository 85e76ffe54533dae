"""Multi-token prediction (MTP): heads that draft the tokens after the next one, as in Step 3.5 Flash.

Step 3.5 Flash has three (report, section 2), which a decoder uses to guess ahead; no log-prob of the model depends on
them. Head i takes the hidden state of the head before it (of head 0: the model's last layer, before the final norm) and
the embedding of token t+1+i, and predicts token t+2+i.
"""

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7RMSNorm, Step3p7TextModel

KIND = "sliding_attention"


class MtpHead(nn.Module):
    """One head: two norms, a projection of both inputs, a decoder layer, and a language-model head of its own.

    config: the model's. layers: that of the heads' decoder layers.
    """

    def __init__(self, config: Step3p7TextConfig, layers: Step3p7TextConfig, number: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = Step3p7RMSNorm(size, eps), Step3p7RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = Step3p7DecoderLayer(layers, number)
        self.block.self_attn.config = config  # its implementation of attention is the model's, whenever that changes
        self.norm = Step3p7RMSNorm(size, eps)
        self.head = nn.Linear(size, config.vocab_size, bias=False)

    def forward(
        self, hidden_BSH: Tensor, embeds_BSH: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, S, H] → [B, S, H], for the next head as for `logits`."""
        joined = torch.cat([self.enorm(embeds_BSH), self.hnorm(hidden_BSH)], -1)
        return self.block(self.eh_proj(joined), attention_mask=mask, position_embeddings=rotary)

    def logits(self, hidden_BSH: Tensor) -> Tensor:
        """[B, S, H] → [B, S, V]."""
        return self.head(self.norm(hidden_BSH))


class MtpHeads(nn.Module):
    """All heads of a model, `config.num_nextn_predict_layers`."""

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__()
        layers = _layers_config(config)
        self.layers = nn.ModuleList([MtpHead(config, layers, i) for i in range(layers.num_hidden_layers)])

    def forward(self, trunk: Step3p7TextModel, hidden_BSH: Tensor, ids_BS: Tensor) -> list[Tensor]:
        """Logits [B, S−1−i, V] of each head i that has a token to read: at t for token t+2+i, from those up to t+1+i.

        hidden_BSH: of the trunk's last layer, before its final norm. Padding on the right is never seen.
        """
        drafts = []
        for i, head in enumerate(self.layers[: ids_BS.shape[1] - 1]):
            hidden_BSH, embeds_BSH = hidden_BSH[:, : ids_BS.shape[1] - 1 - i], trunk.embed_tokens(ids_BS[:, i + 1 :])
            positions = torch.arange(embeds_BSH.shape[1], device=ids_BS.device)[None]
            mask = create_sliding_window_causal_mask(
                config=trunk.config,
                inputs_embeds=embeds_BSH,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
            hidden_BSH = head(hidden_BSH, embeds_BSH, mask, trunk.rotary_emb(embeds_BSH, positions, KIND))
            drafts.append(head.logits(hidden_BSH))
        return drafts


def draft_loss(drafts: Sequence[Tensor], labels_BS: Tensor) -> Tensor:
    """Cross-entropy of what `MtpHeads` gave, summed over the labels that are not −100, mean over the heads."""
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels_BS[:, i + 2 :].flatten(), reduction="sum")
        for i, logits in enumerate(drafts)
    ]
    return torch.stack(losses).mean()


def _layers_config(config: Step3p7TextConfig) -> Step3p7TextConfig:
    """Of the heads' decoder layers: sliding and dense, never clipped, numbered from 0."""
    layers, count = copy.deepcopy(config), config.num_nextn_predict_layers
    layers.num_hidden_layers = count
    layers.layer_types, layers.mlp_layer_types = [KIND] * count, ["dense"] * count
    layers.swiglu_limits = layers.swiglu_limits_shared = None
    layers.per_layer_config = {i: {"num_attention_heads": config.num_sliding_attention_heads} for i in range(count)}
    return layers
