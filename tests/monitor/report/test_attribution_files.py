"""Attributions on disk and for people: JSON there and back, table, picture, and their place in the report."""

import json
import math
import re
from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from mispo.algorithm.variance_shares import Attribution, Part
from mispo.config.load import save_config
from mispo.config.schema import DataConfig, MispoConfig, ModelConfig
from mispo.metrics.diagnosis import Diagnosis
from mispo.monitor.advice import paragraph
from mispo.monitor.report.attribution import (
    attribution_section,
    attribution_table,
    basis,
    read_attributions,
    table_rows,
    write_attribution,
)
from mispo.monitor.report.report import write_report

NAN = math.nan

FOUND = Attribution(
    parts={
        "weights": Part(0.7, 0.03, 0.4, 0.02, -0.002, 0.05),
        "precision": Part(0.35, 0.02, 0.1, 0.01, 0.001, 0.03),
        "rest": Part(-0.05, 0.01, 0.0, 0.005, 0.0, 0.004),
    },
    mediated=0.5,
    mediated_error=0.03,
    variance=0.0035,
    k1=0.001,
    k3=0.0018,
    tokens=65536,
    left_out=0,
    trajectories=256,
    replayed=True,
    identical=False,
)

UNREPLAYED = replace(
    FOUND,
    parts={name: replace(part, mediated=NAN, mediated_error=NAN) for name, part in FOUND.parts.items()},
    mediated=NAN,
    mediated_error=NAN,
    replayed=False,
)

IDENTICAL = replace(
    FOUND,
    parts={name: Part(NAN, NAN, NAN, NAN, 0.0, 0.0) for name in FOUND.parts},
    mediated=NAN,
    mediated_error=NAN,
    variance=0.0,
    k1=-0.0,
    k3=0.0,
    identical=True,
)

DIAGNOSIS = Diagnosis(
    tokens=65536,
    trajectories=256,
    replaying=False,
    stale=True,
    confidence=0.6,
    confidence_norm=0.5,
    agreement=0.97,
    mean_abs=0.01,
    threshold=0.4,
    share_below=0.2,
    below=0.03,
    above=0.005,
    correlation=-0.4,
    correlation_error=0.02,
    window=(0.996, 1.001),
    free=0.5,
    replayed=0.9,
    fresh=0.6,
    rms_free=0.06,
    rms_replayed=0.03,
    rms_fresh=0.05,
    replay_gain=0.4,
    replay_gain_error=0.03,
    fresh_gain=0.1,
    fresh_gain_error=0.02,
)


@pytest.mark.parametrize("found", [FOUND, UNREPLAYED, IDENTICAL, replace(FOUND, k3=math.inf)])
def test_what_was_written_is_read_back(tmp_path: Path, found: Attribution) -> None:
    for step, diagnosis in ((10, None), (9, DIAGNOSIS)):
        path = write_attribution(tmp_path, step, found, diagnosis)
        assert path == tmp_path / f"attribution/step_{step}.json"
    first, second = read_attributions(tmp_path)
    assert (first.step, second.step) == (9, 10)
    assert (first.diagnosis, second.diagnosis) == (DIAGNOSIS, None)
    # NaN equals nothing, and JSON knows no infinity; the text tells both.
    assert repr(first.attribution).replace("inf", "nan") == repr(found).replace("inf", "nan")
    written = json.loads((tmp_path / "attribution/step_9.json").read_text())
    assert written["advice"] == paragraph(DIAGNOSIS)
    assert sorted(p.name for p in (tmp_path / "attribution").iterdir()) == [
        f"step_{step}.{kind}" for step in (10, 9) for kind in ("json", "png")
    ]


def test_a_run_without_attributions_has_none(tmp_path: Path) -> None:
    assert read_attributions(tmp_path) == []
    assert attribution_section(tmp_path) is None


@pytest.mark.parametrize(
    "content", ["", "[]", '{"step": 1}', '{"step": 1, "diagnosis": null, "attribution": {"k3": 1}}']
)
def test_a_file_that_does_not_read_is_named(tmp_path: Path, content: str) -> None:
    write_attribution(tmp_path, 1, FOUND, None).write_text(content)
    with pytest.raises(ValueError, match=r"step_1\.json: no attribution of this version"):
        read_attributions(tmp_path)


def test_the_table_has_a_row_for_each_cause_and_one_for_all() -> None:
    assert table_rows(FOUND) == [
        ("stale weights", "70.0% ± 3.0", "40.0% ± 2.0", "0.05", "0.002"),
        ("precision", "35.0% ± 2.0", "10.0% ± 1.0", "0.03", "-0.001"),
        ("engine and the rest", "-5.0% ± 1.0", "0.0% ± 0.5", "0.004", "0"),
        ("log x", "100.0%", "50.0% ± 3.0", "0.059", "0.001"),
    ]
    assert {row[2] for row in table_rows(UNREPLAYED)} == {"-"}
    assert {row[1] for row in table_rows(IDENTICAL)} == {"-"}
    assert "nothing to attribute" in basis(IDENTICAL)
    assert "Left out: 3 tokens" in basis(replace(FOUND, left_out=3))
    screen = StringIO()
    Console(file=screen, width=120).print(attribution_table(FOUND))
    assert "stale weights" in screen.getvalue()
    assert "65,536 tokens of 256 trajectories" in screen.getvalue()


def run_directory(path: Path) -> Path:
    path.mkdir()
    save_config(
        MispoConfig(model=ModelConfig(preset="tiny", path=None), data=DataConfig(task="count_bits")),
        path / "config.yaml",
    )
    (path / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n')
    return path


def test_the_report_shows_the_last_step_and_how_the_shares_went(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    assert "Where the mismatch comes from" not in write_report(run).read_text()
    write_attribution(run, 5, UNREPLAYED, None)
    assert write_report(run).read_text().count("stale weights") == 1, "one step has no history"
    write_attribution(run, 10, FOUND, DIAGNOSIS)
    page = write_report(run).read_text()
    text = re.sub(r"<[^>]+>", " ", page)
    assert "Where the mismatch comes from" in text
    assert "Step 10. 65,536 tokens of 256 trajectories" in text
    assert "40.0% ± 2.0" in text
    assert "set router.replay=rollout" in text
    assert page.count("data:image/png;base64,") == 2
    assert text.count("stale weights") == 2
    (run / "attribution/step_10.png").unlink()
    assert write_report(run).read_text().count("data:image/png;base64,") == 1


def test_a_cause_of_any_name_is_shown_and_never_run(tmp_path: Path) -> None:
    hostile = replace(FOUND, parts={"<script>$": FOUND.parts["rest"], "engine": FOUND.parts["weights"]})
    write_attribution(tmp_path, 1, hostile, None)
    section = attribution_section(tmp_path) or ""
    assert "&lt;script&gt;" in section
    assert "<script" not in section
