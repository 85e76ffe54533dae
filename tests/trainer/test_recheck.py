"""mask_policy: current: what the filter sees of the policy as it is now."""

import math
from dataclasses import replace
from functools import partial
from typing import cast

import pytest
import torch

from mispo.algorithm.filter import FixedFilter, token_only
from mispo.algorithm.loss import mispo_loss, truncated_importance
from mispo.algorithm.objective import Objective, Samples
from mispo.trainer.batch import Layout
from mispo.trainer.engine import TrainEngine
from mispo.trainer.policy import ActorModule
from mispo.trainer.scoring import score_logprobs
from mispo.trainer.update import recheck
from model.build import build_policy
from support.batches import Plain, batch_of, method_of, settings_of

LOW, HIGH, CAP = 0.9, 1.1, 1.05


def test_a_recheck_filters_with_the_current_policy_and_corrects_with_the_old_one() -> None:
    """For some members of a step, in any order."""
    engine = cast(TrainEngine, Plain("actor", ActorModule(build_policy("micro", None, seed=0)[0], torch.float32)))
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(7, 90, (n,), generator=generator) for n in (9, 14, 5, 8)]
    batch, settings = replace(batch_of([9, 14, 5, 8]), ids=ids), settings_of(Layout(60))
    current = score_logprobs(engine, batch, settings.layout, settings.temperature)
    noise = torch.randn(len(current), generator=generator)
    batch = replace(batch, rollout_logprobs_N=current + 0.15 * noise)
    old, everything = current + 0.1 * noise.flip(0), torch.ones(len(current), dtype=torch.bool)
    samples = Samples(old, torch.zeros(len(current)), torch.ones(len(current)), everything)
    method = replace(
        method_of(Objective(mispo_loss, "tokens", 30, 0.0, 0.0)),
        filter=FixedFilter(partial(token_only, token_bounds=(LOW, HIGH))),
        correct=partial(truncated_importance, cap=CAP),
        rechecks=True,
    )
    members = [3, 1]
    at = batch.tokens_of(members)
    weights = recheck(engine, batch.part(members), samples, at, method, settings)
    expected = []
    for n in at.tolist():
        rollout = batch.rollout_logprobs_N[n].item()
        now, then = math.exp(current[n].item() - rollout), math.exp(old[n].item() - rollout)
        expected.append(min(then, CAP) if LOW <= now <= HIGH else 0.0)
    assert weights.tolist() == pytest.approx(expected, rel=1e-4)
    assert 0 < expected.count(0.0) < len(expected)
