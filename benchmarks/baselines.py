"""Every method on the quickstart task, on policy and with stale rollouts.

    python benchmarks/baselines.py [--seeds 0,1,2] [--runs runs/baselines] [--recipe quickstart]

The warm start of a seed is trained once; all methods start from it, on the same problems, with the same learning
rates and numbers of steps. No method was tuned: this compares them at the recipe's settings, which were chosen with
MIS-PO. Trains what is missing under --runs, two processes of one thread each, and reads the table from the runs' own
metrics.jsonl. About two hours on two cores. Delete the runs of an older commit first.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from running import Job, train_all
from writing import table, write_results

from mispo.monitor.rows import read_rows

AT_ONCE = 2

STALENESS = 16
"""Actor updates that the rollouts of the second table lag behind: four steps."""

STEPS = {0: 16, STALENESS: 24}
"""Training steps at each staleness: those of the quickstart; and some more where the first rollouts are all alike."""

MISPO_FAMILY = ("mispo_quantile", "mispo_metropolis", "token_only", "random_reject", "no_filter")
PPO_FAMILY = ("tis", "icepop")
SAME_ON_POLICY = dict.fromkeys(MISPO_FAMILY, "mispo") | dict.fromkeys(PPO_FAMILY, "ppo")
"""With x = π_old/π_rollout = 1 these are the run of another method, and are not trained again."""

METHODS = ("mispo", *MISPO_FAMILY, "ppo", *PPO_FAMILY, "grpo", "dr_grpo", "dapo", "gspo", "cispo")

Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=Path("runs/baselines"))
    parser.add_argument("--recipe", default="quickstart")
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    starts = {seed: Job(options.runs / f"start-{seed}", start_of(options.recipe, seed)) for seed in seeds}
    train_all(list(starts.values()), AT_ONCE)
    jobs = {
        (method, staleness, seed): Job(
            options.runs / f"{method}-{staleness}-{seed}",
            overrides_of(options.recipe, method, staleness, seed, starts[seed].directory),
        )
        for seed in seeds
        for staleness in STEPS
        for method in METHODS
        if staleness or method not in SAME_ON_POLICY
    }
    train_all(list(jobs.values()), AT_ONCE)
    runs = {key: read_rows(job.directory / "metrics.jsonl") for key, job in jobs.items()}
    body = "\n\n".join([explanation(options.recipe, seeds), *(section(runs, staleness, seeds) for staleness in STEPS)])
    sys.stdout.write(f"{write_results('baselines', 'All methods, one trainer', body, threads=1)}\n")


def start_of(recipe: str, seed: int) -> tuple[str, ...]:
    """A step that does not move the actor: its checkpoint is the warm start."""
    return (f"recipe={recipe}", f"seed={seed}", "trainer.steps=1", "trainer.actor_lr=0", "data.eval_size=4")


def overrides_of(recipe: str, method: str, staleness: int, seed: int, start: Path) -> tuple[str, ...]:
    """A method from the warm start of its seed."""
    return (
        *(f"recipe={recipe}", f"algorithm={method}", f"seed={seed}", f"rollout.lag={staleness}"),
        *("model.preset=null", f"model.path={start}/checkpoints/step_1/actor", "warm_start.steps=0"),
        *(f"trainer.steps={STEPS[staleness]}", "tracking.rollouts_every=0"),
    )


def explanation(recipe: str, seeds: Sequence[int]) -> str:
    """What the columns mean, and what the numbers do not say."""
    return (
        f"`recipe={recipe}`, seeds {', '.join(map(str, seeds))}; each seed's methods start from the same "
        "warm-started weights. Mean over the seeds, lowest – highest in brackets. Greedy, sampled: accuracy on the "
        "held-out problems after RL. Reward: mean training reward over all steps: more for a method that learns "
        "earlier. Accepted: share of trajectories that the filter kept; clipped: share of tokens whose gradient the "
        "clip stopped; KL: of rollout and old policy, k3, nats per token; all three are means over the "
        "steps.\n\n"
        "Learning rates and all else are the recipe's, chosen with MIS-PO and tuned for no other method. A few "
        "seeds of a tiny model on one task do not rank methods; they show what each one does at the same settings."
    )


def section(runs: Mapping[tuple[str, int, int], Rows], staleness: int, seeds: Sequence[int]) -> str:
    """The table at one staleness."""
    before = [greedy(runs["mispo", staleness, seed][0]) for seed in seeds]
    title = f"rollouts {staleness} actor updates old" if staleness else "on policy"
    header = ("method", "greedy", "sampled", "tokens", "reward", "accepted", "clipped", "KL")
    lines = [
        line(method, [runs[method, staleness, seed] for seed in seeds])
        if (method, staleness, seeds[0]) in runs
        else [method, f"same run as {SAME_ON_POLICY[method]}", *[""] * (len(header) - 2)]
        for method in METHODS
    ]
    note = f"{STEPS[staleness]} steps. Before RL, greedy: {spread(before)}."
    if not staleness:
        note += (
            " In fp32 rollout and trainer agree to rounding, x = 1: every filter keeps every sample once and every "
            "correction is 1, so the MIS-PO family is one run and PPO with a correction another (a test pins it)."
        )
    return f"## {title[0].upper()}{title[1:]}\n\n{note}\n\n{table(header, lines)}"


def line(method: str, runs: Sequence[Rows]) -> list[str]:
    """A method's row."""
    last = [rows[-1] for rows in runs]
    return [
        method,
        spread([greedy(row) for row in last]),
        spread([next(row[key] for key in row if "/avg@" in key) for row in last]),
        f"{statistics.mean(row['eval/response_length'] for row in last):.0f}",
        f"{mean_of(runs, 'reward/mean'):.3f}",
        f"{mean_of(runs, 'mis/traj_accept'):.3f}",
        f"{mean_of(runs, 'actor/clip_frac'):.3f}",
        f"{mean_of(runs, 'mismatch/k3'):.1e}",
    ]


def greedy(row: Mapping[str, Any]) -> float:
    """Accuracy of the greedy answers."""
    return next(row[key] for key in row if key.startswith("eval/") and key.endswith("/greedy"))


def mean_of(runs: Sequence[Rows], metric: str) -> float:
    """Over all steps of all seeds that have it (a step without an actor update has no clipping)."""
    return statistics.mean(row[metric] for rows in runs for row in rows[1:] if metric in row)


def spread(values: Sequence[float]) -> str:
    """Mean (lowest – highest)."""
    return f"{statistics.mean(values):.3f} ({min(values):.2f} – {max(values):.2f})"


if __name__ == "__main__":
    main()
