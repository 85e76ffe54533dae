"""Checkpoint directories: written whole or not at all, found again, kept or dropped. Torch-free.

step_N is written as step_N.tmp and renamed, then the link `latest` moves. state.json lists the other files with their
sizes, so that one that was cut short later (a full disk, a broken copy) is noticed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def finish_checkpoint(temporary: Path, final: Path, state: Mapping[str, Any]) -> None:
    """Turn a directory in which everything but state.json has been written into a checkpoint.

    state: `step` and `states`, see states.py.
    """
    files = [path for path in sorted(temporary.rglob("*")) if path.is_file()]
    sizes = {str(path.relative_to(temporary)): path.stat().st_size for path in files}
    described = temporary / "state.json"
    described.write_text(json.dumps({**state, "files": sizes}, indent=2))
    for path in (*files, described):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    temporary.rename(final)
    link = final.with_name(".latest.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    link.replace(final.with_name("latest"))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return `step`, `states` and `files` of a checkpoint."""
    state: dict[str, Any] = json.loads((checkpoint / "state.json").read_text())
    return state


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoints that were finished, oldest first."""
    finished = [p for p in directory.glob("step_*") if p.suffix != ".tmp"]
    return sorted(finished, key=lambda path: int(path.name.removeprefix("step_")))


def superfluous(checkpoints: Sequence[Path], keep_last: int, keep_best: int) -> list[Path]:
    """Return the checkpoints that are neither among the last nor among the best of those with a score."""
    scores = [None if keep_best == 0 or torn(path) else score_of(path) for path in checkpoints]
    # Of equal scores the later one wins: it has been trained longer.
    ranked = sorted((score, number) for number, score in enumerate(scores) if score is not None)
    best = {checkpoints[number] for _, number in ranked[max(0, len(ranked) - keep_best) :]}
    return [path for path in checkpoints[:-keep_last] if path not in best]


def score_of(checkpoint: Path) -> float | None:
    """Return the greedy accuracy on held-out problems, if it was measured at the checkpoint's step."""
    state = read_state(checkpoint)
    evaluation = state["states"]["evaluation"]
    return evaluation["score"] if evaluation["step"] == state["step"] else None


def newest_checkpoint(directory: Path) -> tuple[Path, list[str]]:
    """Return the newest whole checkpoint, and what is wrong with newer ones. ValueError if there is none."""
    problems: list[str] = []
    for checkpoint in reversed(list_checkpoints(directory)):
        problem = torn(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems.append(problem)
    reasons = f" ({'; '.join(problems)})" if problems else ""
    raise ValueError(f"--resume: {directory} holds no whole checkpoint{reasons}; start a new run without --resume")


def torn(checkpoint: Path) -> str | None:
    """Return what is missing from a checkpoint, None if it is whole."""
    try:
        sizes = read_state(checkpoint)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{checkpoint / 'state.json'} cannot be read ({error})"
    for name, size in sizes.items():
        path = checkpoint / name
        held = path.stat().st_size if path.is_file() else None
        if held != size:
            return f"{path} {'is missing' if held is None else f'has {held} bytes of {size}'}"
    return None
