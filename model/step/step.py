"""The Step text model as a causal LM: transformers' own Step layers, grouped experts, a language-model head.

A checkpoint has Step 3.5 Flash's released layout, see hub.py. It also carries this file and those that it imports, so
any process opens it with `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)`; after
`import model` no remote code is needed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig
from transformers.models.step3p7.modeling_step3p7 import Step3p7PreTrainedModel, Step3p7TextModel

from .experts import GroupedExperts
from .hub import conversions, mtp_renamings, refuse_other_models, write_released_config
from .mtp import MtpHeads, before_norm

WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments by which `from_pretrained` finds the files."""


class StepForCausalLM(Step3p7PreTrainedModel, GenerationMixin):
    """Put a language-model head on the Step 3.5 text decoder (report, section 2).

    mtp: heads that draft further tokens, where config.num_nextn_predict_layers is not 0.
    """

    config_class = Step3p7TextConfig
    config: Step3p7TextConfig
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}
    # In every precision: in less than float32 the router selects other experts.
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = [r"mlp\.gate\.weight", "e_score_correction_bias"]

    def __init__(self, config: Step3p7TextConfig) -> None:
        refuse_other_models(config)
        super().__init__(config)
        self.model = Step3p7TextModel(config)
        for layer, kind in zip(self.model.layers, config.mlp_layer_types, strict=True):
            if kind == "sparse":
                layer.mlp.experts = GroupedExperts(config, swiglu_limit=layer.mlp.experts.limit)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp: MtpHeads | None = None
        if config.num_nextn_predict_layers:
            with torch.random.fork_rng():  # the other weights are the same with and without heads
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
        """Return logits [B, S, V] of input_ids [B, S] (only the last `logits_to_keep` positions if > 0).

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
        """Return logits [B, S, V] of input_ids [B, S], and of each head [B, S−1−i, V] (see `MtpHeads`; [] without)."""
        with before_norm(self.model) as hidden:
            output = self.model(input_ids=input_ids, use_cache=False)
        states = [] if self.mtp is None else self.mtp(self.model, hidden[0], self.model.embed_tokens(input_ids))
        drafts = [head.head(state) for head, state in zip(self.mtp.layers if states else (), states, strict=False)]
        return self.lm_head(output.last_hidden_state), drafts

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as in transformers, from the released layout; the MTP layers' names depend on the number of layers."""
        config = kwargs.get("config")
        if not isinstance(config, Step3p7TextConfig):
            where = {key: kwargs[key] for key in WHERE if key in kwargs}
            config = Step3p7TextConfig.from_pretrained(config or pretrained_model_name_or_path, **where)
        names = mtp_renamings(config) | (kwargs.pop("key_mapping", None) or {})
        return super().from_pretrained(pretrained_model_name_or_path, *args, key_mapping=names, **kwargs)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **kwargs: Any
    ) -> None:
        """Save in the released layout. ValueError for push_to_hub, which would send transformers' config."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub: save the model first, then upload the directory")
        self._weight_conversions = conversions(self.config)
        super().save_pretrained(save_directory, is_main_process, **kwargs)
        if is_main_process:
            write_released_config(Path(save_directory))


StepForCausalLM.register_for_auto_class("AutoModelForCausalLM")
