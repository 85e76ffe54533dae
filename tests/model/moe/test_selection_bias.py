"""The selection bias evens the load out and leaves the weights alone; frozen routers stay."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from model.build import build_policy
from model.moe.balance import freeze_routers, update_bias
from model.moe.routers import RoutingRecorder, find_routers

IDS = torch.randint(5, 90, (8, 64), generator=torch.Generator().manual_seed(3))


def qwen() -> PreTrainedModel:
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads))


def load_of(model: PreTrainedModel) -> Tensor:
    """Tokens by layer and expert, [L, E]."""
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=IDS)
        experts = recorder.take().experts.long()
    return torch.stack([torch.bincount(layer.flatten(), minlength=8) for layer in experts])


def test_each_expert_moves_by_the_rate_towards_the_mean() -> None:
    model, _ = build_policy("micro", None)
    load = torch.tensor([[9, 1, 5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 0, 0, 40], [5] * 8])
    update_bias(model, load, 0.01)
    update_bias(model, load, 0.01)
    biases = [router.module.e_score_correction_bias for router in find_routers(model)]
    assert torch.allclose(biases[0], torch.tensor([-0.02, 0.02, 0, 0, 0, 0, 0, 0]))
    assert torch.allclose(biases[1], torch.tensor([0.02] * 7 + [-0.02]))
    assert not biases[2].any()


def test_the_load_gets_more_even_update_by_update() -> None:
    model, _ = build_policy("micro", None, seed=1)
    spread = []
    for _ in range(60):
        load = load_of(model)
        spread.append((load.double().std(1) / load.double().mean(1)).mean().item())
        update_bias(model, load, 0.003)
    assert spread[0] > 0.3
    assert spread[-1] < spread[0] / 3
    assert spread[30] < spread[10] < spread[0]


def test_the_bias_chooses_but_does_not_weigh() -> None:
    model, _ = build_policy("micro", None)
    router = find_routers(model)[0].module
    hidden = torch.randn(20, model.config.hidden_size)
    update_bias(model, torch.tensor([[100, 0, 0, 0, 0, 0, 0, 0]] * 3), 10.0)
    logits, weights, indices = router(hidden)
    assert not (indices == 0).any()
    scores = logits.sigmoid().gather(1, indices)
    assert torch.allclose(weights, scores / scores.sum(-1, keepdim=True))


def test_it_survives_a_checkpoint_and_gets_no_gradient() -> None:
    model, _ = build_policy("micro", None)
    update_bias(model, torch.arange(24).view(3, 8), 0.01)
    name = f"{find_routers(model)[0].name}.e_score_correction_bias"
    assert model.state_dict()[name].any()
    assert name not in dict(model.named_parameters())


def test_routers_without_a_bias_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"router\.bias_update_rate: model\.layers\.0\.mlp\.gate has no selection bias"
    ):
        update_bias(qwen(), torch.zeros(2, 6), 0.01)
    with pytest.raises(ValueError, match=r"router\.bias_update_rate: the model has no routers"):
        update_bias(torch.nn.Linear(2, 2), torch.zeros(0, 0), 0.01)


@pytest.mark.parametrize("family", ["step", "qwen"])
def test_frozen_routers_get_no_gradient_and_all_else_does(family: str) -> None:
    model = qwen() if family == "qwen" else build_policy("micro", None)[0]
    freeze_routers(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    frozen = {id(p) for router in find_routers(model) for p in router.module.parameters()}
    assert len(frozen) == len(find_routers(model)) > 0
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (id(parameter) in frozen), name
