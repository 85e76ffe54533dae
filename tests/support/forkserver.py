"""Run by runs.py: a process that has imported what every run imports, and forks a child for each rank it is asked for.

A request is a line of JSON on stdin, the answer one on stdout: the exit status of each rank. A child does what
`python -m MODULE …` or `python FILE …` does in a fresh process, but for the seconds of importing, and for the seed of
str hashes, which it shares with its siblings (runs.py has `fresh=True` where that is the point).
"""

import gc
import importlib
import json
import os
import runpy
import signal
import sys
import time
from typing import Any

import numpy as np

IMPORTED = (
    *("mispo.config.load", "mispo.build.run", "mispo.loop", "mispo.monitor.report.report"),
    *("rewards.gym", "pandas"),
)
"""pandas: pyarrow imports it when it first makes a table."""

GRACE_S = 30.0
"""Seconds which the other ranks get to end by themselves when one has failed."""


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # the children share what is there by now
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for environment in request["environments"]:
            children.append(os.fork())
            if children[-1] == 0:
                return become(request, environment)
        sys.stdout.write(json.dumps(wait(children, request["seconds"])) + "\n")
        sys.stdout.flush()


def become(request: dict[str, Any], environment: dict[str, str]) -> None:
    """The child: the process that the request describes."""
    for number, path, mode in (
        (0, os.devnull, os.O_RDONLY),
        (1, request["stdout"], os.O_WRONLY | os.O_APPEND),
        (2, request["stderr"], os.O_WRONLY | os.O_APPEND),
    ):
        file = os.open(path, mode)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(request["cwd"])
    np.random.seed()  # as in a fresh process; `random` does so by itself
    if request["command"][0] == "-m":
        _, module, *arguments = request["command"]
        sys.argv = [module, *arguments]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = request["command"]
        runpy.run_path(sys.argv[0], run_name="__main__")


def wait(children: list[int], seconds: float) -> list[int]:
    """Their exit statuses, −N for signal N; those that run for too long, or on after another has failed, get 9."""
    statuses: dict[int, int] = {}
    deadline = time.monotonic() + seconds
    while running := [child for child in children if child not in statuses]:
        for child in running:
            if time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                statuses[child] = os.waitstatus_to_exitcode(status)
                if status:
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    main()
