"""docs/one_step.py against a run: from the same tokens and weights the same numbers."""

import runpy
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from model.build import build_policy
from model.critic import Critic
from support.runs import python, train

SCRIPT = Path(__file__).parents[2] / "docs/one_step.py"

ONE_UPDATE = (
    "trainer.steps=1",
    "trainer.actor_minibatches=1",
    "trainer.critic_minibatches=1",
    "trainer.actor_lr=0",
    "trainer.critic_lr=0",
)
"""The checkpoint of a run that moves nothing has the weights that its only step was scored with."""

LIVELY = ("rollout.dtype=bf16", "rollout.max_new_tokens=8", "critic.head_init_std=0.3", "data.eval_size=0")
"""A mismatch that the filter sees, truncated trajectories, and values that differ."""


def the_step(run: Path, **constants: Any) -> dict[str, Any]:
    """The step of a run by docs/one_step.py, with other constants than the report's."""
    script = runpy.run_path(str(SCRIPT))
    one_step = script["one_step"]
    one_step.__globals__.update(constants)
    checkpoint = run / "checkpoints/latest"
    policy, _ = build_policy(None, str(checkpoint / "actor"))
    critic = Critic.from_policy(policy, 0.0, seed=0)
    critic.load_state_dict(load_file(checkpoint / "critic.safetensors"))
    rows = pq.read_table(run / "rollouts/step_1.parquet").to_pylist()
    prompts, completions, logprobs = (
        [torch.tensor(row[name]) for row in rows] for name in ("prompt_ids", "completion_ids", "rollout_logprobs")
    )
    rewards, cut = [row["reward"] for row in rows], [row["finish_reason"] == "length" for row in rows]
    numbers: dict[str, Any] = one_step(policy, critic, prompts, completions, logprobs, rewards, cut)
    return numbers


@pytest.mark.parametrize(
    ("settings", "constants"),
    [
        ((), {}),
        (
            (
                "algorithm.filter.token_bounds=[0.99,1.02]",
                "algorithm.filter.trajectory_bounds=[0.998,1.004]",
                "algorithm.advantage.gamma=0.9",
                "algorithm.advantage.lam=0.8",
                "critic.lam=0.8",
            ),
            {"TOKEN_BOUNDS": (0.99, 1.02), "TRAJECTORY_BOUNDS": (0.998, 1.004), "GAMMA": 0.9, "LAM": 0.8},
        ),
    ],
    ids=["report", "other constants"],
)
def test_one_step_computes_the_numbers_of_a_run(
    tmp_path: Path, settings: tuple[str, ...], constants: dict[str, Any]
) -> None:
    row = train(tmp_path / "run", *ONE_UPDATE, *LIVELY, *settings)[1]
    found = the_step(tmp_path / "run", **constants)
    table = pq.read_table(tmp_path / "run/rollouts/step_1.parquet")
    kept, cut = table["multiplicity"].to_pylist(), [reason == "length" for reason in table["finish_reason"].to_pylist()]
    assert 0 < sum(kept) < len(kept)
    assert 0 < sum(cut) < len(cut)
    assert (row["mis/token_accept"] < 1) == bool(constants)
    assert found["multiplicity"] == kept
    for name in ("log_rho", "advantage_mean", "target_mean", "bootstrap"):
        assert found[name] == pytest.approx(table[name].to_pylist(), rel=1e-6, abs=2e-6), name
    for name in ("actor/loss", "actor/grad_norm", "critic/loss", "critic/grad_norm"):
        assert found[name] == pytest.approx(row[name], rel=1e-5, abs=1e-6), name


def test_the_script_says_what_it_did(tmp_path: Path) -> None:
    done = python(str(SCRIPT), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 16 + 2
    for word in ("cut", "ended", "accepted", "rejected", "R 0", "R 1"):
        assert any(word in line for line in lines), word
    assert lines[-2].startswith("actor: loss ")
    assert lines[-1].startswith("critic: loss ")
