"""Numbers of small models, counted by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from model.build import build_shape, let_drafts_learn
from model.critic import Critic
from model.facts import (
    Facts,
    FlopCounter,
    ForwardFlops,
    count_flops,
    facts_of,
    hidden_matrices,
    mean_keys,
    peak_flops,
    windows_of,
)
from model.presets import preset_config
from support.moes import EXPERTS, FAMILIES, model_of

DENSE = {
    "vocab_size": 50,
    "hidden_size": 8,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
}


def flops_of(config: PreTrainedConfig) -> ForwardFlops:
    """Without memory for its weights."""
    with torch.device("meta"):
        return count_flops(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("tied", [False, True])
def test_dense_model_counts_its_matrices_and_the_output_once(tied: bool) -> None:
    flops = flops_of(Qwen3Config(**DENSE, tie_word_embeddings=tied))
    attention = 8 * 24 + 2 * 8 * 12 + 24 * 8  # q, k and v, o
    mlp = 3 * 8 * 24
    assert flops.parameters == 2 * (attention + mlp) + 50 * 8
    assert flops.attention == ((24, None), (24, None))
    # Per layer and key 2·24 for the scores and 2·24 for the values; 11 tokens see 6 keys on average.
    assert flops.per_token(11) == 2 * flops.parameters + 2 * 6 * 4 * 24


def test_of_the_experts_only_those_that_a_token_goes_through() -> None:
    config = Qwen3MoeConfig(**DENSE, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=3, mlp_only_layers=[0])
    attention = 8 * 24 + 2 * 8 * 12 + 24 * 8
    router, expert = 5 * 8, 3 * 8 * 3
    active = 2 * attention + 3 * 8 * 24 + router + 2 * expert + 50 * 8
    assert flops_of(config).parameters == active
    assert flops_of(config).per_token(1) == 2 * active + 2 * 4 * 24


def test_step_has_shared_experts_windows_and_more_heads_where_it_slides() -> None:
    flops = flops_of(preset_config("micro", vocab_size=100, pad_token_id=0, eos_token_id=1))
    full = 2 * 64 * 64 + 2 * 64 * 32 + 64 * 4  # 4 heads of 16; the last term gates them
    sliding = 2 * 64 * 96 + 2 * 64 * 32 + 64 * 6  # 6 heads
    moe = 8 * 64 + (2 + 1) * 3 * 64 * 16  # router, 2 of 8 experts and the shared one
    assert flops.parameters == full + 3 * 64 * 128 + 3 * (sliding + moe) + 100 * 64
    assert flops.attention == ((64, None), (96, 16), (96, 16), (96, 16))
    # A sequence of 32: token t sees t keys up to 16, then 16 each: (136 + 256)/32.
    assert flops.per_token(32) == 2 * flops.parameters + 4 * (64 * 16.5 + 3 * 96 * 12.25)


def test_draft_heads_cost_nothing_since_they_do_not_run() -> None:
    with_heads = preset_config("micro", vocab_size=100, pad_token_id=0, eos_token_id=1, mtp=3)
    assert flops_of(with_heads) == flops_of(preset_config("micro", vocab_size=100, pad_token_id=0, eos_token_id=1))


@pytest.mark.parametrize(("length", "window"), [(7, None), (7, 3), (3, 3), (3, 9), (100, 1)])
def test_mean_keys_are_those_of_a_causal_mask(length: int, window: int | None) -> None:
    seen = [min(t, window or t) for t in range(1, length + 1)]
    assert mean_keys(length, window) == pytest.approx(sum(seen) / length)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10", None),
    ],
)
def test_peak_is_that_of_the_named_card_or_unknown(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


def test_a_counter_sums_forwards_and_backwards_and_starts_again() -> None:
    counter = FlopCounter(ForwardFlops(10, ((3, None),)))
    one = 4 * (20 + 12 * 2.5)  # four tokens that see 2.5 keys on average
    counter.add((4,), backward=False)
    counter.add((4, 4), backward=True)
    assert counter.take() == one + 3 * 2 * one
    assert counter.take() == 0
    frozen = FlopCounter(ForwardFlops(10, ()), backward=1.0)
    frozen.add((5,), backward=True)
    assert frozen.take() == 2 * 5 * 20


def test_facts_of_a_dense_model_with_one_table() -> None:
    config = Qwen3Config(**DENSE, tie_word_embeddings=True, max_position_embeddings=77)
    with torch.device("meta"):
        facts = facts_of(AutoModelForCausalLM.from_config(config))
    matrices = 2 * (8 * 24 + 2 * 8 * 12 + 24 * 8 + 3 * 8 * 24)
    norms = 2 * (2 * 8 + 2 * 6) + 8
    assert facts == Facts(
        parameters=matrices + 50 * 8 + norms,
        learning=matrices + 50 * 8 + norms,
        matrices=matrices,
        forward=ForwardFlops(matrices + 50 * 8, ((24, None), (24, None))),
        moe_layers=0,
        experts=0,
        top_k=0,
        windows=(None, None),
        kv_numbers=2 * 2 * 6,
        vocabulary=50,
        positions=77,
    )
    assert facts.kv_bytes(10, 2) == 2 * 10 * 24 * 2
    assert facts.expert_bytes == 0


def test_facts_of_step_with_draft_heads_that_are_frozen_or_learn() -> None:
    model = build_shape("micro", None, mtp=2)
    facts = facts_of(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    full, sliding = 2 * 64 * 64 + 2 * 64 * 32 + 64 * 4, 2 * 64 * 96 + 2 * 64 * 32 + 64 * 6
    hidden = full + 3 * 64 * 128 + 3 * (sliding + 8 * 64 + 9 * 3 * 64 * 16)
    trunk = hidden + 2 * 103 * 64 + 4 * (2 * 64 + 2 * 16) + 64
    head = 64 * 128 + sliding + 3 * 64 * 128 + 103 * 64  # its matrices
    heads = 2 * (head + 5 * 64 + 2 * 16)
    assert (facts.parameters, facts.learning, facts.matrices) == (trunk + heads, trunk, hidden)
    assert (facts.moe_layers, facts.experts, facts.top_k, facts.expert_bytes) == (3, 8, 2, 6)
    assert (facts.windows, facts.positions) == ((None, 16, 16, 16), 1024)
    assert facts.kv_bytes(100, 4) == (100 + 3 * 16) * 2 * 2 * 16 * 4
    assert facts.kv_bytes(9, 4) == 4 * 9 * 2 * 2 * 16 * 4
    let_drafts_learn(model, True)
    facts = facts_of(model)
    assert (facts.parameters, facts.learning, facts.matrices) == (trunk + heads, trunk + heads, hidden + 2 * head)


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_facts_of_stock_moes(family: str, layers: int) -> None:
    model = model_of(family)
    facts = facts_of(model)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert (facts.moe_layers, facts.experts, facts.top_k) == (layers, EXPERTS.get(family, 6), 2)
    assert facts.expert_bytes == 2 * layers
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    looked_up = 0 if family == "ernie" else model.get_input_embeddings().weight.numel()  # Ernie's is the output's too
    idle = experts - experts // facts.experts * 2
    assert facts.forward.parameters == facts.parameters - vectors - looked_up - idle


def test_windows_of_every_layer_or_of_those_that_slide() -> None:
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 3}
    assert windows_of(MistralConfig(**sizes, sliding_window=5)) == (5, 5, 5)
    assert windows_of(MistralConfig(**sizes, sliding_window=None)) == (None, None, None)
    kinds = ["full_attention", "sliding_attention", "linear_attention"]
    assert windows_of(Qwen3Config(**sizes, layer_types=kinds, use_sliding_window=True, sliding_window=7)) == (
        *(None, 7, None),
    )


def test_matrices_of_a_critic_are_those_of_its_layers() -> None:
    critic = Critic.from_policy(model_of("qwen"), 0.1, seed=0)
    critic.backbone.layers[0].requires_grad_(False)
    expected = {id(p) for p in critic.backbone.layers[1].parameters() if p.ndim >= 2}
    assert {id(p) for p in hidden_matrices(critic)} == expected
    assert {p.ndim for p in hidden_matrices(critic)} == {2, 3}
