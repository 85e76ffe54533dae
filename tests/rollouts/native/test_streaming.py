"""Requests that come and go while others run: tokens do not depend on it, and numbers are those that they were."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from rollouts.engine import Capabilities, Request, Sample, run_all
from rollouts.native.engine import NativeEngine
from rollouts.native.running import ROUTING_STEPS
from support.tiny_models import VOCAB, tiny_model

EOS = (1, 2)
FAMILIES = ["step", "qwen", "qwen-sliding", "llama"]
TOLERANCE = 1e-5
"""Nats between two compositions of the batch, for these models, whose weights are wide."""


def requests_of(count: int, seed: int = 5, longest: int = 40) -> list[Request]:
    """Ragged prompts and limits; temperatures 1.3, 0.7 and 0 in turn."""
    generator = torch.Generator().manual_seed(seed)

    def below(high: int) -> int:
        return int(torch.randint(1, high + 1, (1,), generator=generator))

    return [
        Request(
            prompt_ids=torch.randint(3, VOCAB, (below(30),), generator=generator),
            seed=1000 + index,
            max_new_tokens=below(longest),
            temperature=(1.3, 0.7, 0.0)[index % 3],
        )
        for index in range(count)
    ]


def engine_of(model: PreTrainedModel, slots: int = 4, **options: int) -> NativeEngine:
    return NativeEngine(model, EOS, 0, slots, record_experts=True, **options)


@cache
def alone(family: str, count: int) -> list[Sample]:
    """Each request on an engine that has nothing else to do."""
    engine = engine_of(tiny_model(family))
    return [run_all(engine, [request])[0] for request in requests_of(count)]


def wait_for(engine: NativeEngine, tickets: set[int]) -> dict[int, Sample]:
    """What these tickets' requests give; nothing else may end."""
    found: dict[int, Sample] = {}
    while found.keys() != tickets:
        found |= engine.finished()
        assert found.keys() <= tickets
    return found


def assert_same(one: Sample, other: Sample, tolerance: float = TOLERANCE) -> None:
    assert one.completion_ids.tolist() == other.completion_ids.tolist()
    assert one.finish_reason == other.finish_reason
    assert float((one.logprobs - other.logprobs).abs().max()) <= tolerance
    if one.routing_confidence is not None:
        assert torch.allclose(one.routing_confidence, other.routing_confidence, rtol=0, atol=tolerance)
        # As sets: in which order a router names its experts is not defined.
        assert torch.equal(one.routed_experts.sort(-1).values, other.routed_experts.sort(-1).values)


LENGTHS = [33, 31, 24, 4, 16, 11, 32, 29, 16, 4, 20, 37, 6, 40, 26, 28, 5, 24, 12, 4, 38, 8, 24, 19]
SUMS = [667, 588, 634, 68, 323, 257, 803, 768, 248, 44, 474, 767, 163, 957, 728, 600, 78, 536, 256, 117, 1141, 158]
LAST = [36, 36, 36, 36, 36, 36, 16, 4, 39, 37, 9, 30, 36, 39, 23, 39, 37, 26, 39]
LOGPROBS = [-95.41879, -55.53391, -34.04265, -12.9432, -39.6566, -16.17669, -88.88533, -36.84173, -20.90458, -12.62262]


def test_numbers_are_those_of_the_engine_without_streaming(step_model: PreTrainedModel) -> None:
    """Recorded from the commit before requests could come and go: 24 requests that are all known at the start."""
    samples = run_all(engine_of(step_model), requests_of(24))
    assert [len(sample.completion_ids) for sample in samples] == LENGTHS
    assert [int(sample.completion_ids.sum()) for sample in samples][:22] == SUMS
    assert samples[23].completion_ids.tolist() == LAST
    for sample, expected in zip(samples, LOGPROBS, strict=False):
        assert float(sample.logprobs.double().sum()) == pytest.approx(expected, abs=1e-4)
    total = sum(float(sample.logprobs.double().sum()) for sample in samples)
    assert total == pytest.approx(-927.360947, abs=1e-3)
    confidence = sum(float(sample.routing_confidence.double().sum()) for sample in samples)
    assert confidence == pytest.approx(20.744393, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(data=st.data())
def test_requests_may_come_in_any_order_at_any_time(family: str, data: st.DataObject) -> None:
    requests = requests_of(9)
    engine = engine_of(tiny_model(family), data.draw(st.integers(1, 6)), prefill_tokens=data.draw(st.integers(20, 200)))
    places: dict[int, int] = {}
    found: dict[int, Sample] = {}
    for place in data.draw(st.permutations(range(len(requests)))):
        places[engine.submit(requests[place])] = place
        for _ in range(data.draw(st.integers(0, 2))):
            found |= engine.finished()
    while len(found) < len(requests):
        found |= engine.finished()
    assert engine.finished() == []
    for ticket, sample in found.items():
        assert_same(sample, alone(family, len(requests))[places[ticket]])


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=8)
@given(data=st.data())
def test_cancelling_any_of_them_leaves_the_others_as_they_are(family: str, data: st.DataObject) -> None:
    requests = requests_of(9)
    engine = engine_of(tiny_model(family), data.draw(st.integers(1, 6)))
    tickets = [engine.submit(request) for request in requests]
    found: dict[int, Sample] = {}
    for _ in range(data.draw(st.integers(0, 4))):
        found |= engine.finished()
    gone = data.draw(st.sets(st.sampled_from(tickets)))
    engine.cancel([*gone, -1, 10**6])
    later = wait_for(engine, set(tickets) - gone - found.keys())
    assert engine.finished() == []
    for ticket, sample in (found | later).items():
        assert_same(sample, alone(family, len(requests))[tickets.index(ticket)])
    for one, other in zip(run_all(engine, requests), run_all(engine, requests), strict=True):
        assert torch.equal(one.logprobs, other.logprobs)


