"""Built-in shapes of the Step model: Step 3.5 Flash as published, and smaller ones of the same architecture."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

VOCABULARY = 128_896
"""Vocabulary of the published model, in tokens."""
ROUTED_CLIP, SHARED_CLIP = 7.0, 16.0
"""Bounds on the activations of routed and shared experts, on the layers that have them."""


@dataclass(frozen=True)
class Preset:
    """Describe what differs between the sizes; the rest follows Step 3.5 Flash (report §2 and released config).

    dense: layers at the beginning without experts. routed_clips, shared_clips: layers whose experts are clipped.
    first_positions: context before it was extended to `positions` (Llama 3's rule, full attention only); None = never.
    """

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
    dense: int = 1
    routed_clips: tuple[int, ...] = ()
    shared_clips: tuple[int, ...] = ()
    first_positions: int | None = None


PRESETS = {
    "micro": Preset(4, 64, 4, 6, 2, 16, 16, 128, 8, 2, 16, 1024),
    "tiny": Preset(4, 128, 4, 6, 2, 32, 32, 384, 16, 4, 64, 1024),
    "small": Preset(13, 512, 8, 12, 4, 64, 256, 1536, 32, 4, 128, 8192),
    "base": Preset(21, 1024, 16, 24, 4, 64, 512, 3072, 64, 4, 256, 32768, dense=3),
    "flash": Preset(
        *(45, 4096, 64, 96, 8, 128, 512, 11264, 288, 8, 1280, 262_144),
        dense=3,
        routed_clips=(43, 44),
        shared_clips=(44,),
        first_positions=131_072,
    ),
}


def preset_config(
    name: str, *, vocab_size: int = VOCABULARY, pad_token_id: int, eos_token_id: int, mtp: int = 0
) -> Step3p7TextConfig:
    """Return the configuration of a preset. ValueError for an unknown name, with the nearest one.

    Layer 0 attends to everything; then three sliding layers to each full one. Dense layers first, then MoE. mtp: heads
    that draft further tokens; the published model has 3.
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
        mlp_layer_types=["dense"] * p.dense + ["sparse"] * (p.layers - p.dense),
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
        swiglu_limits=_limits(p.layers, p.routed_clips, ROUTED_CLIP),
        swiglu_limits_shared=_limits(p.layers, p.shared_clips, SHARED_CLIP),
        num_nextn_predict_layers=mtp,
        mtp_layer_types=["sliding_attention"] * mtp,
        mtp_mlp_layer_types=["dense"] * mtp,
        max_position_embeddings=p.positions,
        initializer_range=0.02 if p.hidden >= 512 else 0.05,
        rope_parameters={
            "full_attention": {"rope_theta": 5e6, "partial_rotary_factor": 0.5, **_scaling(p)},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        },
    )


def _limits(layers: int, clipped: tuple[int, ...], limit: float) -> list[float] | None:
    return [limit if i in clipped else 0.0 for i in range(layers)] if clipped else None


def _scaling(p: Preset) -> dict[str, Any]:
    if p.first_positions is None:
        return {"rope_type": "default"}
    return {
        "rope_type": "llama3",
        "factor": p.positions / p.first_positions,
        "original_max_position_embeddings": p.first_positions,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    }
