"""Where does the quickstart's mismatch come from, what of it goes through the routers, and what does replay change?

    python benchmarks/routing.py [--seeds 0] [--runs runs/routing]

Runs with rollouts in fp32 and bf16, with and without router replay, 16 actor updates old and on policy; an attribution
every few steps. Trains what is missing under --runs, one process of one thread at a time, and reads the tables from the
runs' own metrics.jsonl and attribution/. About half an hour on an idle core. Delete the runs of an older commit first.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import Job, train_all
from writing import table, write_results

from mispo.monitor.advice import paragraph
from mispo.monitor.attribution import Measured, percent, read_attributions
from mispo.monitor.attribution_figure import label
from mispo.monitor.rows import read_rows

AT_ONCE = 1

BF16, REPLAY = "rollout.dtype=bf16", "router.replay=rollout"


@dataclass(frozen=True)
class Arm:
    """One run per seed: its name in the tables, and overrides."""

    name: str
    overrides: tuple[str, ...]


STALE = ("recipe=quickstart_stale", "router.attribute_every=10")
FRESH = ("recipe=quickstart", "router.attribute_every=4")
ARMS = (
    Arm("stale fp32", STALE),
    Arm("stale bf16", (*STALE, BF16)),
    Arm("stale bf16 replay", (*STALE, BF16, REPLAY)),
    Arm("on policy bf16", (*FRESH, BF16)),
    Arm("on policy bf16 replay", (*FRESH, BF16, REPLAY)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs/routing"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    jobs = [(arm, seed, options.runs / f"{arm.name.replace(' ', '_')}-{seed}") for arm in ARMS for seed in seeds]
    train_all([Job(directory, (*arm.overrides, f"seed={seed}")) for arm, seed, directory in jobs], AT_ONCE)
    runs, shares, advice = [], [], []
    for arm, seed, directory in jobs:
        about = [arm.name, str(seed)]
        runs.append([*about, *run_row(read_rows(directory / "metrics.jsonl"))])
        measured = read_attributions(directory)
        shares += [[*about, *share_row(one)] for one in measured]
        standing = measured[-1].standing
        if standing is not None:
            advice.append(f"- {arm.name}, seed {seed}, step {measured[-1].step}: {paragraph(standing)}")
    parts = [f"{label(name)} (through routing)" for name in ("weights", "precision", "rest")]
    body = "\n\n".join(
        [
            f"{len(ARMS)} runs for each of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}: "
            + "; ".join(f"{arm.name}: `{' '.join(arm.overrides)}`" for arm in ARMS)
            + ".",
            "## The runs",
            "Greedy, sampled: accuracy on 512 held-out problems, before → after RL. Accepted, lowest: share of "
            "trajectories that the filter kept, mean over the steps and in the worst one. Agreement: share of the "
            "rollout's experts that the trainer's own routers choose, likewise. k3: mismatch/k3 as the run trains, "
            "with replay where it replays, nats per token, median over the steps. Confidence: "
            "moe/confidence_norm/mean, low: moe/low_confidence/mean, first → last step.",
            table(
                (
                    *("run", "seed", "greedy", "sampled", "accepted", "lowest"),
                    *("agreement", "lowest", "k3", "confidence", "low"),
                ),
                runs,
            ),
            "## Attributions",
            "Of log x with the trainer's own routing, also in runs that replay. rms: root mean square of log x, nats. "
            "Of each cause: share of Var(log x) ± one standard error, in brackets what vanishes when the rollout's "
            "routing is replayed; all: of log x as a whole.",
            table(("run", "seed", "step", "trajectories", "tokens", "rms", *parts, "all through routing"), shares),
            "## Advice in the last of them",
            "\n".join(advice),
        ]
    )
    sys.stdout.write(f"{write_results('routing', 'Routing: mismatch by cause, and replay', body, threads=1)}\n")


def run_row(rows: list[dict[str, Any]]) -> list[str]:
    """What the run came to, from metrics.jsonl alone."""
    first, last, steps = rows[0], rows[-1], rows[1:]
    (greedy,) = [key for key in first if key.endswith("/greedy")]
    (sampled,) = [key for key in first if "/avg@" in key]
    cells = [f"{first[key]:.3f} → {last[key]:.3f}" for key in (greedy, sampled)]
    for key in ("mis/traj_accept", "moe/expert_agreement"):
        values = [row[key] for row in steps]
        cells += [f"{statistics.fmean(values):.3f}", f"{min(values):.3f}"]
    cells.append(f"{statistics.median(row['mismatch/k3'] for row in steps):.2g}")
    return [*cells, *(change(steps, f"moe/{name}/mean") for name in ("confidence_norm", "low_confidence"))]


def change(steps: list[dict[str, Any]], key: str) -> str:
    """A metric in the first and the last step."""
    return f"{steps[0][key]:.3f} → {steps[-1][key]:.3f}"


def share_row(measured: Measured) -> list[str]:
    """One attribution."""
    found = measured.attribution
    parts: Mapping[str, Any] = found.parts
    return [
        str(measured.step),
        str(found.trajectories),
        f"{found.tokens:,}",
        f"{math.sqrt(found.variance + found.k1**2):.2g}",
        *(f"{percent(p.share, p.share_error)} ({percent(p.mediated)})" for p in parts.values()),
        percent(found.mediated, found.mediated_error),
    ]


if __name__ == "__main__":
    main()
