"""The Step text model as a causal LM: transformers' own Step layers, grouped experts, a language-model head.

A checkpoint carries this file, experts.py and mtp.py, so any process opens it with
`AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`; after `import model` no remote code
is needed.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel

from .experts import GroupedExperts
from .mtp import MtpHeads


class StepForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """Step 3.5 text decoder with a language-model head (report, section 2).

    mtp: heads that draft further tokens, where config.num_nextn_predict_layers is not 0.
    """

    config_class = Step3p7TextConfig
    config: Step3p7TextConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Step3p7TextConfig) -> None:
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        for layer, kind in zip(self.model.layers, config.mlp_layer_types, strict=True):
            if kind == "sparse":
                layer.mlp.experts = GroupedExperts(config, swiglu_limit=layer.mlp.experts.limit)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp: MtpHeads | None = None
        if config.num_nextn_predict_layers:
            with torch.random.fork_rng():  # the rest starts with the weights that it would have without the heads
                self.mtp = MtpHeads(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """input_ids [B, S] → logits [B, S, V] (only the last `logits_to_keep` positions if > 0).

        labels [B, S]: token ids, −100 = ignored; the loss is the mean over the others, shifted by one.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )

    def draft(self, input_ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """input_ids [B, S] → logits [B, S, V], and those of the heads (see `MtpHeads`; [] without heads)."""
        hidden: list[Tensor] = []
        watch = self.model.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        with watch:
            output = self.model(input_ids=input_ids, use_cache=False)
        drafts = [] if self.mtp is None else self.mtp(self.model, hidden[0], input_ids)
        return self.lm_head(output.last_hidden_state), drafts


StepForCausalLM.register_for_auto_class("AutoModelForCausalLM")
