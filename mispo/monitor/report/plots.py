"""The pictures of a run: curve.png with what an engineer looks at first, and the shares of a mismatch by cause."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from mispo.algorithm.variance_shares import Attribution
from mispo.monitor.rows import Row, eval_keys, merge_steps, references, series

COLORS = ("#1f77b4", "#d95f02", "#1b9e77", "#7570b3", "#e7298a")
LAYER_LEGEND = 6
"""With more MoE layers than this only the first and the last are named."""

LABELS = {"weights": "stale weights", "precision": "precision", "rest": "engine and the rest"}
"""Parts as people know them."""

SHARE, MEDIATED = "#1f77b4", "#d95f02"


def draw_curve(rows: Sequence[Row], path: Path) -> None:
    """Write a PNG: reward and accuracy, mean length, acceptance, routing confidence; over steps.

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


def _plot(axes: Axes, rows: Sequence[Row], key: str, label: str, **style: Any) -> None:
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


def label(part: str) -> str:
    """Return a part's name for people; an unknown one as it is."""
    return LABELS.get(part, part)


def draw_attribution(attribution: Attribution, path: Path, title: str) -> None:
    """Write a PNG: for each part a bar with its share ± one standard error, and one with what replay makes vanish."""
    count = len(attribution.parts)
    figure = Figure(figsize=(9, 1.6 + 0.8 * count), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title.replace("$", r"\$"), fontsize=11, fontweight="bold", loc="left")
    parts = list(attribution.parts.values())
    height = 0.36 if attribution.replayed else 0.6
    shift = height / 2 if attribution.replayed else 0.0
    shares = [(part.share, part.share_error) for part in parts]
    _bars(axes, shares, -shift, height, SHARE, "share of the variance of log x")
    if attribution.replayed:
        mediated = [(part.mediated, part.mediated_error) for part in parts]
        _bars(axes, mediated, shift, height, MEDIATED, "of which vanishes when routing is replayed")
    axes.set_yticks(range(count), [label(name).replace("$", r"\$") for name in attribution.parts])
    axes.set_ylim(count - 0.4, -0.6)
    axes.axvline(0, color="0.25", linewidth=1)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0), max(1.0, high) + 0.16)  # room for the numbers
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("the shares of all causes add up to 100%; whiskers: one standard error, over trajectories")
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if any(math.isfinite(part.share) for part in parts):
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    else:
        said = "log x does not vary: nothing to attribute" if attribution.tokens else "no token was measured"
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center")
    figure.savefig(path, format="png")


def _bars(axes: Axes, values: list[tuple[float, float]], shift: float, height: float, color: str, legend: str) -> None:
    """Draw horizontal bars of (value, error), each with its number at the end; none for a value that is no number."""
    shown = [(place, value, error) for place, (value, error) in enumerate(values) if math.isfinite(value)]
    if not shown:
        return
    places = [place + shift for place, *_ in shown]
    widths = [value for _, value, _ in shown]
    errors = [error if math.isfinite(error) else 0.0 for *_, error in shown]
    axes.barh(
        places, widths, height * 0.92, xerr=errors, capsize=3, ecolor="0.2", color=color, alpha=0.85, label=legend
    )
    for place, width, error in zip(places, widths, errors, strict=True):
        axes.text(max(width + error, 0.0) + 0.012, place, f"{round(width, 3) + 0.0:.1%}", va="center", fontsize=9)
