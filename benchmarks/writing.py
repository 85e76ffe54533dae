"""What every benchmark writes: a Markdown page with the command, commit, date and machine above its table."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("BENCHMARK_RESULTS") or Path(__file__).parent / "results")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_results(name: str, title: str, body: str, threads: int) -> Path:
    """benchmarks/results/<name>.md; returns its path. threads: per process, as torch was told."""
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    page = (
        f"# {title}\n\n"
        f"`{command}` · {date.today().isoformat()} · commit {commit()} · {machine()}, "
        f"{threads} thread{'s' if threads > 1 else ''} per process\n\n{body.strip()}\n"
    )
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(page, encoding="utf-8")
    return path


def commit() -> str:
    """The short hash of HEAD, marked where the code was changed since."""
    root = Path(__file__).parent
    head = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=root, text=True).strip()
    dirty = subprocess.check_output(
        ["git", "status", "--porcelain", "--", "../mispo", "../model", "../rollouts", "../rewards", "../recipes"],
        cwd=root,
        text=True,
    )
    return head + (" with changes" if dirty.strip() else "")


def machine() -> str:
    """Processor or accelerator, cores, torch."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"{processor()}, {os.cpu_count()} cores, torch {torch.__version__}"


def processor() -> str:
    """The processor's own name where Linux tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
