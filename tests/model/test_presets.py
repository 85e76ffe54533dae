"""The presets' structure, and `flash` against the published numbers of Step 3.5 Flash."""

import math

import pytest
import torch
from torch import nn
from transformers.models.step3p7.modeling_step3p7 import Step3p7MLP, Step3p7RotaryEmbedding, Step3p7SparseMoeBlock

from model.presets import PRESETS, VOCABULARY, preset_config
from model.step.step import StepForCausalLM


def build(name: str, vocab_size: int = 104) -> StepForCausalLM:
    """Without memory for its weights."""
    with torch.device("meta"):
        return StepForCausalLM(preset_config(name, vocab_size=vocab_size, pad_token_id=0, eos_token_id=1))


def size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def active(model: StepForCausalLM) -> int:
    """Parameters that a token goes through, without the embeddings of input and output."""
    config = model.config
    blocks = [layer.mlp for layer in model.model.layers if isinstance(layer.mlp, Step3p7SparseMoeBlock)]
    idle = sum(size(block.experts) for block in blocks) * (1 - config.num_experts_per_tok / config.n_routed_experts)
    return round(size(model) - size(model.lm_head) - size(model.model.embed_tokens) - idle)


@pytest.fixture(scope="module")
def flash() -> StepForCausalLM:
    return build("flash", VOCABULARY)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_structure(name: str) -> None:
    """Dense layers first, three sliding layers to a full one with other head counts, shared expert, head gate."""
    preset, model = PRESETS[name], build(name)
    layers = model.model.layers
    assert model.config.mlp_layer_types == ["dense"] * preset.dense + ["sparse"] * (preset.layers - preset.dense)
    for number, layer in enumerate(layers):
        full = number % 4 == 0
        attention = layer.self_attn
        heads = preset.heads_full if full else preset.heads_sliding
        assert layer.attention_type == ("full_attention" if full else "sliding_attention")
        assert attention.sliding_window == (None if full else preset.window)
        assert attention.q_proj.out_features == heads * preset.head_dim
        assert attention.k_proj.out_features == preset.kv_heads * preset.head_dim
        assert attention.g_proj.out_features == heads
        if number < preset.dense:
            assert isinstance(layer.mlp, Step3p7MLP)
        else:
            assert layer.mlp.experts.num_experts == preset.experts
            assert layer.mlp.shared_experts.up_proj.out_features == preset.expert_ffn
            assert layer.mlp.gate.e_score_correction_bias.shape == (preset.experts,)


@pytest.mark.parametrize(
    ("name", "total", "used"),
    [("tiny", 1.68e6, 0.77e6), ("small", 93.2e6, 27.0e6), ("base", 1.02e9, 0.172e9), ("flash", 196.96e9, 10.93e9)],
)
def test_presets_have_the_size_that_the_docs_promise(name: str, total: float, used: float) -> None:
    model = build(name, VOCABULARY if name == "flash" else 104)
    assert size(model) == pytest.approx(total, rel=0.003)
    assert active(model) == pytest.approx(used, rel=0.003)


def test_flash_has_the_published_layers(flash: StepForCausalLM) -> None:
    config, layers = flash.config, flash.model.layers
    kinds = "".join(kind[0].upper() for kind in config.layer_types)
    assert kinds == "F" + "SSSF" * 11
    assert (kinds.count("F"), kinds.count("S")) == (12, 33)
    assert [kind == "sparse" for kind in config.mlp_layer_types] == [False] * 3 + [True] * 42
    assert {layer.self_attn.q_proj.weight.shape for layer in layers} == {(64 * 128, 4096), (96 * 128, 4096)}
    assert layers[0].mlp.gate_proj.weight.shape == (11264, 4096)
    assert layers[3].mlp.experts.gate_up_proj.shape == (288, 2 * 1280, 4096)
    assert layers[3].mlp.gate.top_k == 8
    assert layers[3].mlp.routed_scaling_factor == 3.0
    assert (config.sliding_window, config.vocab_size, config.max_position_embeddings) == (512, 128_896, 262_144)
    assert (config.rms_norm_eps, flash.lm_head.weight.shape) == (1e-5, (128_896, 4096))


def test_flash_clips_its_last_experts_only(flash: StepForCausalLM) -> None:
    blocks = {i: layer.mlp for i, layer in enumerate(flash.model.layers) if i >= 3}
    assert {i: b.experts.limit for i, b in blocks.items() if b.experts.limit < math.inf} == {43: 7.0, 44: 7.0}
    assert {i: b.shared_experts.limit for i, b in blocks.items() if b.shared_experts.limit < math.inf} == {44: 16.0}
    assert all(flash.model.layers[i].mlp.limit == math.inf for i in range(3))


def test_flash_rotates_half_a_head_with_a_longer_period_where_it_sees_everything(flash: StepForCausalLM) -> None:
    """And there slow frequencies are halved: its context was doubled from 131,072 tokens by Llama 3's rule."""
    rotary = Step3p7RotaryEmbedding(flash.config)
    sliding, full = rotary.sliding_attention_inv_freq, rotary.full_attention_inv_freq
    assert torch.allclose(sliding, 1e4 ** (-torch.arange(64) / 64.0))
    plain = 5e6 ** (-torch.arange(32) / 32.0)
    turns = 131_072 * plain / (2 * math.pi)
    smooth = ((turns - 1) / 31).clamp(0, 1)
    assert torch.allclose(full, plain * (smooth + (1 - smooth) / 2), rtol=1e-5)
    assert (full[0], full[-1] / plain[-1]) == (1.0, 0.5)


def test_smaller_presets_do_not_clip_or_stretch() -> None:
    for name in ("micro", "tiny", "small", "base"):
        config = preset_config(name, vocab_size=104, pad_token_id=0, eos_token_id=1)
        assert config.swiglu_limits is None
        assert {rope["rope_type"] for rope in config.rope_parameters.values()} == {"default"}
