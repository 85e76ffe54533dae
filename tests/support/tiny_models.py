"""Tiny random causal LMs of three families; initialised widely, so that their distributions are not flat."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.step.step import StepForCausalLM

VOCAB = 40
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def step_config(window: int = 8) -> Step3p7TextConfig:
    """Full, sliding, sliding; dense, MoE, MoE; more heads on sliding layers."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return Step3p7TextConfig(
        **COMMON,
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        num_sliding_attention_heads=6,
        sliding_window=window,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        share_expert_dim=16,
        rope_parameters={
            "full_attention": {**rope, "partial_rotary_factor": 0.5},
            "sliding_attention": {**rope, "partial_rotary_factor": 1.0},
        },
    )


def tiny_model(family: str, attention: str = "sdpa") -> PreTrainedModel:
    """step: layers of both kinds; qwen: softmax MoE, full attention; qwen-sliding: all layers sliding,
    window 8; llama: dense, tied embeddings."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if family == "step":
            config = step_config()
            config._attn_implementation = attention
            return StepForCausalLM(config).eval()
        if family == "llama":
            config = LlamaConfig(**COMMON, num_hidden_layers=2, tie_word_embeddings=True, attn_implementation=attention)
            return LlamaForCausalLM(config).eval()
        config = Qwen3MoeConfig(
            **COMMON,
            num_hidden_layers=2,
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
            use_sliding_window=family == "qwen-sliding",
            sliding_window=8 if family == "qwen-sliding" else None,
            attn_implementation=attention,
        )
        return Qwen3MoeForCausalLM(config).eval()
