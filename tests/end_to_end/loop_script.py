"""Run by test_bootstrap.py in a separate process: steps of the loop with a critic and finish reasons made up.

Arguments: OUT RUN_DIR override … Each step runs under one of SETTINGS; OUT gets, as JSON, what the method decided.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mispo import loop
from mispo.algorithm.filter import Filter, Proposal, Selection
from mispo.algorithm.method import Targets, with_critic
from mispo.build.run import build_run
from mispo.config.load import load_config
from mispo.monitor.journal import Journal
from mispo.run import Run
from mispo.trainer.batch import Batch
from mispo.trainer.scoring import Scores
from model.critic import Critic
from rollouts.sampler import Sampler, Taken, Weights
from rollouts.trajectory import FINISH_REASONS

SETTINGS: list[dict[str, Any]] = [
    {"truncation": "bootstrap", "gamma": 1.0, "lam": 1.0},
    {"truncation": "bootstrap", "gamma": 0.9, "lam": 0.8},
    {"truncation": "zero", "gamma": 0.9, "lam": 1.0},
    {"truncation": "mask", "gamma": 1.0, "lam": 1.0},
    {"truncation": "bootstrap", "gamma": 1.0, "lam": 1.0, "mask_policy": "current"},
]


class PositionCritic(Critic):
    """The value of a state is its position index: that of the last token that has been read."""

    def forward(self, ids: Tensor, rows: Tensor, columns: Tensor, positions: Tensor | None = None) -> Tensor:
        return columns.float() + 0 * sum(p.sum() for p in self.parameters())


class Engineered:
    """The sampled tokens of the real sampler, with finish reasons in turn, for all tokens."""

    def __init__(self, inner: Sampler) -> None:
        self.inner = inner

    def take(self, step: int) -> Taken:
        taken = self.inner.take(step)
        numbered = enumerate(taken.trajectories)
        made_up = [replace(t, finish_reason=FINISH_REASONS[n % len(FINISH_REASONS)]) for n, t in numbered]
        return replace(taken, trajectories=made_up)

    def publish(self, weights: Weights | None) -> Mapping[str, float]:
        return self.inner.publish(weights)

    def close(self) -> None:
        self.inner.close()


class Counted:
    """A filter that counts how often it is asked."""

    def __init__(self, inner: Filter) -> None:
        self.inner, self.calls = inner, 0

    def __call__(self, proposal: Proposal) -> Selection:
        self.calls += 1
        return self.inner(proposal)

    def state(self) -> Any:
        return self.inner.state()


class Witness(Journal):
    """The real journal; keeps what it is given to keep."""

    def keep(self, batch: Batch, scores: Scores, targets: Targets) -> None:
        super().keep(batch, scores, targets)
        self.kept = batch, scores, targets


def rows_of(batch: Batch, scores: Scores, targets: Targets) -> list[dict[str, Any]]:
    """What was decided for each trajectory."""
    assert scores.values is not None
    assert targets.values is not None
    cuts = batch.offsets_B1[1:-1].tolist()
    tensors = {
        "values": scores.values.values_N,
        "advantages": targets.samples.advantages,
        "targets": targets.values.targets,
        "included": targets.samples.included,
    }
    parts = {name: [x.tolist() for x in tensor.tensor_split(cuts)] for name, tensor in tensors.items()}
    return [
        {name: rows[number] for name, rows in parts.items()}
        | {
            "prompt": len(trajectory.prompt_ids),
            "reason": trajectory.finish_reason,
            "reward": batch.rewards_B[number].item(),
            "bootstrap": scores.values.bootstrap_B[number].item(),
        }
        for number, trajectory in enumerate(batch.trajectories)
    ]


def under(run: Run, settings: dict[str, Any], counted: Counted) -> Run:
    """The run with another truncation, discount and policy in the mask."""
    truncation = settings["truncation"]
    gamma, lam = settings["gamma"], settings["lam"]
    method = replace(
        run.method,
        filter=counted,
        truncation=truncation,
        advantage=with_critic(gamma, lam, lam, truncation == "bootstrap"),
        rechecks=settings.get("mask_policy") == "current",
    )
    learner = replace(run.learner, packing=replace(run.learner.packing, truncation=truncation))
    return replace(run, method=method, learner=learner)


def main() -> None:
    out, directory, *overrides = sys.argv[1:]
    Path(directory).mkdir()
    run = build_run(load_config(overrides), Path(directory), resume=False)
    run.learner.critic.module.critic.__class__ = PositionCritic
    run.journal.__class__ = Witness
    run = replace(run, sampler=Engineered(run.sampler))
    counted, steps, calls = Counted(run.method.filter), [], []
    for number, settings in enumerate(SETTINGS, 1):
        before, updates = counted.calls, run.learner.actor.updates
        loop.train_step(under(run, settings, counted), number)
        steps.append(rows_of(*run.journal.kept))
        calls.append((counted.calls - before, run.learner.actor.updates - updates))
    run.close(0)
    Path(out).write_text(json.dumps({"steps": steps, "calls": calls}))


if __name__ == "__main__":
    main()
