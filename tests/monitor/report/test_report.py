"""report.html and curve.png of run directories: whole, stopped early, hostile, broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from mispo.config.load import save_config
from mispo.config.schema import DataConfig, MispoConfig, ModelConfig
from mispo.monitor.report.report import own_notes, write_report

SAMPLE = {"question": "ones in 5?", "answer": "2", "completion": "<think></think>3", "reward": 0.0}
HOSTILE = "<script>alert(1)</script>"


def run_directory(path: Path, rows: list[dict[str, Any]], **files: Any) -> Path:
    path.mkdir()
    save_config(
        MispoConfig(model=ModelConfig(preset="tiny", path=None), data=DataConfig(task="count_bits"), seed=7),
        path / "config.yaml",
    )
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, samples in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


def rows(steps: int) -> list[dict[str, Any]]:
    row_0 = {"step": 0, "eval/bits/greedy": 0.3, "reference/constant_guess": 0.2}
    return [row_0, *({"step": s, "reward/mean": s / steps, "moe/confidence/layer_0": 0.5} for s in range(1, steps + 1))]


def test_a_whole_run(tmp_path: Path) -> None:
    measured = rows(3)
    measured[-1]["eval/bits/greedy"] = 0.9
    after = {**SAMPLE, "completion": "<think>5:1;2:1;1:2</think>2", "reward": 1.0}
    run = run_directory(tmp_path / "run", measured, samples_before=[SAMPLE], samples_after=[after])
    (run / "notes.json").write_text('["Forced careful thinking gives 95%."]')
    page = write_report(run).read_text()
    for words in ("0.300", "0.900", "+0.600", "constant guess", "Forced careful", "5:1;2:1;1:2", "seed 7", "tiny"):
        assert words in page, words
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in page
    assert not list(run.glob(".*tmp"))


def test_what_a_model_writes_is_shown_and_never_run(tmp_path: Path) -> None:
    sample = {**SAMPLE, "question": HOSTILE, "completion": HOSTILE + "\x1b[31m"}
    page = write_report(run_directory(tmp_path / "run", rows(1), samples_before=[sample])).read_text()
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert "default-src 'none'" in page


def test_a_run_that_was_stopped_says_so(tmp_path: Path) -> None:
    page = write_report(run_directory(tmp_path / "run", rows(2))).read_text()
    assert "stopped after 2 of 1000 steps" in page
    assert "No evaluation after RL was recorded" in page
    assert "kept no traces" in page


def test_numbers_that_were_none_are_named() -> None:
    notes = own_notes([{"step": 1, "actor/loss": None}], 1)
    assert any("actor/loss" in note for note in notes)


def test_changed_settings_are_shown_as_they_were_given(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", rows(1))
    config = MispoConfig(model=ModelConfig(preset="tiny", path=None), data=DataConfig(task="count_bits"))
    config.data.prompt = "${question} = ???"
    save_config(config, run / "config.yaml")
    page = write_report(run).read_text()
    assert "data.prompt" in page
    assert "${question} = ???" in page
    assert "trainer.steps" not in page, "that is the default"


def test_a_config_of_another_version_names_its_key(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", rows(1))
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace("\n  lag:", "\n  lagg:"))
    with pytest.raises(ValueError, match=r"config\.yaml: .*rollout\.lagg"):
        write_report(run)


def test_an_empty_run_has_a_report_too(tmp_path: Path) -> None:
    assert write_report(run_directory(tmp_path / "run", [])).stat().st_size > 1000


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", None, "no metrics.jsonl; give the run_dir"),
        ("config.yaml", None, "no config.yaml"),
        ("config.yaml", "- 1\n", "is no config"),
        ("samples_after.jsonl", '{"question": "q"}\n', "row 1 has no answer, completion, reward"),
        ("notes.json", "{}", "not a list of strings"),
        ("notes.json", "[", "not JSON"),
    ],
)
def test_a_broken_run_directory_is_named(tmp_path: Path, file: str, content: str | None, words: str) -> None:
    run = run_directory(tmp_path / "run", rows(1))
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_text(content)
    with pytest.raises(ValueError, match=words):
        write_report(run)
