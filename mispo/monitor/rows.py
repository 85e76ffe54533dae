"""Reading metrics: rows of metrics.jsonl, single series, and the evaluation metrics among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""One line of metrics.jsonl: `step` and metric names to finite numbers or None."""

EVAL_KEY = re.compile(r"eval/(?P<task>.+)/(?P<name>greedy|avg@\d+)")
"""The two accuracies of a task: of the greedy completion, and of k sampled ones, averaged."""

REFERENCE = "reference/"
"""Metrics of row 0 with this prefix are constants to compare with, for example reference/constant_guess."""


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl file in file order. A torn last line (the writer crashed or is writing) is left out.

    Raises ValueError naming file and line if an earlier line is no JSON object.
    """
    return [json.loads(line) for line in whole_lines(path)]


def whole_lines(path: Path) -> list[bytes]:
    """Read the lines of a .jsonl file that hold an object, without newlines; see `read_rows` for torn ones."""
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        if not _is_object(line):
            if number == len(lines):
                return lines[:-1]
            raise ValueError(f"{path}: line {number} is not a JSON object; remove or repair that line")
    return lines


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def merge_steps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Merge rows into one per step, ordered; of several rows of a step the later wins per key."""
    merged: dict[int, dict[str, Any]] = {}
    for row in rows:
        merged.setdefault(row["step"], {}).update(row)
    return [merged[step] for step in sorted(merged)]


def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
    """Return steps and values of one metric, without the rows that lack it."""
    points = [(row["step"], float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def eval_keys(rows: Sequence[Row]) -> list[str]:
    """Return the names of all evaluation accuracies, by task, greedy before sampled."""
    keys = {key for row in rows for key in row if EVAL_KEY.fullmatch(key)}
    return sorted(keys, key=lambda key: (key.rpartition("/")[0], not key.endswith("/greedy"), key))


def has_eval(row: Row) -> bool:
    return any(EVAL_KEY.fullmatch(key) for key in row)


def before_after(rows: Sequence[Row]) -> tuple[Row, Row]:
    """Return the evaluation before RL (step 0) and the last one after it; an empty row for one that is missing."""
    evaluated = [row for row in merge_steps(rows) if has_eval(row)]
    before: Row = evaluated[0] if evaluated and evaluated[0]["step"] == 0 else {}
    after: Row = evaluated[-1] if evaluated and evaluated[-1]["step"] > 0 else {}
    return before, after


def references(rows: Sequence[Row]) -> dict[str, float]:
    """Return reference lines as {name for people: value}."""
    return {
        key.removeprefix(REFERENCE).replace("_", " "): float(value)
        for row in rows
        for key, value in row.items()
        if key.startswith(REFERENCE) and value is not None
    }
