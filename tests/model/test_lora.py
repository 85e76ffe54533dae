"""Adapters: what learns, what is frozen, and that merging them changes nothing."""

import pytest
import torch

from model.build import build_policy, build_shape
from model.lora import MergedWeights, adapter_parameters, add_lora, has_lora, load_trained, trained
from model.moe.routers import find_routers

IDS = torch.arange(7, 27)[None]


def adapted(dtype: torch.dtype = torch.float32, targets: tuple[str, ...] = ()) -> torch.nn.Module:
    policy, _ = build_policy("micro", None, seed=0)
    add_lora(policy, 4, 8.0, targets, dtype, seed=1)
    return policy


def test_a_new_adapter_changes_nothing_and_alone_learns() -> None:
    plain, _ = build_policy("micro", None, seed=0)
    policy = adapted()
    assert not has_lora(plain)
    assert has_lora(policy)
    assert torch.equal(policy(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    learning = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert len(learning) > 40
    assert all(".lora_" in name for name in learning)
    assert not any("experts.gate_up" in name or "lm_head" in name or ".mlp.gate." in name for name in learning)


def test_merged_weights_are_those_of_a_plain_model_with_the_same_output() -> None:
    policy = adapted()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(0, 0.1)
    plain, _ = build_policy("micro", None, seed=7)
    before = plain(input_ids=IDS).logits
    plain.load_state_dict(dict(MergedWeights(policy, policy.state_dict())))
    assert torch.allclose(plain(input_ids=IDS).logits, policy(input_ids=IDS).logits, atol=1e-5)
    assert not torch.allclose(before, policy(input_ids=IDS).logits, atol=1e-2)


def test_in_bf16_adapters_and_routers_stay_float32() -> None:
    policy = adapted(torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)
    assert all(p.dtype == torch.float32 for router in find_routers(policy) for p in router.module.parameters())
    assert policy.lm_head.weight.dtype == torch.bfloat16
    assert MergedWeights(policy, policy.state_dict())["model.layers.1.self_attn.q_proj.weight"].dtype == torch.bfloat16


def test_every_rank_starts_with_the_same_adapters() -> None:
    first = trained(adapted(), adapted().state_dict())
    torch.manual_seed(99)
    second = adapted()
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.items())


def test_chosen_targets_and_a_typo() -> None:
    policy = adapted(targets=("q_proj", "v_proj"))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name, p in policy.named_parameters() if p.requires_grad}
    assert names == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r"model\.lora\.targets: .*q_prj"):
        adapted(targets=("q_prj",))


@pytest.mark.parametrize("targets", [(), ("q_proj", "v_proj"), ("self_attn.q_proj",), ("lm_head",)])
@pytest.mark.parametrize("mtp", [0, 1])
def test_adapters_are_counted_before_they_are_there(targets: tuple[str, ...], mtp: int) -> None:
    policy, _ = build_policy("micro", None, mtp=mtp)
    counted = adapter_parameters(build_shape("micro", None, mtp=mtp), 4, targets)
    add_lora(policy, 4, 8.0, targets, torch.float32, seed=1)
    assert counted == sum(p.numel() for p in policy.parameters() if p.requires_grad) > 0


def test_adapters_of_other_layers_are_refused() -> None:
    few = adapted(targets=("q_proj",))
    with pytest.raises(ValueError, match=r"model\.lora: the checkpoint has other adapters"):
        load_trained(adapted(), trained(few, few.state_dict()))
