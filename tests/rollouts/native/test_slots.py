"""Inverse-CDF sampling, and the table of slots."""

import torch

from rollouts.engine import Request
from rollouts.native.slots import SlotTable, pick_tokens, request_uniforms


def test_each_uniform_falls_into_its_token() -> None:
    probabilities = torch.tensor([0.0, 0.2, 0.0, 0.5, 0.3])
    uniform = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.999999], dtype=torch.float64)
    logits = probabilities.log().expand(len(uniform), -1)
    tokens, logprobs = pick_tokens(logits, torch.ones(len(uniform)), uniform)
    assert tokens.tolist() == [1, 1, 3, 3, 4, 4]
    assert torch.allclose(logprobs.exp(), probabilities[tokens])


def test_rows_have_their_own_temperature() -> None:
    logits = torch.tensor([[0.0, 1.0, 3.0]]).expand(3, -1)
    temperature = torch.tensor([0.0, 0.5, 2.0])
    tokens, logprobs = pick_tokens(logits, temperature, torch.zeros(3, dtype=torch.float64))
    assert tokens.tolist() == [2, 0, 0]
    expected = [torch.log_softmax(logits[0] / scale, -1)[token] for scale, token in ((1, 2), (0.5, 0), (2, 0))]
    assert torch.allclose(logprobs, torch.stack(expected))


def test_rare_tokens_of_a_large_vocabulary_keep_their_share() -> None:
    vocabulary = 2**17
    logits = torch.zeros(1, vocabulary)
    logits[0, 0] = 20.0
    head = torch.softmax(logits[0].double(), -1)[0]
    uniform = head + (1 - head) * (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    tokens, _ = pick_tokens(logits.expand(64, -1), torch.ones(64), uniform)
    expected = (torch.arange(64) + 0.5) * (vocabulary / 64)
    assert float((tokens - expected).abs().max()) < 2


def test_uniforms_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = request_uniforms(2**63 - 1, 50)
    torch.manual_seed(2)
    assert torch.equal(first, request_uniforms(2**63 - 1, 50))
    assert torch.equal(first[:20], request_uniforms(2**63 - 1, 20))
    assert not torch.equal(first, request_uniforms(2**63 - 2, 50))
    assert float(first.min()) >= 0
    assert float(first.max()) < 1


def requests_of(*limits: int) -> list[Request]:
    return [Request(torch.arange(limit), limit, limit, 1.0) for limit in limits]


def test_a_table_that_grows_keeps_what_is_running() -> None:
    device = torch.device("cpu")
    table = SlotTable(2, 4, 8, 1, [0], device)
    table.admit([7, 8], requests_of(3, 4))
    table.record(0, torch.eye(5)[[2, 3]] * 100)
    table.route(slice(0, 2), torch.tensor([0, 0]), torch.arange(16, dtype=torch.uint8).reshape(1, 2, 4, 2))
    kept = table.experts[:, :4].clone()
    table.grow(5, 9, 18)
    assert (table.slots, table.free, table.tickets) == (5, 3, [7, 8])
    assert table.rows.tokens[:2].tolist() == [[2] + [0] * 8, [3] + [0] * 8]
    assert torch.equal(table.rows.uniforms[1, :4], request_uniforms(4, 4))
    assert torch.equal(table.experts[:2, :4], kept)
    table.admit([9], requests_of(9))
    assert table.length[:3].tolist() == [4, 5, 9]
    table.grow(1, 1, 1)
    assert (table.slots, table.positions, table.rows.tokens.shape[1]) == (5, 18, 9)


def test_gaps_are_closed_with_the_last_sequences() -> None:
    table = SlotTable(5, 4, 8, 0, [0], torch.device("cpu"))
    table.admit([10, 11, 12, 13, 14], requests_of(1, 2, 3, 4, 4))
    assert table.release([0, 3]) == ([4], [0])
    assert table.tickets == [14, 11, 12]
    assert table.rows.limit[:3].tolist() == [4, 2, 3]
