"""Tiny random MoEs of every family of routers that is supported."""

import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Ernie4_5_MoeConfig,
    Glm4MoeConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from model.build import build_policy
from model.moe.routers import find_routers

FAMILIES = [
    ("step", 3),
    ("qwen", 2),
    ("qwen-normalised", 2),
    ("mixtral", 2),
    ("olmoe", 2),
    ("deepseek", 1),
    ("glm", 1),
    ("ernie", 1),
    ("minimax", 2),
]
"""(family, MoE layers)."""
EXPERTS = {"step": 8, "deepseek": 8, "glm": 8}
"""Experts of a MoE layer, where they are not 6."""
SIGMOID = ("step", "deepseek", "glm", "minimax")
BIASED = (*SIGMOID, "ernie")
"""Families whose selection has a bias."""

SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if family == "step":
        return build_policy("micro", None)[0].eval()
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    groups = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    config = {
        "qwen": lambda: Qwen3MoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16),
        "qwen-normalised": lambda: Qwen3MoeConfig(
            **SMALL, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True
        ),
        "deepseek": lambda: DeepseekV3Config(
            **{**SMALL, "num_key_value_heads": 4},
            **groups,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
        ),
        "glm": lambda: Glm4MoeConfig(
            **SMALL, **groups, moe_intermediate_size=16, first_k_dense_replace=1, head_dim=8, routed_scaling_factor=2.5
        ),
        "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=6, num_experts_per_tok=2),
        "olmoe": lambda: OlmoeConfig(**SMALL, num_experts=6, num_experts_per_tok=2),
        "ernie": lambda: Ernie4_5_MoeConfig(**SMALL, **ends, moe_num_experts=6, moe_k=2, moe_intermediate_size=16),
        "minimax": lambda: MiniMaxM2Config(**SMALL, **ends, num_local_experts=6, num_experts_per_tok=2, head_dim=8),
    }[family]()
    model = AutoModelForCausalLM.from_config(config).eval()
    for router in find_routers(model):
        torch.nn.init.normal_(router.module.weight)  # some start at 0, where all experts are alike
    return model
