"""What a person sees while a run goes on: one line per step, one per evaluation, a table at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mispo.monitor.rows import EVAL_KEY, Row, eval_keys

HEADER_EVERY = 20
"""Lines between two headers."""

LOG_WIDTH = 120
"""Columns when the output is not a terminal."""


@dataclass(frozen=True)
class Column:
    """One column of the step line.

    keys: metrics, the first one that the row has is shown. width: characters. format: Python format of the
    number. priority: columns with the highest are left out first on a narrow terminal.
    """

    title: str
    keys: tuple[str, ...]
    width: int
    format: str
    priority: int


COLUMNS = (
    Column("reward", ("reward/mean",), 6, ".3f", 0),
    Column("length", ("response_length/mean",), 7, ".1f", 0),
    Column("trunc", ("trunc/rate",), 5, ".0%", 4),
    Column("accept", ("mis/traj_accept",), 6, ".0%", 0),
    Column("mismatch", ("mismatch/k1", "mismatch/k3"), 9, ".1e", 2),
    Column("loss", ("actor/loss",), 8, ".4f", 5),
    Column("entropy", ("actor/entropy",), 7, ".3f", 1),
    Column("grad", ("actor/grad_norm",), 6, ".2f", 3),
    Column("v.expl", ("critic/vf_explained_var",), 6, ".2f", 1),
    Column("routing", ("moe/confidence/mean",), 7, ".3f", 2),
    Column("tok/s", ("perf/tokens_per_s",), 7, ".0f", 5),
    Column("s/step", ("timing_s/step",), 6, ".1f", 1),
)
GAP = 2
STEP_WIDTH = 11


def make_console(file: TextIO | None = None) -> Console:
    """Open a console: colour and the real width on a terminal; plain text, LOG_WIDTH columns, in a pipe or a log."""
    file = file or sys.stdout
    return Console(file=file, highlight=False, width=None if file.isatty() else LOG_WIDTH)


def visible_columns(width: int) -> list[Column]:
    """Return the columns that fit into `width` characters, in their order; the most important ones always stay."""
    columns = list(COLUMNS)
    while _width(columns) > width and any(column.priority for column in columns):
        columns.remove(max(columns, key=lambda column: column.priority))
    return columns


def _width(columns: list[Column]) -> int:
    return STEP_WIDTH + sum(GAP + column.width for column in columns)


def step_header(width: int = LOG_WIDTH) -> Text:
    """Return the titles above the step lines."""
    titles = [column.title.rjust(column.width + GAP) for column in visible_columns(width)]
    return Text("step".rjust(STEP_WIDTH) + "".join(titles), style="bold")


def step_line(step: int, steps: int, metrics: Row, width: int = LOG_WIDTH) -> Text:
    """Write one step in one line; `-` where a metric is missing, `nan` (red) where it is null or not finite."""
    line = Text(f"{step}/{steps}".rjust(STEP_WIDTH))
    for column in visible_columns(width):
        cell, style = _cell(column, metrics)
        line.append(" " * GAP).append(cell.rjust(column.width), style=style)
    return line


def _cell(column: Column, metrics: Row) -> tuple[str, str]:
    key = next((key for key in column.keys if key in metrics), None)
    if key is None:
        return "-", "dim"
    value = metrics[key]
    if value is None or not math.isfinite(value):
        return "nan", "bold red"
    cell = format(value, column.format)
    return (cell if len(cell) <= column.width else f"{value:.0e}"), ""


def eval_line(step: int, steps: int, metrics: Row) -> Text:
    """Write the accuracies of an evaluation in one line."""
    parts = [f"{key.removeprefix('eval/')} {metrics[key]:.3f}" for key in eval_keys([metrics])]
    return Text(f"{step}/{steps}".rjust(STEP_WIDTH) + "  eval  " + "  ".join(parts), style="bold")


class StepPrinter:
    """Prints step lines under a header that is repeated; each line has the terminal's present width."""

    def __init__(self, steps: int, console: Console) -> None:
        self.steps = steps
        self.console = console
        self._printed = 0

    def step(self, step: int, metrics: Row) -> None:
        if self._printed % HEADER_EVERY == 0:
            self._print(step_header(self.console.width))
        self._printed += 1
        self._print(step_line(step, self.steps, metrics, self.console.width))

    def eval(self, step: int, metrics: Row) -> None:
        self._print(eval_line(step, self.steps, metrics))

    def _print(self, line: Text) -> None:
        self.console.print(line, no_wrap=True, overflow="ellipsis", crop=self.console.is_terminal)


def summary(before: Row, after: Row, reference_values: Mapping[str, float]) -> Table:
    """Compare before and after RL: accuracies and mean length of two metric rows, then constants to compare with.

    A missing value is `-`. reference_values: for example {"best constant guess": 0.21}.
    """
    table = Table(title="Held-out problems", title_justify="left", box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    for title in ("before", "after", "change"):
        table.add_column(title, justify="right", min_width=8)
    for label, *cells in summary_rows(before, after):
        table.add_row(Text(label), *cells)
    for name, value in reference_values.items():
        table.add_row(Text(name, style="dim"), Text(f"{value:.3f}", style="dim"), "", "")
    return table


def summary_rows(before: Row, after: Row) -> list[tuple[str, str, str, str]]:
    """Return (label, before, after, change) as text; shared by the screen and the report."""
    rows = []
    measured = "eval/response_length"
    length = measured if measured in before and measured in after else "response_length/mean"
    for key in [*eval_keys([before, after]), length]:
        match = EVAL_KEY.fullmatch(key)
        label = f"{match['task']} {match['name']}" if match else "mean length, tokens"
        decimals = 3 if match else 1
        old, new = before.get(key), after.get(key)
        change = "-" if old is None or new is None else f"{new - old:+.{decimals}f}"
        before_text, after_text = ("-" if value is None else f"{value:.{decimals}f}" for value in (old, new))
        rows.append((label, before_text, after_text, change))
    return rows
