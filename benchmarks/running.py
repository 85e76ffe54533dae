"""Many runs of `mispo train`, a few at a time, each in a directory of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """A run directory and the overrides that it is trained with."""

    directory: Path
    overrides: tuple[str, ...]


def train_all(jobs: Sequence[Job], at_once: int) -> None:
    """Train what is not there yet, `at_once` processes of one thread each. Runs of an older commit are not told apart.

    CalledProcessError for a run that fails; DIRECTORY.log has its output.
    """
    with ThreadPoolExecutor(at_once) as executor:
        list(executor.map(_train, jobs))


def _train(job: Job) -> None:
    if (job.directory / "report.html").exists():
        return
    command = [sys.executable, "-m", "mispo.cli", "train", *job.overrides, f"run_dir={job.directory}"]
    log = job.directory.with_name(job.directory.name + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        subprocess.run(
            [*command, "tracking.wandb=disabled"],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            check=True,
        )
