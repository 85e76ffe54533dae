"""Who says what went wrong: one rank of a run, and rather the one that knows the cause than those that lost it."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

PATIENCE_S = 5.0
"""Seconds for which another rank than the first keeps its error back: if the first has the same one, it has said so
by then, and the launcher has ended the others."""

LOST_PATIENCE_S = 1.0
"""The same for a rank that has only lost another one."""

LOST = re.compile(
    r"(Connection closed by peer|Read error|Write error|Timed out waiting|Socket closed)[^\n]*?(?=\. |\n|$)"
)
"""What gloo says when the other end is gone."""


def rank() -> int:
    """Number of this process among those that the launcher has started."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """A line for people, on stderr; of another rank than the first, with its number."""
    sys.stderr.write(f"rank {rank()}: {text}\n" if rank() else f"{text}\n")


def say_bad_input(error: ValueError) -> None:
    """The error, once for all ranks that have it."""
    _wait(PATIENCE_S, signal.SIG_DFL)
    for line in str(error).splitlines():
        say(f"error: {line}")


def say_failure(error: Exception, directory: Path, checkpoint: Path | None) -> None:
    """The error that is being handled, and how to go on, unless another rank has said its own.

    The trace goes to error.txt in the run directory; the rank that creates that file is the one that speaks.
    """
    lost = _lost(error)
    # Launchers end the ranks that are left; one of them still has to say how to go on.
    _wait(LOST_PATIENCE_S if lost else PATIENCE_S, signal.SIG_IGN if lost else signal.SIG_DFL)
    trace, path = traceback.format_exc(), directory / "error.txt"
    where = f"The full trace is in {path}."
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(trace)
    except FileExistsError:
        return
    except OSError:  # the very disk may be the error
        where = trace
    say(f"error: {lost or error}\n{where}")
    if checkpoint:
        say(f"The last checkpoint is {checkpoint.name}; continue with: mispo train --resume {directory}")


def _wait(seconds: float, on_sigterm: signal.Handlers) -> None:
    if rank():
        signal.signal(signal.SIGTERM, on_sigterm)
        time.sleep(seconds)


def _lost(error: Exception) -> str | None:
    """What to say where the error is only that another rank does not answer; else None."""
    found = LOST.search(str(error))
    if found:
        reason = found.group()
    elif type(error).__name__ == "DistBackendError":  # NCCL
        reason = str(error).splitlines()[0]
    else:
        return None
    return (
        f"another rank has died or is out of reach (rank {rank()} waited for it: {reason}). The launcher's lines name "
        "it; exit code -9 is a kill, often because the host's memory was full"
    )
