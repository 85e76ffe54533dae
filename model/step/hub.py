"""Step's released layout: names of the tensors and keys of config.json, as other programs read them.

transformers names the parts of a Step model differently and joins the experts' gate and up projections. A checkpoint
carries this file, see step.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

PARTS = {
    ".mlp.gate.weight": ".moe.gate.weight",
    ".mlp.gate.e_score_correction_bias": ".moe.router_bias",
    ".mlp.experts.down_proj": ".moe.down_proj.weight",
    ".mlp.shared_experts.": ".share_expert.",
}
"""Part of a tensor's name in our layout → in the released one."""

JOINED = ".mlp.experts.gate_up_proj"
HALVES = (".moe.gate_proj.weight", ".moe.up_proj.weight")
"""Our joined tensor [E, 2F, H] holds the two released ones, [E, F, H] each, along dimension 1."""

MTP_PARTS = {
    "enorm.": "enorm.",
    "hnorm.": "hnorm.",
    "eh_proj.": "eh_proj.",
    "norm.": "transformer.shared_head.norm.",
    "head.": "transformer.shared_head.output.",
    "block.self_attn.": "self_attn.",
    "block.mlp.": "mlp.",
    "block.input_layernorm.": "input_layernorm.",
    "block.post_attention_layernorm.": "post_attention_layernorm.",
}
"""What follows `mtp.layers.i.` in our names → what follows `model.layers.N+i.` in the released ones."""

COMPUTED = {
    "moe_router_activation": "sigmoid",
    "norm_expert_weight": True,
    "use_moe_router_bias": True,
    "use_head_wise_attn_gate": True,
    "use_qk_norm": True,
    "zero_centered": True,
    "sink": False,
    "att_impl_type": "GQA",
}
"""Keys of the released config.json of which our model supports only this value."""

RENAMED = {
    "num_key_value_heads": "num_attention_groups",
    "n_routed_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
}

FULL, SLIDING = "full_attention", "sliding_attention"


def released_names(name: str, layers: int) -> tuple[str, ...]:
    """Translate one of our tensors' names to the released one, or to those of its two halves; others stay as they are.

    layers: N, the decoder layers before the MTP layers.
    """
    if match := re.match(r"mtp\.layers\.(\d+)\.(.*)", name):
        place, rest = int(match[1]), match[2]
        for own, released in MTP_PARTS.items():
            if rest.startswith(own):
                name = f"model.layers.{layers + place}.{released}{rest.removeprefix(own)}"
    for own, released in PARTS.items():
        name = name.replace(own, released)
    if name.endswith(JOINED):
        return tuple(name.removesuffix(JOINED) + half for half in HALVES)
    return (name,)


def mtp_renamings(config: Step3p7TextConfig) -> dict[str, str]:
    """Map regular expressions over released names to prefixes of ours, for the MTP layers of the config."""
    return {
        "^" + re.escape(f"model.layers.{config.num_hidden_layers + place}.{released}"): f"mtp.layers.{place}.{own}"
        for place in range(config.num_nextn_predict_layers)
        for own, released in MTP_PARTS.items()
    }


def conversions(config: Step3p7TextConfig) -> list[WeightTransform]:
    """List transformers' conversions from the released layout to ours; it derives the reverse ones."""
    return [*(WeightRenaming(old, new) for old, new in mtp_renamings(config).items()), *_layer_conversions()]


def _layer_conversions() -> list[WeightTransform]:
    renamings = [WeightRenaming(re.escape(released), own) for own, released in PARTS.items()]
    return [*renamings, WeightConverter([re.escape(half) for half in HALVES], JOINED, [_Join(dim=1)])]


class _Join(Concatenate):
    @property
    def reverse_op(self) -> ConversionOps:
        return _Halve()


class _Halve(ConversionOps):
    """Split into halves that share the whole's memory.

    The library copies each file's tensors as it writes them, so a model is never in memory twice.
    """

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: object
    ) -> dict[str, Tensor]:
        (whole,) = input_dict.values()
        whole = whole[0] if isinstance(whole, list) else whole
        return dict(zip(target_patterns, whole.chunk(2, dim=1), strict=True))

    @property
    def reverse_op(self) -> ConversionOps:
        return _Join(dim=1)


def released_config(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the config.json that transformers writes of a `Step3p7TextConfig` to the released one.

    Lists by layer include the MTP layers, which attend to a window and are dense unless the config says otherwise.
    """
    config = dict(saved)
    config.pop("per_layer_config", None)  # follows from the rest
    extra = config["num_nextn_predict_layers"]
    kinds = [*config["layer_types"], *(config.pop("mtp_layer_types", None) or [SLIDING] * extra)]
    blocks = [*config.pop("mlp_layer_types"), *(config.pop("mtp_mlp_layer_types", None) or ["dense"] * extra)]
    rope = config.pop("rope_parameters")
    for own, released in RENAMED.items():
        config[released] = config.pop(own)
    if config.get("query_pre_attn_scalar") == config["head_dim"]:
        del config["query_pre_attn_scalar"]
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        limits = config.pop(name, None)
        if limits is not None:
            config[name] = [*limits, *[0.0] * extra]
    config |= COMPUTED | {
        "architectures": ["Step3p5ForCausalLM"],
        "layer_types": kinds,
        "moe_layers_enum": ",".join(str(i) for i, block in enumerate(blocks) if block == "sparse"),
        "use_moe": "sparse" in blocks,
        "moe_every_n_layer": 1,
        "moe_layer_offset": 0,
        "need_fp32_gate": True,
        "max_seq_len": config["max_position_embeddings"],
        "rope_theta": [rope.get(kind, {}).get("rope_theta", 1e4) for kind in kinds],
        "partial_rotary_factors": [rope.get(kind, {}).get("partial_rotary_factor", 1.0) for kind in kinds],
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": config.pop("num_sliding_attention_heads"),
            "num_attention_groups": config["num_attention_groups"],
            "head_dim": config["head_dim"],
            "true_head_dim": config["head_dim"],
        },
    }
    full = {k: v for k, v in rope.get(FULL, {}).items() if k not in ("rope_theta", "partial_rotary_factor")}
    if full.get("rope_type", "default") != "default":
        config |= {"rope_scaling": full, "yarn_only_types": [FULL]}
    return config


def write_released_config(directory: Path) -> None:
    """Replace the config.json that transformers wrote by the released one."""
    path = directory / "config.json"
    config = released_config(json.loads(path.read_text()))
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def refuse_other_models(config: Step3p7TextConfig) -> None:
    """Raise ValueError for a config.json that asks for what this model does not compute."""
    for key, value in COMPUTED.items():
        asked = getattr(config, key, value)
        if asked != value:
            raise ValueError(f"config.json: {key} is {asked!r}, StepForCausalLM computes {value!r}; use another model")


register_checkpoint_conversion_mapping("StepForCausalLM", _layer_conversions(), overwrite=True)
