"""The learning curve as text: reward and accuracy beside mean length, in block characters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mispo.monitor.rows import Row, eval_keys, merge_steps, series

BLOCKS = " ▁▂▃▄▅▆▇█"
MARK = "◆"
AXIS_WIDTH = 7
"""Characters of the y-axis labels and its line."""


def curve(rows: Sequence[Row], *, width: int = 100, height: int = 9) -> str:
    """Draw two panels side by side, height + 3 lines: reward (area) with greedy accuracy (◆), and mean length.

    rows: metric rows, in any order. Without colour; a metric that was never logged leaves its panel empty.
    """
    rows = merge_steps(rows)
    panel_width = (width - 3) // 2
    greedy = next((key for key in eval_keys(rows) if key.endswith("/greedy")), None)
    reward = series(rows, "reward/mean")
    length = series(rows, "response_length/mean")
    marks = series(rows, greedy) if greedy else ([], [])
    steps = [row["step"] for row in rows] or [0]
    span = (steps[0], steps[-1])
    title = "reward" + (f"   {MARK} {greedy.removeprefix('eval/')}" if greedy else "")
    low = min([0.0, *reward[1]])
    left = _panel(title, reward, marks, span, (low, max([1.0, *reward[1]])), panel_width, height, ".2f")
    right = _panel("mean length", length, ([], []), span, (0.0, nice_top(length[1])), panel_width, height, ".0f")
    return "\n".join(f"{a}   {b}".rstrip() for a, b in zip(left, right, strict=True))


def nice_top(values: Sequence[float]) -> float:
    """Return a round number that is not below any value."""
    top = max([0.0, *values])
    if top <= 0:
        return 1.0
    scale = 10.0 ** math.floor(math.log10(top))
    return next(factor * scale for factor in (1, 1.5, 2, 3, 5, 7.5, 10) if factor * scale >= top)


def _panel(
    title: str,
    area: tuple[list[int], list[float]],
    marks: tuple[list[int], list[float]],
    span: tuple[int, int],
    limits: tuple[float, float],
    width: int,
    height: int,
    number: str,
) -> list[str]:
    columns = width - AXIS_WIDTH
    low, high = limits
    grid = [[" "] * columns for _ in range(height)]
    for x, value in enumerate(_resample(area, span, columns)):
        if value is None:
            continue
        eighths = max(1, round((value - low) / (high - low) * height * 8))
        for y in range(height):
            grid[height - 1 - y][x] = BLOCKS[min(8, max(0, eighths - 8 * y))]
    for step, value in zip(*marks, strict=True):
        y = min(height - 1, max(0, int((value - low) / (high - low) * height)))
        grid[height - 1 - y][_x(step, span, columns)] = MARK
    labels = {
        0: format(high, number),
        height // 2: format((high + low) / 2, number),
        height - 1: format(low, number),
    }
    lines = [" " * AXIS_WIDTH + title.ljust(columns)[:columns]]
    lines += [f"{labels.get(y, ''):>{AXIS_WIDTH - 2}} │{''.join(row)}" for y, row in enumerate(grid)]
    first, last = str(span[0]), str(span[1])
    lines.append(" " * (AXIS_WIDTH - 1) + "└" + "─" * columns)
    lines.append(" " * AXIS_WIDTH + first + " step ".center(columns - len(first) - len(last)) + last)
    return lines


def _resample(points: tuple[list[int], list[float]], span: tuple[int, int], columns: int) -> list[float | None]:
    """Return the mean of the values in each column; a column between two known ones is filled by a straight line."""
    sums: dict[int, list[float]] = {}
    for step, value in zip(*points, strict=True):
        sums.setdefault(_x(step, span, columns), []).append(value)
    known = {x: sum(values) / len(values) for x, values in sorted(sums.items())}
    out: list[float | None] = [None] * columns
    for left, right in zip(list(known), list(known)[1:], strict=False):
        for x in range(left, right):
            out[x] = known[left] + (known[right] - known[left]) * (x - left) / (right - left)
    for x, value in known.items():
        out[x] = value
    return out


def _x(step: int, span: tuple[int, int], columns: int) -> int:
    first, last = span
    return 0 if last == first else round((step - first) / (last - first) * (columns - 1))
