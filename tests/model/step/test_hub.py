"""The released layout: tensor names, config.json, and a way there and back that changes no bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import WeightRenaming, revert_weight_conversion
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from model.build import build_policy
from model.moe.routers import find_routers, keep_router_fp32
from model.step.hub import mtp_renamings, released_config, released_names
from model.step.step import StepForCausalLM
from support.step_files import VARIANTS, WEIGHTS, saved, variant


@pytest.mark.parametrize(
    ("ours", "released"),
    [
        ("model.embed_tokens.weight", ["model.embed_tokens.weight"]),
        ("lm_head.weight", ["lm_head.weight"]),
        ("model.layers.0.mlp.gate_proj.weight", ["model.layers.0.mlp.gate_proj.weight"]),
        ("model.layers.7.self_attn.g_proj.weight", ["model.layers.7.self_attn.g_proj.weight"]),
        ("model.layers.7.mlp.gate.weight", ["model.layers.7.moe.gate.weight"]),
        ("model.layers.7.mlp.gate.e_score_correction_bias", ["model.layers.7.moe.router_bias"]),
        (
            "model.layers.7.mlp.experts.gate_up_proj",
            ["model.layers.7.moe.gate_proj.weight", "model.layers.7.moe.up_proj.weight"],
        ),
        ("model.layers.7.mlp.experts.down_proj", ["model.layers.7.moe.down_proj.weight"]),
        ("model.layers.7.mlp.shared_experts.up_proj.weight", ["model.layers.7.share_expert.up_proj.weight"]),
        ("mtp.layers.0.enorm.weight", ["model.layers.45.enorm.weight"]),
        ("mtp.layers.1.hnorm.weight", ["model.layers.46.hnorm.weight"]),
        ("mtp.layers.2.eh_proj.weight", ["model.layers.47.eh_proj.weight"]),
        ("mtp.layers.2.norm.weight", ["model.layers.47.transformer.shared_head.norm.weight"]),
        ("mtp.layers.2.head.weight", ["model.layers.47.transformer.shared_head.output.weight"]),
        ("mtp.layers.1.block.self_attn.q_norm.weight", ["model.layers.46.self_attn.q_norm.weight"]),
        ("mtp.layers.1.block.mlp.down_proj.weight", ["model.layers.46.mlp.down_proj.weight"]),
        ("mtp.layers.1.block.input_layernorm.weight", ["model.layers.46.input_layernorm.weight"]),
        ("mtp.layers.1.block.post_attention_layernorm.weight", ["model.layers.46.post_attention_layernorm.weight"]),
    ],
)
def test_each_tensor_has_its_released_name(ours: str, released: list[str]) -> None:
    assert list(released_names(ours, 45)) == released
    for name in released:
        assert released_names(name, 45) == (name,)


def test_the_mtp_renamings_lead_back_to_our_names() -> None:
    config = Step3p7TextConfig(num_hidden_layers=4, num_nextn_predict_layers=3)
    renamings = [WeightRenaming(old, new) for old, new in mtp_renamings(config).items()]
    parts = ["enorm", "hnorm", "eh_proj", "norm", "head", "block.self_attn.o_proj", "block.mlp.up_proj"]
    for ours in (f"mtp.layers.{i}.{part}.weight" for i in range(3) for part in parts):
        (name,) = released_names(ours, 4)
        for renaming in renamings:
            name, _ = renaming.rename_source_key(name)
        assert name == ours
    assert not mtp_renamings(Step3p7TextConfig(num_hidden_layers=4))


@pytest.mark.parametrize("name", VARIANTS)
def test_saving_loading_and_saving_again_changes_no_bit_of_the_files(name: str, tmp_path: Path) -> None:
    first = variant(name)
    first.save_pretrained(tmp_path / "first")
    second = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert type(second) is StepForCausalLM
    second.save_pretrained(tmp_path / "second")
    before, after = (load_file(tmp_path / x / WEIGHTS) for x in ("first", "second"))
    assert before.keys() == after.keys() == {r for n in first.state_dict() for r in released_names(n, 4)}
    for tensor in before:
        assert torch.equal(before[tensor], after[tensor]), tensor
        assert before[tensor].dtype == after[tensor].dtype, tensor
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "first" / file).read_text() == (tmp_path / "second" / file).read_text()
    one, other = first.config.to_dict(), second.config.to_dict()  # the other also has the released keys
    for field in one.keys() - {"_name_or_path", "mtp_layer_types", "mtp_mlp_layer_types"}:
        assert one[field] == other[field], field
    ids = torch.arange(5, 45)[None]
    with torch.no_grad():
        assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)


def test_experts_are_split_into_gate_and_up(micro: Path) -> None:
    joined = variant("as it is").state_dict()["model.layers.1.mlp.experts.gate_up_proj"]
    weights = load_file(micro / WEIGHTS)
    gate, up = (weights[f"model.layers.1.moe.{side}_proj.weight"] for side in ("gate", "up"))
    assert gate.shape == (8, 16, 64)
    assert torch.equal(torch.cat([gate, up], 1), joined)


def test_a_checkpoint_in_many_files_is_the_same(micro: Path, tmp_path: Path) -> None:
    model = variant("as it is")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(files) > 3
    parts = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(micro / WEIGHTS)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_splitting_the_experts_copies_nothing_before_a_file_is_written() -> None:
    model = variant("as it is")
    weights = model.state_dict()
    split = revert_weight_conversion(model, dict(weights))
    joined = weights["model.layers.1.mlp.experts.gate_up_proj"]
    for side in ("gate", "up"):
        half = split[f"model.layers.1.moe.{side}_proj.weight"]
        assert half.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()


def test_the_config_file_is_the_released_one(micro: Path) -> None:
    config = json.loads((micro / "config.json").read_text())
    expected = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "auto_map": {"AutoModelForCausalLM": "step.StepForCausalLM"},
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 16,
            "true_head_dim": 16,
        },
        "moe_layers_enum": "1,2,3",
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "rope_theta": [5e6, 1e4, 1e4, 1e4],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 1.0],
        "num_nextn_predict_layers": 0,
    }
    assert {key: config[key] for key in expected} == expected
    ours = {"rope_parameters", "per_layer_config", "mlp_layer_types", "n_routed_experts", "num_key_value_heads"}
    assert not ours & config.keys()


def test_lists_by_layer_go_on_over_the_mtp_layers() -> None:
    model = variant("limits")
    saved_by_transformers = model.config.to_dict() | {"num_nextn_predict_layers": 3}
    config = released_config(saved_by_transformers)
    assert config["layer_types"][4:] == ["sliding_attention"] * 3
    assert config["rope_theta"] == [5e6] + [1e4] * 6
    assert config["partial_rotary_factors"] == [0.5] + [1.0] * 6
    assert config["swiglu_limits"] == [None, 0.0, 0.0, 7.0, 0.0, 0.0, 0.0]
    assert config["moe_layers_enum"] == "1,2,3"
    again = Step3p7TextConfig(**config)
    assert again.mtp_layer_types == ["sliding_attention"] * 3
    assert again.mtp_mlp_layer_types == ["dense"] * 3
    assert again.layer_types == model.config.layer_types
    assert released_config(again.to_dict())["layer_types"] == config["layer_types"]


def test_a_released_directory_opens_without_what_we_add(micro: Path, tmp_path: Path) -> None:
    for name in (WEIGHTS, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((micro / name).read_bytes())
    ours = json.loads((micro / "config.json").read_text())
    released = {k: v for k, v in ours.items() if k not in ("auto_map", "dtype", "transformers_version", "max_seq_len")}
    released |= {"torch_dtype": "float32", "use_rope_layers": [], "use_mfa": False}
    released["auto_map"] = {"AutoConfig": "configuration_step3p5.Step3p5Config"}
    (tmp_path / "config.json").write_text(json.dumps(released))
    model, _ = build_policy(None, str(tmp_path))
    assert type(model) is StepForCausalLM
    expected = variant("as it is").state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_checkpoint_with_transformers_own_names_opens_and_is_saved_as_released(micro: Path, tmp_path: Path) -> None:
    """What mispo itself wrote before it wrote the released layout."""
    own = variant("as it is").state_dict()
    old = saved(variant("as it is"), tmp_path / "old")
    save_file({name: tensor.contiguous() for name, tensor in own.items()}, old / WEIGHTS, {"format": "pt"})
    model, _ = build_policy(None, str(old))
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    model.save_pretrained(tmp_path / "new")
    assert load_file(tmp_path / "new" / WEIGHTS).keys() == load_file(micro / WEIGHTS).keys()


def test_loaded_tensors_begin_where_torch_would_place_them(micro: Path) -> None:
    """Wherever the file has them: a resumed run rounds as the one that it continues."""
    loaded, _ = build_policy(None, str(micro))
    assert {tensor.data_ptr() % 64 for tensor in loaded.state_dict().values()} == {0}
    mapped = AutoModelForCausalLM.from_pretrained(micro)
    assert {tensor.data_ptr() % 64 for tensor in mapped.state_dict().values()} != {0}


def test_a_bfloat16_checkpoint_keeps_its_routers_in_float32(tmp_path: Path) -> None:
    model = variant("as it is")
    exact = {name: tensor.clone() for name, tensor in model.state_dict().items() if ".mlp.gate." in name}
    model.to(torch.bfloat16)
    keep_router_fp32(model)
    for router in find_routers(model):  # what bf16 has taken away, put back as a trainer's float32 copy would
        for part in ("weight", "e_score_correction_bias"):
            getattr(router.module, part).data.copy_(exact[f"{router.name}.{part}"])
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    kinds = {name: tensor.dtype for name, tensor in load_file(tmp_path / WEIGHTS).items()}
    assert {kinds[f"model.layers.{i}.moe.{x}"] for i in (1, 2, 3) for x in ("gate.weight", "router_bias")} == {
        torch.float32
    }
    assert kinds["model.layers.1.moe.gate_proj.weight"] == kinds["model.norm.weight"] == torch.bfloat16
    for dtype in ("auto", torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        weights = again.state_dict()
        assert all(torch.equal(weights[name], tensor) for name, tensor in exact.items())
        assert weights["model.layers.1.mlp.experts.gate_up_proj"].dtype == torch.bfloat16
        assert torch.isfinite(again(input_ids=torch.arange(5, 15)[None]).logits).all()


def test_uploading_while_saving_is_refused_since_the_config_would_be_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="push_to_hub"):
        variant("as it is").save_pretrained(tmp_path, push_to_hub=True)


def test_another_process_opens_it_generates_and_saves_it_again(micro: Path, tmp_path: Path) -> None:
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "out = model.generate(torch.arange(5, 25)[None], max_new_tokens=9, do_sample=False, eos_token_id=None)\n"
        "model.save_pretrained(sys.argv[2])\n"
        "assert not any(name.split('.')[0] in ('mispo', 'model', 'rollouts') for name in sys.modules)\n"
        "print(type(model).__name__, *out[0, 20:].tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(micro), str(tmp_path / "again")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=300,
        env={"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kind, *tokens = done.stdout.splitlines()[-1].split()
    ids = torch.arange(5, 25)[None]
    expected = variant("as it is").generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)[0, 20:]
    assert kind == "StepForCausalLM"
    assert [int(token) for token in tokens] == expected.tolist()
    before, after = (load_file(path / WEIGHTS) for path in (micro, tmp_path / "again"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
