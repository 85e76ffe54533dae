"""Sampling a list of requests on any engine."""

import pytest
import torch

from rollouts.engine import Request, run_all
from support.engines import EchoEngine


def request(token: int, limit: int = 9) -> Request:
    return Request(torch.tensor([token]), 2 * token, limit, 1.0)


def test_samples_come_in_the_order_of_the_requests() -> None:
    samples = run_all(EchoEngine(), [request(token) for token in (4, 2, 7)])
    assert [int(sample.completion_ids[0]) for sample in samples] == [4, 2, 7]


def test_nothing_is_left_behind_by_a_request_that_cannot_be_served() -> None:
    engine = EchoEngine()
    with pytest.raises(ValueError, match="request 2: no tokens are asked for"):
        run_all(engine, [request(4), request(2), request(7, limit=0), request(8)])
    assert not engine.running
    assert engine.cancelled == [1, 2]
