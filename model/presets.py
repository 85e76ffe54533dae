"""Built-in shapes of the Step model: the published architecture at sizes for tests, a laptop and one GPU."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig


@dataclass(frozen=True)
class Preset:
    """What differs between the sizes; the rest follows Step 3.5 Flash (report, section 2)."""

    layers: int
    hidden: int
    heads_full: int
    heads_sliding: int
    kv_heads: int
    head_dim: int
    window: int
    dense_ffn: int
    experts: int
    top_k: int
    expert_ffn: int
    positions: int


PRESETS = {
    "micro": Preset(4, 64, 4, 6, 2, 16, 16, 128, 8, 2, 16, 1024),
    "tiny": Preset(4, 128, 4, 6, 2, 32, 32, 384, 16, 4, 64, 1024),
    "small": Preset(13, 512, 8, 12, 4, 64, 256, 1536, 32, 4, 128, 8192),
}


def preset_config(name: str, *, vocab_size: int, pad_token_id: int, eos_token_id: int) -> Step3p7TextConfig:
    """Configuration of a preset. ValueError for an unknown name, with the nearest one.

    Layer 0 attends to everything and is dense; then three sliding layers to each full one, all MoE.
    """
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"model.preset: no preset {name!r}{hint} (there are {', '.join(PRESETS)})")
    p = PRESETS[name]
    return Step3p7TextConfig(
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
        eos_token_id=eos_token_id,
        hidden_size=p.hidden,
        num_hidden_layers=p.layers,
        layer_types=["full_attention" if i % 4 == 0 else "sliding_attention" for i in range(p.layers)],
        mlp_layer_types=["dense"] + ["sparse"] * (p.layers - 1),
        num_attention_heads=p.heads_full,
        num_sliding_attention_heads=p.heads_sliding,
        num_key_value_heads=p.kv_heads,
        head_dim=p.head_dim,
        sliding_window=p.window,
        intermediate_size=p.dense_ffn,
        n_routed_experts=p.experts,
        num_experts_per_tok=p.top_k,
        moe_intermediate_size=p.expert_ffn,
        share_expert_dim=p.expert_ffn,
        moe_router_scaling_factor=3.0,
        max_position_embeddings=p.positions,
        initializer_range=0.02 if p.hidden >= 512 else 0.05,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    )
