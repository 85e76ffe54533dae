"""Router replay on stock models: other experts, weights from the model's own logits, and a router that still learns."""

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from model.moe.replay import RouterReplay, laid_out
from model.moe.routers import RoutingRecorder, find_routers
from support.moes import FAMILIES, SIGMOID, SMALL, model_of

IDS = torch.randint(5, 45, (2, 9), generator=torch.Generator().manual_seed(0))


def other_experts(model: nn.Module) -> Tensor:
    """[L, 18, k]: of each token the experts after those that it would activate."""
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=IDS)
        experts = recorder.take().experts
    return (experts + 1) % find_routers(model)[0].experts


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_own_experts_replayed_change_nothing(family: str, layers: int) -> None:
    model = model_of(family)
    plain = model(input_ids=IDS).logits
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=IDS)
        experts = recorder.take().experts
    with RouterReplay(model) as replay:
        replay.set(experts)
        assert torch.allclose(model(input_ids=IDS).logits, plain, atol=1e-6)


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_replayed_experts_are_activated_with_the_weights_that_the_router_would_give_them(
    family: str, layers: int
) -> None:
    model = model_of(family)
    experts = other_experts(model)
    expected: list[Tensor] = []

    def weigh(module: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        """The definition, from the configuration: what the recorder and the replay must find out for themselves."""
        logits, config = output[0].float(), model.config
        scores = logits.sigmoid() if family in SIGMOID else logits.softmax(-1)
        chosen = scores.gather(1, experts[len(expected)].long())
        if family in (*SIGMOID, "mixtral", "ernie") or config.norm_topk_prob:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        expected.append(chosen * (config.routed_scaling_factor if family in ("deepseek", "glm") else 1.0))

    seen: list[tuple[Tensor, Tensor]] = []
    handles = [router.module.register_forward_hook(weigh) for router in find_routers(model)]
    with torch.no_grad(), RouterReplay(model) as replay:
        replay.set(experts)
        handles += [
            router.module.register_forward_hook(lambda m, a, output: seen.append(output[1:]))
            for router in find_routers(model)
        ]
        replayed = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    assert len(seen) == layers
    for (weights, activated), wanted, ids in zip(seen, expected, experts, strict=True):
        assert torch.equal(activated.long(), ids.long())
        assert torch.allclose(weights, wanted, atol=1e-6)
    plain = model(input_ids=IDS).logits  # and outside of the block it is itself again
    assert (plain - replayed).abs().max() > 1e-3
    assert torch.equal(plain, model(input_ids=IDS).logits)


def test_the_router_still_learns_and_only_from_the_weights_of_the_replayed_experts() -> None:
    model = model_of("step")
    experts = torch.zeros_like(other_experts(model)) + torch.tensor([2, 5], dtype=torch.uint8)
    with RouterReplay(model) as replay:
        replay.set(experts)
        model(input_ids=IDS).logits.square().sum().backward()
    for router in find_routers(model):
        moved = router.module.weight.grad.abs().sum(1) > 0
        assert moved.nonzero()[:, 0].tolist() == [2, 5]


def test_tokens_that_are_not_known_choose_for_themselves() -> None:
    model = model_of("step")
    experts = other_experts(model)
    plain = model(input_ids=IDS[:, :4]).logits
    known = torch.zeros(8, dtype=torch.bool)
    with torch.no_grad(), RouterReplay(model) as replay:
        replay.set(experts[:, :8], known)
        assert torch.allclose(model(input_ids=IDS[:, :4]).logits, plain, atol=1e-6)
        known[3] = True  # the last of the first sequence: nothing else may change
        replay.set(experts[:, :8], known)
        changed = ((model(input_ids=IDS[:, :4]).logits - plain).abs() > 1e-4).any(-1)
    assert changed.tolist() == [[False, False, False, True], [False] * 4]


def test_the_recorder_tells_the_activated_experts_from_those_of_the_router() -> None:
    model = model_of("step")
    free, known = other_experts(model), torch.ones(18, dtype=torch.bool)
    with torch.no_grad(), RouterReplay(model) as replay, RoutingRecorder(model) as recorder:
        replay.set(free, known)
        model(input_ids=IDS)
        seen = recorder.take(replayed=(free, known))
    assert torch.equal(seen.experts, free)
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=IDS)
        plain = recorder.take()
    # Nothing before the first router has changed.
    assert torch.equal(seen.own[0], plain.own[0])
    assert (seen.confidence[0] < plain.confidence[0]).any()


def test_gradient_checkpointing_replays_the_same_experts_again() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = model_of("step").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        experts = other_experts(model)
        with RouterReplay(model) as replay:
            replay.set(experts)
            model(input_ids=IDS).logits.square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert torch.allclose(plain, checkpointed, atol=1e-6)


def test_padding_is_not_replayed() -> None:
    long, short = torch.ones(5, 3, 2, dtype=torch.uint8), torch.full((2, 3, 2), 7, dtype=torch.uint8)
    experts, known = laid_out([long, short], [6, 6], torch.device("cpu"))
    assert experts.shape == (3, 12, 2)
    assert known.tolist() == [True] * 5 + [False] + [True] * 2 + [False] * 4
    assert torch.equal(experts[:, :5], long.transpose(0, 1))
    assert torch.equal(experts[:, 6:8], short.transpose(0, 1))


def test_what_cannot_be_replayed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"router\.replay: the model has no routers"):
        RouterReplay(LlamaForCausalLM(LlamaConfig(**SMALL)))
    with RouterReplay(model_of("step")) as replay, pytest.raises(ValueError, match="4 MoE layers"):
        replay.set(torch.zeros(4, 18, 2, dtype=torch.uint8))
