"""Verifiers that misbehave, for the tests of the pool; imported by its child processes."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def length(prompt: str, completion: str, answer: str, **row: Any) -> float:
    return len(completion) / 10


def columns(prompt: str, completion: str, answer: str, *, level: int = 0, **row: Any) -> tuple[float, dict[str, Any]]:
    return level / 10, {"others": sorted(row), "prompt": prompt, "answer": answer}


def misbehaves(prompt: str, completion: str, answer: str, **row: Any) -> Any:
    """Does what the completion says."""
    if completion == "hang":
        while True:
            time.sleep(1)
    if completion == "exit":
        os._exit(7)
    if completion == "close":
        os.closerange(0, 64)
        time.sleep(60)
    if completion == "start":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(row["note"]).write_text(str(child.pid))
        time.sleep(60)
    if completion == "print":
        sys.stdout.write('{"value": 1.0, "info": {}}\n')
        sys.stdout.flush()
        return 0.5
    return {
        "raise": lambda: 1 / 0,
        "nan": lambda: float("nan"),
        "high": lambda: 2.0,
        "text": lambda: "much",
        "none": lambda: None,
    }.get(completion, lambda: 1.0)()


def wide(prompt: str, completion: str, answer: str) -> float:
    return float(completion)


wide.low, wide.high = -1.0, 2.0  # type: ignore[attr-defined]

not_a_function = 3
