"""What routers of each family are, and the form of their weights, recognised once."""

import copy
import math

import pytest
import torch

from model.moe import families
from model.moe.families import recognise
from model.moe.replay import RouterReplay
from model.moe.routers import RoutingRecorder, confidence_of, find_routers
from support.moes import BIASED, EXPERTS, FAMILIES, SIGMOID, model_of

IDS = torch.randint(5, 45, (2, 9), generator=torch.Generator().manual_seed(0))


def oracle(logits: list[float], chosen: list[int], kind: str) -> float:
    """Σ of the chosen experts' scores over Σ of all, in Python floats."""
    scores = [1 / (1 + math.exp(-x)) if kind == "sigmoid" else math.exp(x) for x in logits]
    return sum(scores[e] for e in chosen) / sum(scores)


@pytest.mark.parametrize("kind", ["sigmoid", "softmax"])
@pytest.mark.parametrize("normalised", [True, False])
def test_confidence_is_the_probability_mass_of_the_chosen_experts(kind: str, normalised: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(30, 8, generator=generator) * 2
    scores = logits.sigmoid() if kind == "sigmoid" else logits.softmax(-1)
    # The choice may follow another order than the scores (a correction bias): the definition does not care.
    indices = (scores + torch.rand(30, 8, generator=generator)).topk(3).indices
    weights = scores.gather(1, indices)
    if normalised:
        weights = 2.5 * weights / weights.sum(-1, keepdim=True)
    expected = [oracle(x, e, kind) for x, e in zip(logits.double().tolist(), indices.tolist(), strict=True)]
    form, sure = recognise(logits, weights, indices)
    assert sure
    assert (form.kind, form.normalised) == (kind, normalised)
    assert form.scale == pytest.approx(2.5 if normalised else 1.0, rel=1e-5)
    assert torch.allclose(form.weights(logits, indices), weights, atol=1e-6)
    assert confidence_of(form.scores(logits), indices).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_softmax_router_is_told_from_a_sigmoid_one_at_nearly_flat_logits() -> None:
    logits = torch.randn(50, 8) * 1e-3
    weights, indices = logits.softmax(-1).topk(2)
    assert recognise(logits, weights / weights.sum(-1, keepdim=True), indices)[0].kind == "softmax"


def test_a_router_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"layers\.3: its weights are neither sigmoid nor softmax"):
        recognise(torch.randn(4, 6), torch.rand(4, 2), torch.tensor([[0, 1]] * 4), "layers.3")


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_routers_know_their_experts_and_the_bias_of_their_selection(family: str, layers: int) -> None:
    model = model_of(family)
    routers = find_routers(model)
    experts = EXPERTS.get(family, 6)
    assert [(router.experts, router.top_k) for router in routers] == [(experts, 2)] * layers
    if family not in BIASED:
        assert all(router.bias is None for router in routers)
        return
    for router in routers:
        router.bias[3] += 10.0
    with torch.no_grad(), RoutingRecorder(model) as recorder:
        model(input_ids=IDS)
        assert (recorder.take().experts == 3).any(-1).all()


@pytest.mark.parametrize(("family", "layers"), FAMILIES)
def test_a_form_is_recognised_once_for_each_router(family: str, layers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = model_of(family), []

    def counted(*args: object) -> object:
        asked.append(args[-1])
        return recognise(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(families, "recognise", counted)
    for _ in range(3):
        with torch.no_grad(), RouterReplay(model) as replay, RoutingRecorder(model) as recorder:
            model(input_ids=IDS)
            replay.set(recorder.take().experts)
            model(input_ids=IDS)
        for router in find_routers(model):
            router.module.weight.data.neg_()
    assert asked == [router.name for router in find_routers(model)]
    other = copy.deepcopy(model)
    with torch.no_grad(), RoutingRecorder(other) as recorder:
        other(input_ids=IDS)
        recorder.take()
    assert len(asked) == 2 * layers


@pytest.mark.parametrize(("family", "scale"), [("glm", 2.5), ("deepseek", 2.5), ("step", 1.0), ("qwen", 1.0)])
def test_the_scale_does_not_depend_on_the_tokens(family: str, scale: float) -> None:
    model = model_of(family)
    router = find_routers(model)[0]
    for seed in range(5):
        hidden = torch.randn(40, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            form, _ = recognise(*router.read(router.module(hidden)))
        assert form.kind == ("sigmoid" if family in SIGMOID else "softmax")
        assert form.scale == scale


@pytest.mark.parametrize("tokens", [1, 30])
def test_a_doubtful_form_is_not_remembered(tokens: int) -> None:
    """Where all experts are alike sigmoid equals softmax; of one token a sum equals a scale."""
    router = find_routers(model_of("qwen"))[0]
    exact = router.module.weight.detach().clone()
    hidden = torch.randn(tokens, exact.shape[1])
    with torch.no_grad():
        if tokens > 1:
            router.module.weight.zero_()
        router.form(*router.read(router.module(hidden)))
        router.module.weight.copy_(exact)
        form = router.form(*router.read(router.module(torch.randn(30, exact.shape[1]))))
    assert (form.kind, form.normalised) == ("softmax", False)
