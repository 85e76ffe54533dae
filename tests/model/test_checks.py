"""Checkpoints that hold other tensors than their model, or ask for another model, are refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.build import build_policy
from model.tokenizer import character_tokenizer
from support.step_files import WEIGHTS, changed


def test_mtp_tensors_are_those_that_the_config_announces(micro: Path, tmp_path: Path) -> None:
    path = changed(micro, tmp_path, **{"model.layers.4.enorm.weight": torch.zeros(64)})
    config = json.loads((path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"holds 1 tensors .*: model\.layers\.4\.enorm\.weight"):
        build_policy(None, str(path))
    (path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    with pytest.raises(ValueError, match=r"lacks \d+ tensors .*: model\.layers\.4\.eh_proj\.weight"):
        build_policy(None, str(path))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.2.moe.router_bias", None, r"lacks 1 tensors of StepForCausalLM: {}"),
        ("model.layers.1.moe.up_proj.weight", None, r"lacks 1 tensors of StepForCausalLM: {}"),
        ("lm_head.weight", None, r"lacks 1 tensors of StepForCausalLM: {}"),
        ("model.layers.9.moe.gate.weight", torch.zeros(8, 64), r"holds 1 tensors that StepForCausalLM does not .*: {}"),
        ("model.layers.1.moe.up_proj.weight", torch.zeros(8, 17, 64), r"{} is \[8, 17, 64\] instead of \[8, 16, 64\]"),
        ("model.layers.1.moe.gate_proj.weight", torch.zeros(8, 16, 9), r"{} is \[8, 16, 9\] instead of \[8, 16, 64\]"),
        ("model.norm.weight", torch.zeros(63), r"{} is \[63\] instead of \[64\]"),
    ],
)
def test_a_tensor_that_is_missing_or_too_many_or_misshapen_is_named(
    micro: Path, tmp_path: Path, name: str, tensor: Tensor | None, words: str
) -> None:
    path = changed(micro, tmp_path, **{name: tensor})
    with pytest.raises(ValueError, match=r"^model\.path: .*" + words.format(name.replace(".", r"\."))):
        build_policy(None, str(path))


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, r"lacks 1 tensors of Qwen2ForCausalLM: {}"),
        ("model.layers.7.mlp.up_proj.weight", torch.zeros(2), r"holds 1 tensors that Qwen2ForCausalLM .*: {}"),
        ("model.norm.weight", torch.zeros(7), r"{} is \[7\] instead of \[8\]"),
    ],
)
def test_odd_tensors_of_other_families_are_named_too(
    tmp_path: Path, name: str, tensor: Tensor | None, words: str
) -> None:
    shape = Qwen2Config(
        vocab_size=103,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(shape).save_pretrained(tmp_path)
    character_tokenizer().save_pretrained(tmp_path)
    build_policy(None, str(tmp_path))
    weights = load_file(tmp_path / WEIGHTS) | {name: tensor}
    save_file({n: t for n, t in weights.items() if t is not None}, tmp_path / WEIGHTS, {"format": "pt"})
    with pytest.raises(ValueError, match=words.format(name.replace(".", r"\."))):
        build_policy(None, str(tmp_path))


def test_a_config_that_asks_for_another_model_is_refused(micro: Path, tmp_path: Path) -> None:
    path = changed(micro, tmp_path)
    config = json.loads((path / "config.json").read_text()) | {"moe_router_activation": "softmax"}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="moe_router_activation is 'softmax', StepForCausalLM computes 'sigmoid'"):
        build_policy(None, str(path))
