"""The native engine against plain full forwards and against transformers' own generate."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from model.moe.routers import RoutingRecorder
from rollouts.engine import Request, Sample, run_all
from rollouts.native.engine import NativeEngine
from rollouts.native.running import ROUTING_STEPS
from support.tiny_models import VOCAB, tiny_model

EOS = (1, 2)
WINDOW = 8


def ragged_requests(count: int, temperature: float = 1.0, max_prompt: int = 30) -> list[Request]:
    generator = torch.Generator().manual_seed(5)

    def below(high: int) -> int:
        return int(torch.randint(1, high + 1, (1,), generator=generator))

    return [
        Request(
            prompt_ids=torch.randint(3, VOCAB, (below(max_prompt),), generator=generator),
            seed=1000 + index,
            max_new_tokens=below(40),
            temperature=temperature,
        )
        for index in range(count)
    ]


def engine_of(model: PreTrainedModel, slots: int = 4, **options: int) -> NativeEngine:
    return NativeEngine(model, EOS, 0, slots, **options)


@torch.no_grad()
def reference_logprobs(model: PreTrainedModel, request: Request, completion: Tensor) -> Tensor:
    """log softmax(logits / temperature) at the completion's tokens, by the model's own forward."""
    ids = torch.cat([request.prompt_ids, completion])[None]
    logits = model(input_ids=ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].float()
    scaled = torch.log_softmax(logits / (request.temperature or 1.0), dim=-1)
    return scaled.gather(1, completion[:, None])[:, 0]


def assert_same(left: list[Sample], right: list[Sample], tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        assert one.completion_ids.tolist() == other.completion_ids.tolist()
        assert one.finish_reason == other.finish_reason
        assert float((one.logprobs - other.logprobs).abs().max()) <= tolerance


def test_logprobs_equal_full_forward_over_refills_and_window_edge(any_model: PreTrainedModel) -> None:
    requests = [
        replace(request, temperature=(1.3, 0.7, 0.0)[index % 3]) for index, request in enumerate(ragged_requests(24))
    ]
    samples = run_all(engine_of(any_model), requests)
    totals = [len(r.prompt_ids) + len(s.completion_ids) for r, s in zip(requests, samples, strict=True)]
    assert max(totals) > 4 * WINDOW
    assert (
        min(len(request.prompt_ids) for request in requests)
        < WINDOW
        < max(len(request.prompt_ids) for request in requests)
    )
    for request, sample in zip(requests, samples, strict=True):
        expected = reference_logprobs(any_model, request, sample.completion_ids)
        assert float((sample.logprobs - expected).abs().max()) <= 1e-5
        assert sample.logprobs.dtype == torch.float32
        assert sample.completion_ids.dtype == torch.int64


def test_eager_attention_gives_the_same() -> None:
    requests = ragged_requests(8)
    sdpa = run_all(engine_of(tiny_model("step")), requests)
    eager = run_all(engine_of(tiny_model("step", attention="eager")), requests)
    assert_same(sdpa, eager, 1e-5)


@pytest.mark.parametrize("family", ["step", "qwen", "qwen-sliding", "llama"])
def test_greedy_equals_generate(family: str) -> None:
    model = tiny_model(family)
    requests = ragged_requests(10, temperature=0.0)
    for request, sample in zip(requests, run_all(engine_of(model), requests), strict=True):
        ids = request.prompt_ids[None]
        expected = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=list(EOS),
            pad_token_id=0,
        )[0, ids.shape[1] :]
        assert sample.completion_ids.tolist() == expected.tolist()
        logprobs = reference_logprobs(model, request, sample.completion_ids)
        assert float((sample.logprobs - logprobs).abs().max()) <= 1e-5


def test_first_token_frequencies_match_softmax(step_model: PreTrainedModel) -> None:
    prompt = torch.tensor([5, 9, 11])
    count, temperature = 4000, 1.5
    requests = [Request(prompt, seed, 1, temperature) for seed in range(count)]
    samples = run_all(engine_of(step_model, slots=1000), requests)
    observed = torch.bincount(torch.cat([s.completion_ids for s in samples]), minlength=VOCAB).double()
    with torch.no_grad():
        logits = step_model(input_ids=prompt[None]).logits[0, -1].double()
    expected = count * torch.softmax(logits / temperature, dim=-1)
    rare = expected < 5
    if rare.any():
        observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
        expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    freedom = len(expected) - 1
    assert freedom >= 8
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_results_do_not_depend_on_the_number_of_slots(any_model: PreTrainedModel) -> None:
    requests = ragged_requests(20)
    two = run_all(engine_of(any_model, slots=2), requests)
    assert_same(two, run_all(engine_of(any_model, slots=8), requests), 1e-5)
    assert_same(two, run_all(engine_of(any_model, slots=8, prefill_tokens=16), requests), 1e-5)


def test_repeats_bit_for_bit(step_model: PreTrainedModel) -> None:
    engine, requests = engine_of(step_model), ragged_requests(12)
    first, second = run_all(engine, requests), run_all(engine, requests)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.completion_ids, other.completion_ids)
        assert torch.equal(one.logprobs, other.logprobs)
        assert torch.equal(one.routing_confidence, other.routing_confidence)


def test_finish_reason_says_why(step_model: PreTrainedModel) -> None:
    requests = ragged_requests(24, temperature=1.5)
    samples = run_all(engine_of(step_model), requests)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    for request, sample in zip(requests, samples, strict=True):
        ended = [token in EOS for token in sample.completion_ids.tolist()]
        assert not any(ended[:-1])
        assert (sample.finish_reason == "stop") == ended[-1]
        assert ended[-1] or len(sample.completion_ids) == request.max_new_tokens


def test_end_token_at_the_limit_is_a_stop(step_model: PreTrainedModel) -> None:
    prompt = torch.tensor([4, 5])
    greedy = Request(prompt, 0, 5, 0.0)
    fifth = int(run_all(NativeEngine(step_model, [], 0, 1), [greedy])[0].completion_ids[4])
    (sample,) = run_all(NativeEngine(step_model, [fifth], 0, 1), [greedy])
    assert int(sample.completion_ids[-1]) == fifth
    assert sample.finish_reason == "stop"


@pytest.mark.parametrize("family", ["step", "qwen"])
def test_routing_confidence_equals_full_forward(family: str) -> None:
    model = tiny_model(family)
    requests = ragged_requests(10)
    samples = run_all(engine_of(model), requests)
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    assert len(routers) == 2
    seen: list[tuple[Tensor, Tensor]] = []
    for router in routers:
        router.register_forward_hook(lambda _, __, output: seen.append((output[0], output[2])))
    for request, sample in zip(requests, samples, strict=True):
        seen.clear()
        reference_logprobs(model, request, sample.completion_ids)
        predicting = slice(len(request.prompt_ids) - 1, -1)
        expected = []
        for logits, chosen in seen:
            scores = torch.sigmoid(logits) if family == "step" else torch.softmax(logits, dim=-1)
            mass = scores.gather(1, chosen).sum(1) / scores.sum(1)
            expected.append(mass[predicting].mean())
        assert torch.allclose(sample.routing_confidence, torch.stack(expected), rtol=0, atol=1e-6)


def test_dense_model_has_no_routing_confidence() -> None:
    (sample,) = run_all(engine_of(tiny_model("llama")), ragged_requests(1))
    assert sample.routing_confidence is None


def test_finished_sequences_cost_nothing(step_model: PreTrainedModel) -> None:
    limits = [3, 12, 1, 6]
    requests = [Request(torch.tensor([5, 6, 7]), 0, limit, 1.0) for limit in limits]
    engine = NativeEngine(step_model, [], 0, 4)
    rows: list[int] = []
    engine.decoder.head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    run_all(engine, requests)
    assert rows == [4, 3, 3] + [2] * 3 + [1] * 6
    assert sum(rows) == sum(limits)


def test_logits_never_exceed_the_slots(step_model: PreTrainedModel) -> None:
    requests = ragged_requests(12)
    engine = engine_of(step_model, slots=3)
    sizes: list[int] = []
    engine.decoder.head.register_forward_hook(lambda _, inputs, __: sizes.append(inputs[0].shape[:-1].numel()))
    samples = run_all(engine, requests)
    engine.score([(r.prompt_ids, s.completion_ids) for r, s in zip(requests, samples, strict=True)], 1.0)
    assert max(sizes) == 3


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_score_equals_full_forward(any_model: PreTrainedModel, temperature: float) -> None:
    requests = ragged_requests(9, temperature=temperature)
    engine = engine_of(any_model, prefill_tokens=100)
    completions = [sample.completion_ids for sample in run_all(engine, requests)]
    pairs = [(r.prompt_ids, ids) for r, ids in zip(requests, completions, strict=True)]
    for request, ids, scored in zip(requests, completions, engine.score(pairs, temperature), strict=True):
        assert float((scored - reference_logprobs(any_model, request, ids)).abs().max()) <= 1e-5


def test_load_takes_effect(step_model: PreTrainedModel) -> None:
    requests = ragged_requests(4)
    engine = engine_of(step_model)
    before = run_all(engine, requests)
    weights = {name: tensor * 1.1 for name, tensor in step_model.state_dict().items()}
    engine.load(weights, version=4)
    after = run_all(engine, requests)
    assert [sample.weight_version for sample in before + after] == [0] * 4 + [4] * 4
    assert all(not torch.equal(b.logprobs[:1], a.logprobs[:1]) for b, a in zip(before, after, strict=True))
    weights["lm_head.weight"].zero_()
    assert_same(after, run_all(engine, requests), 0.0)


def test_converted_weights_are_what_would_be_loaded(step_model: PreTrainedModel) -> None:
    weights = {name: tensor.clone() + 0.1 for name, tensor in step_model.state_dict().items()}
    engine = engine_of(step_model.to(torch.bfloat16))
    converted = engine.converted(weights)
    assert {tensor.dtype for tensor in converted.values()} == {torch.bfloat16}
    engine.load(weights, version=1)
    loaded = {name: tensor.clone() for name, tensor in step_model.state_dict().items()}
    engine.load(converted, version=2)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in step_model.state_dict().items())


def test_load_names_every_problem_and_changes_nothing(step_model: PreTrainedModel) -> None:
    engine = engine_of(step_model)
    weights = {name: tensor + 1 for name, tensor in step_model.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in step_model.state_dict().items()}
    del weights["model.norm.weight"]
    weights["lm_head.weight"] = torch.zeros(3, 4)
    weights["model.extra.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as error:
        engine.load(weights, version=1)
    text = str(error.value)
    assert "missing model.norm.weight" in text
    assert "unknown model.extra.weight" in text
    assert "lm_head.weight has shape [3, 4], the model's is [40, 32]" in text
    assert engine.weight_version == 0
    assert all(torch.equal(kept[name], tensor) for name, tensor in step_model.state_dict().items())


def test_load_accepts_a_tied_tensor_under_one_name() -> None:
    model = tiny_model("llama")
    engine = engine_of(model)
    weights = {name: tensor * 2 for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    engine.load(weights, version=1)
    assert torch.equal(model.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(torch.tensor([], dtype=torch.int64), 0, 4, 1.0), "the prompt is empty"),
        (Request(torch.tensor([3]), 0, 0, 1.0), "max_new_tokens must be at least 1"),
        (Request(torch.tensor([3]), 0, 4, -1.0), "temperature must be at least 0"),
        (Request(torch.full((100,), 3), 0, 29, 1.0), "more than the model's 128 positions"),
    ],
)
def test_bad_requests_are_named(step_model: PreTrainedModel, request_: Request, message: str) -> None:
    good = Request(torch.full((100,), 3), 0, 28, 1.0)
    with pytest.raises(ValueError, match=f"request 1: .*{message}"):
        run_all(engine_of(step_model), [good, request_])


def test_no_requests_no_samples(step_model: PreTrainedModel) -> None:
    assert run_all(engine_of(step_model), []) == []


def test_broken_weights_are_an_error(step_model: PreTrainedModel) -> None:
    engine, requests = engine_of(step_model), ragged_requests(6)
    healthy = {name: tensor.clone() for name, tensor in step_model.state_dict().items()}
    before = run_all(engine, requests)
    broken = {**healthy, "lm_head.weight": torch.full((VOCAB, 32), math.nan)}
    engine.load(broken, version=7)
    with pytest.raises(RuntimeError, match=r"not finite \(weight version 7\)"):
        run_all(engine, requests)
    engine.load(healthy, version=8)
    assert_same(before, run_all(engine, requests), 0.0)


def test_interrupt_leaves_the_engine_usable(step_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = engine_of(step_model), ragged_requests(8)
    before = run_all(engine, requests)
    hooks = sum(len(module._forward_hooks) for module in step_model.modules())
    calls = 0
    forward = engine.decoder.head.forward

    def interrupted(states: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return forward(states)

    with monkeypatch.context() as patch:
        patch.setattr(engine.decoder.head, "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_all(engine, requests)
    assert sum(len(module._forward_hooks) for module in step_model.modules()) == hooks
    assert_same(before, run_all(engine, requests), 0.0)


def test_model_with_scaled_logits_is_refused() -> None:
    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        logits_scaling=8.0,
    )
    with pytest.raises(ValueError, match="GraniteForCausalLM changes its logits"):
        engine_of(GraniteForCausalLM(config))


def test_attention_without_slot_masks_is_refused(step_model: PreTrainedModel) -> None:
    step_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"model\.attention: 'flash_attention_2'"):
        engine_of(step_model)


def test_zero_slots_are_refused(step_model: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match=r"engine\.slots must be at least 1"):
        engine_of(step_model, slots=0)


@pytest.mark.parametrize("family", ["step", "qwen"])
def test_recorded_experts_are_those_of_a_full_forward(family: str) -> None:
    model = tiny_model(family)
    requests = ragged_requests(30)
    engine = engine_of(model, slots=8, record_experts=True)
    samples = run_all(engine, requests)
    assert max(len(sample.completion_ids) for sample in samples) > ROUTING_STEPS  # several readings of one sequence
    for request, sample in zip(requests, samples, strict=True):
        with torch.no_grad(), RoutingRecorder(model) as recorder:
            model(input_ids=torch.cat([request.prompt_ids, sample.completion_ids[:-1]])[None])
            expected = recorder.take().experts.transpose(0, 1)
        assert sample.routed_experts.dtype == torch.uint8
        # As sets: in which order a router names its experts is not defined.
        assert torch.equal(sample.routed_experts.sort(-1).values, expected.sort(-1).values)


def test_experts_are_recorded_only_on_request(step_model: PreTrainedModel) -> None:
    (sample,) = run_all(engine_of(step_model), ragged_requests(1))
    assert sample.routed_experts is None
    (sample,) = run_all(engine_of(tiny_model("llama"), record_experts=True), ragged_requests(1))
    assert sample.routed_experts is None


def test_scores_with_replayed_experts(step_model: PreTrainedModel) -> None:
    requests = ragged_requests(6)
    engine = engine_of(step_model, record_experts=True)
    samples = run_all(engine, requests)
    pairs = [(request.prompt_ids, s.completion_ids) for request, s in zip(requests, samples, strict=True)]
    own = [sample.routed_experts for sample in samples]
    free = engine.score(pairs, 1.0)
    for a, b in zip(free, engine.score(pairs, 1.0, own), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    replayed = engine.score(pairs, 1.0, [(experts + 1) % 8 for experts in own])
    assert (torch.cat(replayed) - torch.cat(free)).abs().max() > 1e-2
    for a, b in zip(free, engine.score(pairs, 1.0), strict=True):
        assert torch.equal(a, b)  # nothing of it stays
