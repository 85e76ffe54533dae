"""Critic bugs that other trainers had: each is looked for here, with a separate critic and on a shared trunk."""

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from mispo.trainer.batch import Layout, minibatches
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import ActorModule, CriticModule
from mispo.trainer.scoring import Values, score_policy, score_values
from model.build import build_policy
from model.critic import Critic, ValueHead
from support.batches import Plain, batch_of

LAYOUT = Layout(60)


def values_of(kind: str, module: nn.Module, temperature: float) -> Values:
    engine = cast(TrainEngine, Plain("actor", module))
    batch = replace(batch_of([9, 14, 5]), ids=[torch.arange(7, 7 + n) for n in (9, 14, 5)])
    if kind == "separate":
        return score_values(engine, batch, LAYOUT)
    _, values = score_policy(engine, batch, LAYOUT, temperature)
    assert values is not None
    return values


def module_of(kind: str, dropout: float = 0.0) -> nn.Module:
    policy, _ = build_policy("micro", None, seed=0)
    if dropout:
        policy.model.layers[1].mlp = nn.Sequential(policy.model.layers[1].mlp, nn.Dropout(dropout))
    if kind == "separate":
        return CriticModule(Critic.from_policy(policy, 0.1, 0), torch.float32)
    return ActorModule(policy, torch.float32, value_head=ValueHead(policy, 0.1, 0))


def both(values: Values) -> Tensor:
    return torch.cat([values.values_N, values.bootstrap_B])


def test_both_kinds_read_the_same_values() -> None:
    """They have the same weights here; V(s_T) is the value after the last token."""
    separate, shared = (both(values_of(kind, module_of(kind), 1.0)) for kind in ("separate", "shared"))
    assert separate.shape == (28 - 3 * 2 + 3,)
    assert separate.std() > 0.01
    assert torch.allclose(separate, shared, atol=1e-6)


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_the_sampling_temperature_does_not_touch_values(kind: str) -> None:
    """slime#1928."""
    module = module_of(kind)
    assert torch.equal(both(values_of(kind, module, 1.0)), both(values_of(kind, module, 0.3)))


@pytest.mark.parametrize("kind", ["separate", "shared"])
def test_dropout_is_off_while_scoring_and_on_while_learning(kind: str) -> None:
    """verl#4708."""
    module = module_of(kind, dropout=0.5).train()
    expected = both(values_of(kind, module.eval(), 1.0))
    module.train()
    assert torch.equal(both(values_of(kind, module, 1.0)), expected)
    assert any(isinstance(part, nn.Dropout) for part in module.modules())
    x = LAYOUT.input(replace(batch_of([9]), ids=[torch.arange(7, 16)]), [0], torch.device("cpu"))
    module.train()
    arguments = (x,) if kind == "separate" else (x, 1.0)
    first, second = module(*arguments), module(*arguments)
    assert not torch.equal(first if kind == "separate" else first[2], second if kind == "separate" else second[2])


def test_no_trajectory_is_learnt_from_twice_in_a_step() -> None:
    """slime#1187: the critic's mini-batches are a partition of the step."""
    parts = minibatches(batch_of([5] * 13), 4, seed=3)
    assert sorted(b for part in parts for b in part) == list(range(13))
    assert [len(part) for part in parts] == [3, 3, 3, 4]
