"""Where the mismatch comes from, for people: a table, a picture and JSON in run_dir/attribution/."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from mispo.algorithm.variance_shares import Attribution, Part
from mispo.metrics.diagnosis import Diagnosis, as_json, from_json
from mispo.monitor.advice import paragraph
from mispo.monitor.report.html import escape, image, table
from mispo.monitor.report.plots import draw_attribution, label
from mispo.system.files import json_line, replacing
from mispo.system.rundir import RunDir

COLUMNS = ("cause", "share of Var(log x)", "of which through routing", "rms, nats", "−mean, nats per token")


@dataclass(frozen=True)
class Measured:
    """One step's attribution and diagnosis; None where there is none."""

    step: int
    attribution: Attribution
    diagnosis: Diagnosis | None


def write_attribution(
    run_dir: Path, step: int, attribution: Attribution, diagnosis: Diagnosis | None, overrides: Sequence[str] = ()
) -> Path:
    """Write run_dir/attribution/step_N.json and .png, each atomically; returns the former.

    overrides: settings that are not the run's, key=value; they become part of the names.
    """
    path = RunDir(run_dir).attributed(step, overrides)
    path.parent.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {"step": step, "attribution": dataclasses.asdict(attribution)}
    row |= {"diagnosis": None, "advice": None}
    if diagnosis is not None:
        row |= {"diagnosis": as_json(diagnosis), "advice": paragraph(diagnosis)}
    with replacing(path.with_suffix(".png")) as temporary:
        title = f"Where the mismatch {'would come' if overrides else 'comes'} from, step {step}"
        draw_attribution(attribution, temporary, " ".join([title, *overrides]))
    with replacing(path) as temporary:
        temporary.write_text(json_line(row), encoding="utf-8")
    return path


def read_attributions(run_dir: Path) -> list[Measured]:
    """Read the run's own attributions, by step; [] if there is none. ValueError naming a file that does not read."""
    # With other settings than the run's a name has more than the step.
    found = RunDir(run_dir).attribution.glob("*.json")
    paths = [path for path in found if re.fullmatch(r"step_\d+", path.stem)]
    return sorted((_read(path) for path in paths), key=lambda measured: measured.step)


def _read(path: Path) -> Measured:
    try:
        row = json.loads(path.read_text(encoding="utf-8"))
        found = dict(row["attribution"])
        parts = {name: Part(**_numbers(part)) for name, part in found.pop("parts").items()}
        diagnosis = None if row["diagnosis"] is None else from_json(row["diagnosis"])
        return Measured(row["step"], Attribution(parts=parts, **_numbers(found)), diagnosis)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: no attribution of this version of mispo ({error!r}); remove that file") from error


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in values.items()}


def attribution_table(attribution: Attribution) -> Table:
    """Make the table on the screen, with the numbers that it rests on below."""
    shown = Table(title="Where the mismatch comes from", title_justify="left", box=None, pad_edge=False)
    shown.header_style, shown.caption_justify, shown.caption = "bold", "left", basis(attribution)
    shown.add_column("")
    for title in COLUMNS[1:]:
        shown.add_column(title, justify="right")
    for row in table_rows(attribution):
        shown.add_row(*row)
    return shown


def table_rows(attribution: Attribution) -> list[tuple[str, ...]]:
    """Return cells by COLUMNS, one row per part and one for all of them; `-` for what is not defined or measured."""
    rows = [
        (
            label(name),
            percent(part.share, part.share_error),
            percent(part.mediated, part.mediated_error),
            _nats(part.rms),
            _nats(-part.mean),
        )
        for name, part in attribution.parts.items()
    ]
    whole = math.nan if attribution.identical or not attribution.tokens else 1.0
    mediated = percent(attribution.mediated, attribution.mediated_error)
    rms = math.sqrt(attribution.variance + attribution.k1**2)
    return [*rows, ("log x", percent(whole), mediated, _nats(rms), _nats(attribution.k1))]


def percent(share: float, error: float = math.nan) -> str:
    """Write a share as 12.3% ± 4.5, or `-` if it is no number."""
    if not math.isfinite(share):
        return "-"
    return f"{round(share, 3) + 0.0:.1%}" + (f" ± {100 * error:.1f}" if math.isfinite(error) else "")


def _nats(value: float) -> str:
    # + 0.0: −0.0 is shown as 0
    return f"{value + 0.0:.2g}" if math.isfinite(value) else "-"


def basis(attribution: Attribution) -> str:
    """Say what the shares rest on, in one or two sentences."""
    text = f"{attribution.tokens:,} tokens of {attribution.trajectories:,} trajectories; one standard error each"
    text += f" (jackknife over trajectories). k3: {_nats(attribution.k3)} nats per token."
    if attribution.identical:
        text += " Rollout and trainer differ by nothing that varies: there is nothing to attribute."
    if attribution.left_out:
        text += f" Left out: {attribution.left_out:,} tokens without a finite ratio."
    return text


def attribution_section(run_dir: Path) -> str | None:
    """Return HTML for the report: the last step's table, picture and advice, and shares by step; None without any."""
    measured = read_attributions(run_dir)
    if not measured:
        return None
    last = measured[-1]
    parts = [f'<p class="soft">Step {last.step}. {escape(basis(last.attribution))}</p>']
    parts.append(table(COLUMNS, table_rows(last.attribution), numbers=True))
    picture = RunDir(run_dir).attributed(last.step).with_suffix(".png")
    if picture.is_file():
        parts.append(image(picture.read_bytes(), f"shares of the mismatch by cause, step {last.step}"))
    if last.diagnosis is not None:
        parts.append(f"<p>{escape(paragraph(last.diagnosis))}</p>")
    if len(measured) > 1:
        parts.append(_history(measured))
    return "\n".join(parts)


def _history(measured: Sequence[Measured]) -> str:
    names = list(measured[-1].attribution.parts)
    rows = []
    for one in measured:
        found = one.attribution
        shares = [found.parts.get(name) for name in names]
        cells = ["-" if part is None else percent(part.share, part.share_error) for part in shares]
        rows.append([str(one.step), _nats(found.k3), *cells, percent(found.mediated, found.mediated_error)])
    return table(("step", "k3, nats", *map(label, names), "through routing"), rows, numbers=True)
