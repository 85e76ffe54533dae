"""How a run of a command begins and ends: signals, exit status, closing, what is said and what is left behind."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import NoReturn, Protocol, TypeVar

from mispo.system.failure import rank, say, say_failure
from mispo.system.interrupt import exit_at_once
from mispo.system.rundir import RunDir


class OpenRun(Protocol):
    """What a session needs of a run."""

    @property
    def directory(self) -> Path:
        """Where it writes; of several ranks the first one's choice."""
        ...

    @property
    def last_checkpoint(self) -> Path | None: ...

    @property
    def step(self) -> int:
        """The last step that was finished."""
        ...

    def close(self, exit_code: int) -> None: ...


R = TypeVar("R", bound=OpenRun)


class Use(Enum):
    """What a command does with a run directory."""

    BEGIN = "begins a run in it"
    ONCE = "begins a run on saved rollouts in it, which is not resumed"
    CONTINUE = "continues the run in it"
    READ = "leaves the run in it as it is"


def session(
    directory: RunDir,
    use: Use,
    build: Callable[[], R],
    work: Callable[[R], None],
    finish: Callable[[R], None] | None = None,
) -> int:
    """Build a run, work with it, close it; returns the exit status: 0, 1 if it failed, 130 after Ctrl-C or SIGTERM.

    finish: called with the closed run if all went well. RuntimeError and OSError are failures: they are shown, and
    unless the run is only read the trace goes to error.txt. ValueError is bad input and is raised again. A new run that
    was never built leaves no directory, except after a failure.
    """
    signal.signal(signal.SIGTERM, _interrupt)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    run: R | None = None
    try:
        run = build()
        with _closing(run):
            work(run)
        if finish:
            finish(run)
    except KeyboardInterrupt:
        exit_at_once()
        if run is None:
            _remove_if_unused(directory, use)
        if rank() == 0:
            say(_interrupted(run, directory, use))
        return 130
    except ValueError:
        if run is None:
            _remove_if_unused(directory, use)
        raise
    except (RuntimeError, OSError) as error:
        if use is Use.READ:
            say(f"error: {error}")
        else:
            resumable = run.last_checkpoint if run and use is not Use.ONCE else None
            say_failure(error, RunDir(run.directory) if run else directory, resumable)
        return 1
    return 0


def has_checkpoint(directory: RunDir) -> bool:
    """Return whether a checkpoint was finished there. Torch-free."""
    return any(directory.checkpoints.glob("step_*/state.json"))


@contextmanager
def _closing(run: OpenRun) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        exit_at_once()
        run.close(130)
        raise
    except BaseException:
        run.close(1)
        raise
    run.close(0)


def _remove_if_unused(directory: RunDir, use: Use) -> None:
    """Remove the directory of a new run, unless there was something in it before."""
    ours = {directory.config, directory.reference, directory.base}
    if use in (Use.BEGIN, Use.ONCE) and rank() == 0 and set(directory.root.iterdir()) <= ours:
        shutil.rmtree(directory.root)


def _interrupted(run: OpenRun | None, directory: RunDir, use: Use) -> str:
    if use is Use.READ:
        return "interrupted; nothing was written"
    if run is None:
        return "interrupted before the first step; nothing to resume"
    if run.last_checkpoint is None:
        return f"interrupted after step {run.step}; there is no checkpoint yet, so start a new run"
    said = f"interrupted after step {run.step}; the last checkpoint is {run.last_checkpoint.name}"
    return said if use is Use.ONCE else f"{said}\ncontinue with: mispo train --resume {directory.root}"


def _interrupt(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt
