"""Start `mispo` as a user does, in a process of its own, and read what it left behind."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MICRO = [
    "recipe=smoke",
    "tracking.wandb=disabled",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=4",
    "warm_start.steps=30",
    "data.task_args.max_n=63",
    "data.eval_size=8",
]
"""A run of a few seconds."""

TIMES = ("timing_s/", "perf/")


def mispo(
    *arguments: str, cwd: Path, ranks: int = 1, timeout: float = 400, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command; nothing is checked."""
    launcher = [sys.executable, "-P"]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    return subprocess.run(
        [*launcher, "-m", "mispo.cli", *arguments],
        cwd=cwd,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def train(directory: Path, *overrides: str, ranks: int = 1, resume: bool = False) -> list[dict[str, Any]]:
    """A run that must succeed, in `directory`; its rows."""
    if resume:
        arguments = ["train", "--resume", str(directory), *overrides]
    else:
        arguments = ["train", *MICRO, f"run_dir={directory}", *overrides]
    done = mispo(*arguments, cwd=directory.parent, ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return rows_of(directory)


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]
