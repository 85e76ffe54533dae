"""Where does the quickstart's mismatch come from, what of it goes through the routers, and what would replay change?

    python benchmarks/routing.py [--seeds 0] [--runs runs/routing]

Trains with rollouts 16 actor updates old, in fp32 and in bf16, with an attribution every few steps; then asks `mispo
attribute` what it would be from the last checkpoint of the fp32 run with other rollouts. Does what is missing under
--runs, one process of one thread at a time, and reads the tables from the runs' own metrics.jsonl and attribution/.
Delete the runs of an older commit first.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import Job, train_all
from writing import table, write_results

from mispo.metrics.diagnosis import Diagnosis
from mispo.monitor.advice import regime
from mispo.monitor.report.attribution import Measured, percent, read_attributions
from mispo.monitor.report.plots import label
from mispo.monitor.rows import read_rows
from mispo.system.rundir import RunDir

AT_ONCE = 1


@dataclass(frozen=True)
class Arm:
    """One run per seed: its name in the tables, and overrides."""

    name: str
    overrides: tuple[str, ...]


STALE = ("recipe=quickstart_stale", "trainer.steps=24", "router.attribute_every=10")
BF16 = "rollout.dtype=bf16"
ARMS = (Arm("fp32", STALE), Arm("bf16", (*STALE, BF16)))
WHAT_IF = (Arm("if bf16", (BF16,)), Arm("if bf16, on policy", (BF16, "rollout.lag=0")))
"""Overrides for `mispo attribute` on the last checkpoint of the first of ARMS."""

RUN_COLUMNS = (
    *("run", "seed", "greedy", "sampled", "accepted", "lowest", "agreement", "lowest"),
    *("k3", "confidence", "low"),
)
NAMES = ("weights", "precision", "rest")

ABOUT_RUNS = """Greedy, sampled: accuracy on 512 held-out problems, before → after RL. Accepted, lowest: share of
trajectories that the filter kept, mean over the steps and in the worst one. Agreement: share of the rollout's experts
that the trainer's own routers choose, likewise. k3: mismatch/k3, nats per token, median over the steps. Confidence:
moe/confidence_norm/mean, low: moe/low_confidence/mean, first → last step."""

ABOUT_SHARES = """Of log x with the trainer's own routing. rms: root mean square of log x; k3: KL of the rollout to
the trainer; nats per token. Of each cause: share of Var(log x) ± one standard error, in brackets what vanishes when
the rollout's routing is replayed; all: of log x as a whole. 128 trajectories of 16 prompts."""

ABOUT_ADVICE = """What the advice rests on. Accepted: share of the trajectories that the window accepts with the
trainer's own routing. Replay: what the rollout's routing brings, current: what current weights bring to the run as it
is, points ± one standard error. Correlation: of confidence and |log x|."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--runs", type=Path, default=Path("runs/routing"))
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    places = {(arm, seed): options.runs / f"{file_name(arm)}-{seed}" for arm in ARMS for seed in seeds}
    train_all([Job(path, (*arm.overrides, f"seed={seed}")) for (arm, seed), path in places.items()], AT_ONCE)
    runs = [[arm.name, str(seed), *run_row(read_rows(RunDir(path).metrics))] for (arm, seed), path in places.items()]
    for arm in WHAT_IF:
        for seed in seeds:
            path = places[arm, seed] = options.runs / f"{file_name(arm)}-{seed}"
            attribute(places[ARMS[0], seed], path, arm.overrides)
    found = [(arm.name, str(seed), one) for (arm, seed), path in places.items() for one in read_attributions(path)]
    titles = ("run", "seed", "step", "tokens", "rms", "k3", *map(label, NAMES), "all through routing")
    shares = [[name, seed, *share_row(one)] for name, seed, one in found]
    grounds = [[name, seed, str(one.step), *ground_row(one.diagnosis)] for name, seed, one in found if one.diagnosis]
    commands = [f"- {arm.name}: `mispo train {' '.join(arm.overrides)}`" for arm in ARMS]
    commands += [
        f"- {arm.name}: `mispo attribute` a copy of {ARMS[0].name}, `{' '.join(arm.overrides)}`" for arm in WHAT_IF
    ]
    body = [
        "\n".join(commands),
        "## Runs",
        ABOUT_RUNS.replace("\n", " "),
        table(RUN_COLUMNS, runs),
        "## Attributions",
        ABOUT_SHARES.replace("\n", " "),
        table(titles, shares),
        "## Grounds of the advice",
        ABOUT_ADVICE.replace("\n", " "),
        table(("run", "seed", "step", "accepted", "replay", "current", "correlation", "regime"), grounds),
    ]
    path = write_results("routing", "Routing: mismatch by cause, and replay", "\n\n".join(body), threads=1)
    sys.stdout.write(f"{path}\n")


def file_name(arm: Arm) -> str:
    return arm.name.replace(",", "").replace(" ", "_")


def attribute(run: Path, path: Path, overrides: Sequence[str]) -> None:
    """`mispo attribute` on a copy of a run, unless that was done; PATH.log has its output."""
    folder = RunDir(path).attribution
    if folder.is_dir():
        return
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(run, path, symlinks=True, ignore=shutil.ignore_patterns(folder.name, "rollouts", "*.html", "*.png"))
    with path.with_name(path.name + ".log").open("w") as output:
        subprocess.run(
            [sys.executable, "-m", "mispo.cli", "attribute", str(path), *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
        )
    # A what-if lies apart from the run's own, but this copy is nothing else.
    (written,) = folder.glob("step_*+*.json")
    written.rename(written.with_name(f"{written.name.partition('+')[0]}.json"))


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
    for key in ("moe/confidence_norm/mean", "moe/low_confidence/mean"):
        cells.append(f"{steps[0][key]:.3f} → {steps[-1][key]:.3f}")
    return cells


def share_row(measured: Measured) -> list[str]:
    """One attribution: causes, and what of them goes through routing."""
    found = measured.attribution
    parts = [found.parts[name] for name in NAMES]
    return [
        str(measured.step),
        f"{found.tokens:,}",
        f"{math.sqrt(found.variance + found.k1**2):.2g}",
        f"{found.k3:.2g}",
        *(f"{percent(part.share, part.share_error)} ({percent(part.mediated)})" for part in parts),
        percent(found.mediated, found.mediated_error),
    ]


def ground_row(diagnosis: Diagnosis) -> list[str]:
    """What the advice of one attribution rests on."""
    gains = ((diagnosis.replay_gain, diagnosis.replay_gain_error), (diagnosis.fresh_gain, diagnosis.fresh_gain_error))
    return [
        f"{diagnosis.free:.1%}",
        *(f"{100 * gain:+.1f} ± {100 * error:.1f}" for gain, error in gains),
        f"{diagnosis.correlation:+.2f} ± {diagnosis.correlation_error:.2f}",
        regime(diagnosis),
    ]


if __name__ == "__main__":
    main()
