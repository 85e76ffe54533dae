"""Where does the time of a quickstart step go?

    python benchmarks/step.py [--steps 8] [key=value …]

Runs `mispo train recipe=quickstart` in a directory of its own and reads the phases from its metrics.jsonl, as shares
of the step; the first two steps (short completions, cold caches) are left out.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from writing import table, write_results

from mispo.monitor.rows import read_rows

COLD = 2
PHASES = {
    "rollout": "sample 256 trajectories, with log-probs and routing confidence",
    "reward": "verifier in a child process",
    "score": "log-probs, entropy, routing and values, before any update",
    "critic": "12 critic updates",
    "actor": "4 actor updates",
    "sync": "weights to the rollout engine, and the check that they arrived",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        arguments = ["recipe=quickstart", "tracking=disabled", f"run_dir={run}", f"trainer.steps={options.steps}"]
        subprocess.run([sys.executable, "-m", "mispo.cli", "train", *arguments, *options.overrides], check=True)
        rows = read_rows(run / "metrics.jsonl")[1 + COLD :]
    total = sum(row["timing_s/step"] for row in rows)
    shares = {phase: sum(row[f"timing_s/{phase}"] for row in rows) / total for phase in PHASES}
    lines = [[phase, f"{shares[phase]:.1%}", meaning] for phase, meaning in PHASES.items()]
    lines.append(["other", f"{1 - sum(shares.values()):.1%}", "packing, advantages, filter, metrics"])
    tokens = sum(row["perf/tokens_per_s"] * row["timing_s/step"] for row in rows)
    body = (
        f"Steps {COLD + 1} to {options.steps}: {total / len(rows):.1f} s each, "
        f"{tokens / total:,.0f} generated tokens per second of the whole step, "
        f"{sum(row['response_length/mean'] for row in rows) / len(rows):.0f} tokens a completion.\n\n"
        + table(("phase", "share", "what"), lines)
    )
    sys.stdout.write(f"{write_results('step', 'A quickstart step', body, torch.get_num_threads())}\n")


if __name__ == "__main__":
    main()
