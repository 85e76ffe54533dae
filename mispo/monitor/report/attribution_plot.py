"""The picture of a mismatch attribution: each cause's share, and beside it what of that goes through routing."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from mispo.algorithm.variance_shares import Attribution

LABELS = {"weights": "stale weights", "precision": "precision", "rest": "engine and the rest"}
"""Parts as people know them."""

SHARE, MEDIATED = "#1f77b4", "#d95f02"


def label(part: str) -> str:
    """A part's name for people; an unknown one as it is."""
    return LABELS.get(part, part)


def draw_attribution(attribution: Attribution, path: Path, title: str) -> None:
    """Writes a PNG: for each part a bar with its share ± one standard error, and one with what replay makes vanish."""
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
    """Horizontal bars of (value, error), each with its number at the end; what is no number has none."""
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
