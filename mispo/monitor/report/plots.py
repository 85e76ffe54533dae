"""curve.png: the four pictures an engineer looks at first."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mispo.monitor.rows import Row, eval_keys, merge_steps, references, series

COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a")
LAYER_LEGEND = 6
"""With more MoE layers than this only the first and the last are named."""


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Writes a PNG: reward and accuracy, mean length, acceptance, routing confidence; over steps.

    rows: metric rows, in any order, any of the metrics missing (its panel then says so).
    """
    rows = merge_steps(rows)
    figure = Figure(figsize=(11, 6.6), dpi=110)
    figure.subplots_adjust(left=0.05, right=0.985, bottom=0.075, top=0.95, wspace=0.13, hspace=0.15)
    FigureCanvasAgg(figure)
    (reward, length), (accept, routing) = figure.subplots(2, 2, sharex=True)
    _reward(reward, rows)
    _lines(length, rows, "Mean completion length (tokens)", {"response_length/mean": "all samples"})
    length.set_ylim(bottom=0)
    _lines(
        accept,
        rows,
        "Accepted by the filter",
        {"mis/token_accept": "tokens", "mis/traj_accept": "trajectories"},
    )
    accept.set_ylim(-0.03, 1.03)
    _routing(routing, rows)
    for axes in (reward, length, accept, routing):
        _finish(axes)
    for axes in (accept, routing):
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, format="png")


def _plot(axes: Axes, rows: Sequence[Row], key: str, label: str, **style: object) -> None:
    steps, values = series(rows, key)
    if steps:
        # A line of one point is invisible.
        style.setdefault("marker", "o" if len(steps) < 3 else "")
        axes.plot(steps, values, label=label.replace("$", r"\$"), **style)


def _lines(axes: Axes, rows: Sequence[Row], title: str, names: dict[str, str]) -> None:
    axes.set_title(title)
    for color, (key, label) in zip(COLORS, names.items(), strict=False):
        _plot(axes, rows, key, label, color=color)


def _reward(axes: Axes, rows: Sequence[Row]) -> None:
    _lines(axes, rows, "Reward and held-out accuracy", {"reward/mean": "reward of the rollouts"})
    for color, key in zip(COLORS[1:] * 9, eval_keys(rows), strict=False):
        mark = {"marker": "o" if key.endswith("/greedy") else "s", "markersize": 5, "linestyle": "--"}
        _plot(axes, rows, key, key.removeprefix("eval/"), color=color, linewidth=1, **mark)
    for style, (name, value) in zip(((0, (1, 1)), (0, (5, 2, 1, 2))) * 9, references(rows).items(), strict=False):
        axes.axhline(value, color="0.45", linewidth=1, linestyle=style, label=name.replace("$", r"\$"))
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]), top=max(1.03, axes.get_ylim()[1]))


def _routing(axes: Axes, rows: Sequence[Row]) -> None:
    axes.set_title("Routing confidence by MoE layer")
    found = {key for row in rows for key in row if re.fullmatch(r"moe/confidence/layer_\d+", key)}
    keys = sorted(found, key=lambda key: int(key.rpartition("_")[2]))
    for i, key in enumerate(keys):
        named = len(keys) <= LAYER_LEGEND or i in (0, len(keys) - 1)
        color = colormaps["viridis"](0.85 * i / max(1, len(keys) - 1))
        _plot(axes, rows, key, f"layer {key.rpartition('_')[2]}" if named else "", color=color, linewidth=1.2)
    _plot(axes, rows, "moe/confidence/mean", "mean", color="black", linewidth=2)


def _finish(axes: Axes) -> None:
    axes.title.set_fontsize(11)
    axes.title.set_fontweight("bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8.5, framealpha=0.85)
    elif not axes.lines:
        axes.text(0.5, 0.5, "not recorded in this run", transform=axes.transAxes, ha="center", color="0.45")
