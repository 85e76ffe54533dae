"""Report an error from one rank of a run: if possible from the rank that knows the cause."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path

from mispo.system.rundir import RunDir

PATIENCE_S = 5.0
"""Seconds that ranks other than the first wait before they show an error. If the first rank has the same error, it has
shown it by then, and the launcher has ended the others."""

LOST_PATIENCE_S = 1.0
"""The same for a rank whose error is only that another rank does not answer."""

LOST = re.compile(
    r"(Connection closed by peer|Read error|Write error|Timed out waiting|Socket closed)[^\n]*?(?=\. |\n|$)"
)
"""Messages of gloo when the other process is gone."""


def rank() -> int:
    """Return the number of this process among those that the launcher has started."""
    return int(os.environ.get("RANK", "0"))


def say(text: str) -> None:
    """Write a line for people on stderr; ranks other than the first put their number before it."""
    sys.stderr.write(f"rank {rank()}: {text}\n" if rank() else f"{text}\n")


def say_bad_input(error: ValueError) -> None:
    """Show the error once for all ranks that have it."""
    _wait(PATIENCE_S, signal.SIG_DFL)
    for line in str(error).splitlines():
        say(f"error: {line}")


def say_failure(error: Exception, directory: RunDir, checkpoint: Path | None) -> None:
    """Show the error that is being handled, and how to resume, unless another rank has shown one.

    The trace goes to error.txt in the run directory; only the rank that creates this file says anything. checkpoint:
    the last one, None if there is none.
    """
    lost = _lost(error)
    # Launchers end the ranks that are left; one of them still has to say how to resume.
    _wait(LOST_PATIENCE_S if lost else PATIENCE_S, signal.SIG_IGN if lost else signal.SIG_DFL)
    trace = traceback.format_exc()
    where = f"The full trace is in {directory.error}."
    try:
        with directory.error.open("x", encoding="utf-8") as file:
            file.write(trace)
    except FileExistsError:
        return
    except OSError:  # the disk itself may be the error
        where = trace
    say(f"error: {lost or error}\n{where}")
    if checkpoint:
        say(f"The last checkpoint is {checkpoint.name}; continue with: mispo train --resume {directory.root}")


def _wait(seconds: float, on_sigterm: signal.Handlers) -> None:
    if rank():
        signal.signal(signal.SIGTERM, on_sigterm)
        time.sleep(seconds)


def _lost(error: Exception) -> str | None:
    """Return a message if the error is only that another rank does not answer, else None."""
    match = LOST.search(str(error))
    if match:
        reason = match.group()
    elif type(error).__name__ == "DistBackendError":  # NCCL
        reason = str(error).splitlines()[0]
    else:
        return None
    return (
        f"another rank has died or is out of reach (rank {rank()} waited for it: {reason}). The launcher's lines name "
        "it; exit code -9 is a kill, often because the host's memory was full"
    )