def test_later_requests_find_room_that_the_first_ones_did_not_need(step_model: PreTrainedModel) -> None:
    """More slots, longer prompts and longer completions than those that the run began with."""
    engine = engine_of(step_model, slots=7)
    rows: list[int] = []
    engine.decoder.head.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    first = replace(requests_of(1, longest=1)[0], prompt_ids=torch.tensor([5]), max_new_tokens=6)
    ticket = engine.submit(first)
    engine.submit(replace(first, max_new_tokens=2))
    engine.finished()
    assert rows == [2, 2]
    requests = requests_of(9)
    tickets = [engine.submit(request) for request in requests]
    found = wait_for(engine, {ticket, *tickets})
    assert max(rows) == 7
    for ticket, expected in zip(tickets, alone("step", 9), strict=True):
        assert_same(found[ticket], expected)


def test_a_long_wait_is_interrupted_and_goes_on(step_model: PreTrainedModel) -> None:
    """So that the caller can look up: at whether to stop, at scores that have come."""
    engine = NativeEngine(step_model, [], 0, 2, record_experts=True)
    ticket = engine.submit(Request(torch.tensor([5, 6]), 3, 2 * ROUTING_STEPS + 5, 1.0))
    looks = 1
    while not (ended := engine.finished()):
        looks += 1
    assert looks == 3
    assert [found for found, _ in ended] == [ticket]
    (expected,) = run_all(engine, [Request(torch.tensor([5, 6]), 3, 2 * ROUTING_STEPS + 5, 1.0)])
    assert_same(ended[0][1], expected, 0.0)


def test_scoring_between_two_looks_changes_nothing(step_model: PreTrainedModel) -> None:
    engine, requests = engine_of(step_model), requests_of(9)
    expected = run_all(engine, requests)
    tickets = [engine.submit(request) for request in requests]
    found: dict[int, Sample] = {}
    while len(found) < len(requests):
        found |= engine.finished()
        engine.score([(torch.tensor([5]), torch.tensor([6, 7]))], 1.0)
    for ticket, sample in zip(tickets, expected, strict=True):
        assert torch.equal(found[ticket].logprobs, sample.logprobs)
        assert torch.equal(found[ticket].routing_confidence, sample.routing_confidence)


def test_weights_do_not_change_under_running_sequences(step_model: PreTrainedModel) -> None:
    engine, requests = engine_of(step_model), requests_of(6)
    weights = {name: tensor.clone() for name, tensor in step_model.state_dict().items()}
    tickets = [engine.submit(request) for request in requests]
    engine.load(weights, 1)  # nothing has begun
    engine.finished()
    with pytest.raises(RuntimeError, match=r"version 2 cannot be loaded while sequences are running"):
        engine.load(weights, 2)
    engine.cancel(tickets)
    engine.load(weights, 2)
    assert engine.weight_version == 2


def test_a_sleeping_engine_refuses_requests(step_model: PreTrainedModel) -> None:
    engine, request = engine_of(step_model), requests_of(1)[0]
    ticket = engine.submit(request)
    with pytest.raises(RuntimeError, match="finish or cancel them"):
        engine.sleep()
    engine.cancel([ticket])
    engine.sleep()
    assert engine.finished() == []
    with pytest.raises(RuntimeError, match=r"asleep; call wake\(\)"):
        engine.submit(request)
    engine.wake()
    assert_same(run_all(engine, [request])[0], alone("step", 1)[0], 0.0)


def test_the_engine_says_what_it_can() -> None:
    plain = NativeEngine(tiny_model("step"), EOS, 0, 1)
    assert plain.can == Capabilities(experts=False, replay=True, loops=False, stop_strings=False)
    assert engine_of(tiny_model("step")).can == replace(plain.can, experts=True)
    assert engine_of(tiny_model("llama")).can == replace(plain.can, replay=False)


def test_tickets_are_never_used_twice(step_model: PreTrainedModel) -> None:
    engine, requests = engine_of(step_model), requests_of(3)
    tickets = [engine.submit(request) for request in requests]
    wait_for(engine, set(tickets))
    tickets += [engine.submit(request) for request in requests]
    engine.cancel(tickets)
    tickets += [engine.submit(request) for request in requests]
    assert len(set(tickets)) == 9
