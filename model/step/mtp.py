"""Multi-token prediction (MTP): heads that draft the tokens after the next one, as in Step 3.5 Flash.

Step 3.5 Flash has three (report, section 2), which a decoder uses to guess ahead; no log-prob of the model depends on
them. Head i takes the hidden state of the head before it (of head 0: the model's last layer, before the final norm) and
the embedding of token t+1+i, and predicts token t+2+i.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import create_sliding_window_causal_mask
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7DecoderLayer, Step3p7RMSNorm, Step3p7TextModel

KIND = "sliding_attention"


class MtpHead(nn.Module):
    """Draft one token: two norms, a projection of both inputs, a decoder layer and a separate language-model head.

    config: the model's. layers: that of the heads' decoder layers.
    """

    def __init__(self, config: Step3p7TextConfig, layers: Step3p7TextConfig, number: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = Step3p7RMSNorm(size, eps), Step3p7RMSNorm(size, eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = Step3p7DecoderLayer(layers, number)
        self.block.self_attn.config = config  # so that a change of the model's attention reaches it
        self.norm = Step3p7RMSNorm(size, eps)
        self.head = nn.Linear(size, config.vocab_size, bias=False)

    def forward(
        self, hidden_BSH: Tensor, embeds_BSH: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the states [B, S, H] for the next head; `head` reads them after `norm`."""
        joined = torch.cat([self.enorm(embeds_BSH), self.hnorm(hidden_BSH)], -1)
        return self.block(self.eh_proj(joined), attention_mask=mask, position_embeddings=rotary)


class MtpHeads(nn.Module):
    """Hold all heads of a model, `config.num_nextn_predict_layers` of them."""

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__()
        layers = _layers_config(config)
        self.layers = nn.ModuleList([MtpHead(config, layers, i) for i in range(layers.num_hidden_layers)])

    def forward(
        self,
        trunk: Step3p7TextModel,
        hidden_BSH: Tensor,
        embeds_BSH: Tensor,
        positions_1S: Tensor | None = None,
    ) -> list[Tensor]:
        """Return the states [B, S−1−i, H] of each head i that has a token to read, for its `head`.

        The state at t is for token t+2+i and depends on the tokens up to t+1+i. hidden_BSH: of the trunk's last layer,
        before its final norm. embeds_BSH: of the tokens. positions_1S: of packed sequences, each from 0; the last 1+i
        states of each sequence then mean nothing. Padding on the right is never seen.
        """
        states = []
        length = embeds_BSH.shape[1]
        positions_1S = torch.arange(length, device=embeds_BSH.device)[None] if positions_1S is None else positions_1S
        for head in self.layers[: length - 1]:
            hidden_BSH, embeds_BSH = hidden_BSH[:, : embeds_BSH.shape[1] - 1], embeds_BSH[:, 1:]
            positions = positions_1S[:, : embeds_BSH.shape[1]]
            mask = create_sliding_window_causal_mask(
                config=trunk.config,
                inputs_embeds=embeds_BSH,
                attention_mask=None,
                past_key_values=None,
                position_ids=positions,
            )
            hidden_BSH = head(hidden_BSH, embeds_BSH, mask, trunk.rotary_emb(embeds_BSH, positions, KIND))
            states.append(head.norm(hidden_BSH))
        return states


@contextmanager
def before_norm(trunk: Step3p7TextModel) -> Iterator[list[Tensor]]:
    """Collect the last layer's output [B, S, H], before the final norm, of each forward of the trunk."""
    hidden: list[Tensor] = []
    with trunk.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0])):
        yield hidden


def draft_loss(drafts: Sequence[Tensor], labels_BS: Tensor) -> Tensor:
    """Compute the cross-entropy of the heads' logits (`StepForCausalLM.draft`), summed over tokens, mean over heads.

    labels_BS: token ids, −100 = ignored.
    """
    losses = [
        F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels_BS[:, i + 2 :].flatten(), reduction="sum")
        for i, logits in enumerate(drafts)
    ]
    return torch.stack(losses).mean()


def _layers_config(config: Step3p7TextConfig) -> Step3p7TextConfig:
    """Make the config of the heads' decoder layers: sliding and dense, never clipped, numbered from 0."""
    layers, count = copy.deepcopy(config), config.num_nextn_predict_layers
    layers.num_hidden_layers = count
    layers.layer_types, layers.mlp_layer_types = [KIND] * count, ["dense"] * count
    layers.swiglu_limits = layers.swiglu_limits_shared = None
    layers.per_layer_config = {i: {"num_attention_heads": config.num_sliding_attention_heads} for i in range(count)}
    return layers
