"""Does the quickstart teach the model to think, on every seed, and does the control learn nothing?

    python benchmarks/learning.py [--seeds 0,1,2,3,4] [--runs runs/learning]

Runs what is missing under --runs, two processes of one thread each, and reads the table from the runs' own
metrics.jsonl. About an hour on two cores. Delete the runs of an older commit first.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import Job, train_all
from writing import table, write_results

from mispo.monitor.rows import read_rows

AT_ONCE = 2


@dataclass(frozen=True)
class Arm:
    """One line of experiments: name in the table, overrides, and what every seed must show."""

    name: str
    overrides: tuple[str, ...]
    least: float = 0.0
    most: float = 1.0


ARMS = (
    Arm("quickstart", ("recipe=quickstart",), least=0.85),
    Arm("rewards permuted", ("recipe=quickstart", "reward.permute=true"), most=0.45),
    Arm("quickstart_stale", ("recipe=quickstart_stale",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    jobs = [(arm, seed, options.runs / f"{arm.name.replace(' ', '_')}-{seed}") for arm in ARMS for seed in seeds]
    train_all([Job(directory, (*arm.overrides, f"seed={seed}")) for arm, seed, directory in jobs], AT_ONCE)
    rows = [row_of(arm, seed, read_rows(directory / "metrics.jsonl")) for arm, seed, directory in jobs]
    header = ("arm", "seed", "greedy", "sampled", "tokens", "accepted", "lowest", "forced careful", "guess", "met")
    body = (
        "512 held-out problems, before → after RL. Greedy: one answer per problem; sampled: one at temperature 1; "
        "tokens: mean length of the sampled ones. Accepted, lowest: share of trajectories that the filter kept, mean "
        "over all steps and in the worst one. Forced careful: greedy accuracy before RL if the first character of a "
        "careful trace is given. Guess: the most frequent answer. Met: greedy ≤ 0.45 before; after, ≥ 0.85 for "
        "quickstart and ≤ 0.45 for permuted rewards.\n\n" + table(header, rows)
    )
    sys.stdout.write(f"{write_results('learning', 'Learning on the quickstart', body, threads=1)}\n")


def row_of(arm: Arm, seed: int, rows: list[dict[str, Any]]) -> list[str]:
    """One line of the table, from metrics.jsonl alone."""
    first, last, steps = rows[0], rows[-1], rows[1:]
    (greedy,) = [key for key in first if key.endswith("/greedy")]
    (sampled,) = [key for key in first if "/avg@" in key]
    accepted = [row["mis/traj_accept"] for row in steps]
    met = first[greedy] <= 0.45 and arm.least <= last[greedy] <= arm.most
    return [
        arm.name,
        str(seed),
        *(f"{first[key]:.3f} → {last[key]:.3f}" for key in (greedy, sampled)),
        f"{first['eval/response_length']:.0f} → {last['eval/response_length']:.0f}",
        f"{sum(accepted) / len(accepted):.3f}",
        f"{min(accepted):.3f}",
        f"{first['reference/forced_careful']:.3f}",
        f"{first['reference/constant_guess']:.3f}",
        "yes" if met else "NO",
    ]


if __name__ == "__main__":
    main()
