"""FLOPs of small models, counted by hand."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from model.facts import FlopCounter, ForwardFlops, count_flops, mean_keys, peak_flops
from model.presets import preset_config

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


def test_draft_heads_cost_nothing_since_nobody_runs_them() -> None:
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


def test_a_counter_sums_forwards_and_backwards_and_begins_anew() -> None:
    counter = FlopCounter(ForwardFlops(10, ((3, None),)))
    one = 4 * (20 + 12 * 2.5)  # four tokens that see 2.5 keys on average
    counter.add((4,), backward=False)
    counter.add((4, 4), backward=True)
    assert counter.take() == one + 3 * 2 * one
    assert counter.take() == 0
    frozen = FlopCounter(ForwardFlops(10, ()), backward=1.0)
    frozen.add((5,), backward=True)
    assert frozen.take() == 2 * 5 * 20
