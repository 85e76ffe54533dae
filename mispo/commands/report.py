"""`mispo report`: the report of a run, written again."""

from __future__ import annotations

from pathlib import Path

from mispo.monitor.report.report import write_report
from mispo.system.failure import say


def report(run: Path) -> int:
    """Write report.html and curve.png of a run directory; returns the exit status. ValueError if there is no run."""
    say(str(write_report(run)))
    return 0
