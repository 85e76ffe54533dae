"""report.html and curve.png of a run directory: what changed, what it rests on, and the traces themselves."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mispo.config.load import changed_keys, config_from_file
from mispo.config.schema import MispoConfig
from mispo.monitor.console import summary_rows
from mispo.monitor.report.attribution import attribution_section
from mispo.monitor.report.html import bullets, image, page, table, trace_pair
from mispo.monitor.report.plots import draw_curve
from mispo.monitor.rows import Row, before_after, read_rows, references
from mispo.system.files import replacing
from mispo.system.rundir import RunDir
from rollouts.records import SAMPLE_KEYS

PACKAGES = ("mispo", "torch", "transformers", "accelerate", "deepspeed", "datasets", "reasoning-gym", "wandb")


def write_report(run_dir: Path) -> Path:
    """Write run_dir/curve.png and run_dir/report.html from what the run left there; returns the latter.

    Needs metrics.jsonl and config.yaml (ValueError naming what is missing or broken). Shows what there is of
    samples_before.jsonl, samples_after.jsonl and notes.json, and says what there is not; so a run that was
    stopped early has a report too. Shows attribution/step_N.json where there is one.
    """
    run = RunDir(run_dir)
    missing = [path.name for path in (run.metrics, run.config) if not path.is_file()]
    if missing:
        raise ValueError(f"{run_dir}: no {' and no '.join(missing)}; give the run_dir of a `mispo train` run")
    config = config_from_file(run.config, [])
    rows = read_rows(run.metrics)
    before, after = read_samples(run.samples_before), read_samples(run.samples_after)
    with replacing(run.curve) as temporary:
        draw_curve(rows, temporary)
    changed = [(key, json.dumps(value, ensure_ascii=False)) for key, value in changed_keys(config).items()]
    attributed = attribution_section(run_dir)
    sections = [
        ("Held-out problems", _summary(rows)),
        ("Curves", image(run.curve.read_bytes(), "reward, length, acceptance and routing by step")),
        *([] if attributed is None else [("Where the mismatch comes from", attributed)]),
        ("Notes", bullets([*own_notes(rows, config.trainer.steps), *read_notes(run.notes)])),
        ("Traces before and after", _traces(before, after)),
        ("Configuration, where it differs from the defaults", table((), changed, numbers=False)),
        ("Versions, where this report was written", table((), versions(), numbers=False)),
    ]
    title = f"mispo run {run_dir.resolve().name}"
    with replacing(run.report) as temporary:
        temporary.write_text(page(title, _subtitle(rows, config), sections), encoding="utf-8")
    return run.report


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the traces of a file, none if there is no file; ValueError if a row lacks a key."""
    if not path.is_file():
        return []
    samples = read_rows(path)
    for number, sample in enumerate(samples, 1):
        missing = [key for key in SAMPLE_KEYS if key not in sample]
        if missing:
            raise ValueError(f"{path}: row {number} has no {', '.join(missing)}")
    return samples


def read_notes(path: Path) -> list[str]:
    """Read the remarks that a run left, a JSON list of strings; none if there is no file."""
    if not path.is_file():
        return []
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"{path}: not a list of strings")
    return notes


def own_notes(rows: Sequence[Row], planned: int) -> list[str]:
    """Say how far the numbers can be trusted, from the rows themselves. planned: trainer.steps."""
    before, after = before_after(rows)
    done = _last_step(rows)
    notes = ["One run, one seed: differences of a few points may be chance."]
    if done < planned:
        notes.append(f"The run stopped after {done} of {planned} steps.")
    if not before:
        notes.append("No evaluation before RL was recorded (row 0), so no change can be shown.")
    if not after:
        notes.append("No evaluation after RL was recorded.")
    elif after["step"] < done:
        notes.append(f"The last evaluation is of step {after['step']}, not of the last step {done}.")
    nulls = sorted({key for row in rows for key, value in row.items() if value is None})
    if nulls:
        notes.append(f"Not a finite number in at least one step: {', '.join(nulls)}.")
    return notes


def versions() -> list[tuple[str, str]]:
    """Return (name, version) of Python and of the packages that a run depends on."""
    found = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            found.append((name, version(name)))
        except PackageNotFoundError:
            found.append((name, "not installed"))
    return found


def _last_step(rows: Sequence[Row]) -> int:
    return max((row["step"] for row in rows), default=0)


def _subtitle(rows: Sequence[Row], config: MispoConfig) -> str:
    data = config.data
    parts = [
        str(config.model.preset or config.model.path),
        ", ".join(data.mixture) or str(data.task or data.path),
        f"{_last_step(rows)} of {config.trainer.steps} steps",
        f"seed {config.seed}",
    ]
    return " · ".join(parts)


def _summary(rows: Sequence[Row]) -> str:
    lines = [list(line) for line in summary_rows(*before_after(rows))]
    lines += [[name, f"{value:.3f}", "", ""] for name, value in references(rows).items()]
    return table(("", "before", "after", "change"), lines, numbers=True)


def _traces(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> str:
    """Pair traces by question; a trace whose partner is missing stands alone."""
    if not before and not after:
        return '<p class="soft">This run kept no traces.</p>'
    later = {sample["question"]: sample for sample in reversed(after)}
    pairs: list[tuple[dict[str, Any] | None, dict[str, Any] | None]] = []
    pairs += [(sample, later.pop(sample["question"], None)) for sample in before]
    pairs += [(None, sample) for sample in after if sample["question"] in later]
    return "\n".join(trace_pair(number, *pair) for number, pair in enumerate(pairs, 1))
