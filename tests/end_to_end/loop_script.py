"""Run by test_bootstrap.py in a process of its own: steps of the loop with a critic and finish reasons made up.

Arguments: OUT RUN_DIR override … Each step runs under one of SETTINGS; OUT gets, as JSON, what `judge` decided.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mispo import loop
from mispo.algorithm.filter import Proposal, Selection
from mispo.build.run import build_run
from mispo.config.load import load_config
from mispo.run import Run
from mispo.trainer.batch import Batch
from mispo.trainer.scoring import Values
from model.critic import Critic
from rollouts.engine import Request, Sample
from rollouts.native.engine import NativeEngine
from rollouts.trajectory import FINISH_REASONS

SETTINGS: list[dict[str, Any]] = [
    {"truncation": "bootstrap", "gamma": 1.0, "lam": 1.0},
    {"truncation": "bootstrap", "gamma": 0.9, "lam": 0.8},
    {"truncation": "zero", "gamma": 0.9, "lam": 1.0},
    {"truncation": "mask", "gamma": 1.0, "lam": 1.0},
    {"truncation": "bootstrap", "gamma": 1.0, "lam": 1.0, "mask_policy": "current"},
]


def position(self: Critic, ids: Tensor, rows: Tensor, columns: Tensor, positions: Tensor | None) -> Tensor:
    """The value of a state is its position index: that of the last token that has been read."""
    return columns.float() + 0 * sum(p.sum() for p in self.parameters())


class Engineered(NativeEngine):
    """The sampled tokens of the real engine, with finish reasons in turn, whatever the tokens are."""

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        samples = super().generate(requests)
        return [replace(s, finish_reason=FINISH_REASONS[n % len(FINISH_REASONS)]) for n, s in enumerate(samples)]


class Counted:
    """A filter that counts how often it is asked."""

    def __init__(self, run: Run) -> None:
        self.inner, self.calls = run.method.filter, 0

    def __call__(self, proposal: Proposal) -> Selection:
        self.calls += 1
        return self.inner(proposal)


def main() -> None:
    out, directory, *overrides = sys.argv[1:]
    Path(directory).mkdir()
    run = build_run(load_config(overrides), Path(directory), resume=False)
    Critic.forward = position
    run.worker.engine.__class__ = Engineered
    counted = Counted(run)
    run.method = replace(run.method, filter=counted)
    judge, seen = loop.judge, []

    def watched(run: Run, batch: Batch, values: Values) -> tuple[Tensor, Tensor, Tensor]:
        decided = judge(run, batch, values)
        cuts = batch.offsets_B1[1:-1].tolist()
        parts = [[x.tolist() for x in tensor.tensor_split(cuts)] for tensor in (values.values_N, *decided)]
        seen.append(
            [
                dict(zip(("values", "advantages", "targets", "included"), row, strict=True))
                for row in zip(*parts, strict=True)
            ]
        )
        for number, row in enumerate(seen[-1]):
            row |= {
                "prompt": len(batch.ids[number]) - len(row["values"]),
                "reason": FINISH_REASONS[number % len(FINISH_REASONS)],
                "reward": batch.rewards_B[number].item(),
                "bootstrap": values.bootstrap_B[number].item(),
            }
        return decided

    loop.judge = watched
    calls = []
    for number, settings in enumerate(SETTINGS, 1):
        for key, value in settings.items():
            setattr(run.config.algorithm, key, value)
        run.config.critic.lam = settings["lam"]
        before, updates = counted.calls, run.actor.updates
        loop.train_step(run, number)
        calls.append((counted.calls - before, run.actor.updates - updates))
    run.close(0)
    Path(out).write_text(json.dumps({"steps": seen, "calls": calls}))


if __name__ == "__main__":
    main()
