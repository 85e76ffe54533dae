"""Is a run that was killed again and again the run that was never killed, bit for bit?

    python benchmarks/kill_resume.py [--kills 20] [--steps 12] [--seed 0]

One run without an interruption; then the same command, killed (SIGKILL) at a random moment and started again, until
`--kills` kills have hit it; then to its end. Whenever a run ends before its kill, the next one starts anew. Compares
metrics (times aside), sampled tokens with their log-probs, weights and optimizer states.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from writing import table, write_results

from mispo.monitor.rows import read_rows

OPTIONS = (
    *("recipe=smoke", "rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "warm_start.steps=30"),
    *("data.task_args.max_n=63", "data.eval_size=8", "rollout.lag=2", "algorithm=mispo_quantile"),
    *("checkpoint.every=2", "tracking=disabled"),
)
TIMES = ("timing_s/", "perf/")
COLUMNS = ["completion_ids", "rollout_logprobs", "reward", "multiplicity", "advantage_mean"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    choose = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"
        start = time.monotonic()
        finish(straight, options.steps)
        seconds = time.monotonic() - start
        kills, rows = 0, []
        while kills < options.kills:
            where = kill(killed, options.steps, choose.uniform(0.3, 0.9) * seconds)
            if where is None:
                rows += compare(straight, killed, options.steps, kills)
                shutil.rmtree(killed)
                continue
            kills += 1
            sys.stdout.write(f"kill {kills}: {where}\n")
            sys.stdout.flush()
        if (killed / "metrics.jsonl").exists() and not any((killed / "checkpoints").glob("step_*/state.json")):
            shutil.rmtree(killed)  # killed before its first checkpoint: there is nothing to go on from
        finish(killed, options.steps)
        rows += compare(straight, killed, options.steps, kills)
    same = all(row[-1] == "identical" for row in rows)
    body = (
        f"{kills} kills at random moments of runs of {options.steps} steps, checkpoints every 2: "
        f"{'every run that was resumed ended bit for bit as the straight one' if same else '**NOT IDENTICAL**'}.\n\n"
        + table(("kills so far", "metrics", "sampled tokens", "weights and optimizers", "run"), rows)
    )
    sys.stdout.write(f"{write_results('kill_resume', 'Killed and resumed', body, threads=1)}\n")
    sys.exit(0 if same else 1)


def command(run: Path, steps: int) -> list[str]:
    return [sys.executable, "-m", "mispo.cli", "train", *OPTIONS, f"trainer.steps={steps}", f"run_dir={run}"]


def finish(run: Path, steps: int) -> None:
    """To the end; the same command continues what is there."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command(run, steps), env=environment, stdout=subprocess.DEVNULL, check=True)


def kill(run: Path, steps: int, after: float) -> str | None:
    """Start or continue, and kill after so many seconds; where it was, None if it had ended before."""
    if (run / "metrics.jsonl").exists() and not any((run / "checkpoints").glob("step_*/state.json")):
        shutil.rmtree(run)
    process = subprocess.Popen(
        command(run, steps),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        process.wait(after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        count = len((run / "metrics.jsonl").read_bytes().splitlines()) if (run / "metrics.jsonl").exists() else 0
        return f"after step {count - 1}" if count else "before step 1"
    return None


def compare(straight: Path, killed: Path, steps: int, kills: int) -> list[list[str]]:
    """One line of the table."""
    a, b = (
        [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in read_rows(run / "metrics.jsonl")]
        for run in (straight, killed)
    )
    tokens = all(
        tables[0].equals(tables[1])
        for step in range(1, steps + 1)
        for tables in [
            [pq.read_table(r / f"rollouts/step_{step}.parquet", columns=COLUMNS) for r in (straight, killed)]
        ]
    )
    found = (a == b, tokens, all(same_tensors(straight, killed, steps)))
    words = ["identical" if same else "different" for same in found]
    return [[str(kills), *words, "identical" if all(found) else "different"]]


def same_tensors(straight: Path, killed: Path, steps: int) -> list[bool]:
    """Whether each tensor of the last checkpoints is the same."""
    first, second = (run / f"checkpoints/step_{steps}" for run in (straight, killed))
    same: list[Any] = []
    for path in first.rglob("*.safetensors"):
        a, b = load_file(path), load_file(second / path.relative_to(first))
        same += [a.keys() == b.keys(), *(torch.equal(tensor, b[name]) for name, tensor in a.items())]
    return same


if __name__ == "__main__":
    main()
