"""Finding routers, recording what they do, float32 under autocast."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.critic import Critic
from model.moe.routers import RoutingRecorder, find_routers, keep_router_fp32
from support.moes import BIASED, FAMILIES, SIGMOID, SMALL, model_of


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_the_recorder_sees_each_moe_layer_of_stock_models(family: str, layers: int) -> None:
    model = model_of(family)
    assert len(find_routers(model)) == layers
    ids = torch.randint(5, 45, (2, 9))
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=ids)
        model(input_ids=ids[:, :4])
        seen = recorder.take(margin=True)
        assert recorder.take() is None
    assert seen is not None
    assert seen.confidence.shape == (layers, 2 * 9 + 2 * 4)
    assert seen.experts.shape == (layers, 26, 2)
    assert seen.experts.dtype == torch.uint8
    assert ((seen.confidence > 0) & (seen.confidence <= 1)).all()
    assert torch.equal(seen.own, seen.experts)
    assert seen.margin is not None
    assert seen.margin.shape == seen.confidence.shape
    assert (seen.margin >= 0).all()
    with torch.no_grad():
        model(input_ids=ids)
    assert recorder.take() is None  # outside the block nothing is watched


@pytest.mark.parametrize("family", BIASED)
def test_the_margin_is_that_of_the_selection_with_its_bias(family: str) -> None:
    model = model_of(family)
    logits: list[Tensor] = []
    for router in find_routers(model):
        torch.nn.init.normal_(router.bias)
        router.module.register_forward_hook(lambda m, a, output: logits.append(output[0].float()))
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=torch.randint(5, 45, (2, 9)))
        seen = recorder.take(margin=True)
    for router, logits_tE, margin_t in zip(find_routers(model), logits, seen.margin, strict=True):
        scores = logits_tE.sigmoid() if family in SIGMOID else logits_tE.softmax(-1)
        best = (scores + router.bias).sort(descending=True).values
        assert torch.allclose(margin_t, best[:, 1] - best[:, 2], atol=1e-6)
        free = scores.sort(descending=True).values
        assert not torch.allclose(margin_t, free[:, 1] - free[:, 2], atol=1e-2)


def test_a_dense_model_has_no_routing() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    assert find_routers(model) == []
    with RoutingRecorder(model) as recorder:
        model(input_ids=torch.tensor([[1, 2]]))
        assert recorder.take() is None


def router_outputs(model: nn.Module, body: object) -> list[torch.dtype]:
    dtypes: list[torch.dtype] = []
    handles = [
        r.module.register_forward_hook(lambda m, a, out: dtypes.append(out[0].dtype)) for r in find_routers(model)
    ]
    body()  # type: ignore[operator]
    for handle in handles:
        handle.remove()
    return dtypes


@pytest.mark.parametrize("family", ["step", "qwen", "ernie", "minimax"])
def test_routers_stay_float32_under_autocast_and_after_conversion(family: str) -> None:
    model = model_of(family)
    ids = torch.randint(5, 45, (2, 9))
    keep_router_fp32(model)
    keep_router_fp32(model)  # harmless twice
    exact = model(input_ids=ids).logits

    def under_autocast() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        assert logits.dtype == torch.bfloat16
        assert 0 < (logits - exact).norm() / exact.norm() < 0.1

    assert set(router_outputs(model, under_autocast)) == {torch.float32}
    model.bfloat16()
    keep_router_fp32(model)
    assert set(router_outputs(model, lambda: model(input_ids=ids))) == {torch.float32}
    assert all(router.bias is None or router.bias.dtype == torch.float32 for router in find_routers(model))


def test_a_copy_of_a_model_routes_with_its_own_weights() -> None:
    model = model_of("step")
    keep_router_fp32(model)
    other = copy.deepcopy(model)
    ids = torch.randint(5, 45, (1, 5))
    before = model(input_ids=ids).logits
    for router in find_routers(other):
        torch.nn.init.zeros_(router.module.weight)
    assert torch.equal(model(input_ids=ids).logits, before)
    assert not torch.equal(other(input_ids=ids).logits, before)


def test_the_critic_has_a_backbone_of_its_own_and_reads_where_it_is_told() -> None:
    policy = model_of("step")
    critic = Critic.from_policy(policy, 0.1, seed=0).eval()
    ids = torch.randint(5, 45, (3, 8))
    rows, columns = torch.tensor([0, 2, 2]), torch.tensor([7, 0, 3])
    with torch.no_grad():
        values = critic(ids, rows, columns)
        hidden = policy.model(input_ids=ids).last_hidden_state
        expected = critic.value_head(hidden)[rows, columns]
    assert values.dtype == torch.float32
    assert torch.allclose(values, expected, atol=1e-6)
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}
    assert not shared


def test_the_critic_starts_near_0_and_its_head_stays_float32_under_autocast() -> None:
    critic = Critic.from_policy(model_of("step"), 1e-5, seed=0)
    place = torch.tensor([0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = critic(torch.tensor([[7, 8]]), place, place)
    assert value.dtype == torch.float32
    assert value.abs().max() < 1e-2
    assert critic.value_head.bias.item() == 0.0
