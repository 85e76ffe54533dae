"""Bad input ends with one clear line, status 2 and nothing left behind; good input of every command works."""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from mispo import __version__
from mispo.cli import main
from mispo.config.load import load_config, save_config
from support.runs import mispo, train


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a command that must be refused says."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainer.stepps=1"], "error: trainer.stepps: no such key; did you mean trainer.steps?"),
        (["trainer.steps=many"], "error: trainer.steps: Value 'many'"),
        (["recipe=smok"], "error: recipe: no recipe named 'smok'; did you mean smoke?"),
        (["data.task=count_bit"], "error: data.task: reasoning-gym has no generator 'count_bit'; did you mean"),
        (["rollout.samples_per_prompt=0"], "error: rollout.samples_per_prompt: must be at least 1 (is 0)"),
        (
            ["trainer.critic_minibatches=999"],
            "error: trainer.critic_minibatches: must be at most the trajectories of a step, 256",
        ),
        (["seed=0,1"], "error: several values for one key: add -m"),
        (
            ["reward.parts.task.name=gmy"],
            "error: reward.parts.task.name: no reward 'gmy'",
        ),
        (["--resume", "gone"], "error: gone/config.yaml: no such file; this is no run directory"),
        (["--config-dir", "gone"], "error: --config-dir: no directory 'gone'"),
        (["--resum", "gone"], "mispo: error: unknown option --resum"),
        (["-m", "seed=0,1", "trainer.stepps=1"], "error: trainer.stepps: no such key"),
        (["-m", "seed=0,1", "--dry-run"], "error: -m: cannot be combined with --resume, --rollouts or --dry-run"),
        (["-m", "seed=0,1", "hydra/sweeper=optun"], "error: hydra/sweeper: no hydra/sweeper named 'optun'; is its"),
        (["-m", "seed=0,1", "recipe=smoke,smok"], "error: recipe: no recipe named 'smok'"),
        (
            ["-m", "trainer.actor_minibatches=8,999"],
            "error: trainer.actor_minibatches: must be at most the trajectories of a step, 256",
        ),
        (["-m", "seed=0,1", "run_dir=a,b"], "error: run_dir: give one directory"),
        (["--rollouts", "seed=1"], "error: --rollouts: 'seed=1' is no file; give RUN/rollouts/step_N.parquet"),
        (["--rollouts", "gone.parquet"], "error: --rollouts: no such file 'gone.parquet'"),
        (["--rollouts", "d.parquet", "--resume", "gone"], "error: --rollouts: cannot be combined with --resume"),
    ],
)
def test_bad_input_is_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "d.parquet").touch()
    said = refused(capsys, "train", *arguments)
    assert words in said
    assert "Traceback" not in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "d.parquet"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--local_rank=1", "train", "trainer.stepps=1"],
        ["--local_rank", "1", "train", "trainer.stepps=1"],
        ["train", "seed=1", "--local-rank", "1", "trainer.stepps=1"],
        ["train", "seed=1", "--dry-run", "trainer.stepps=1"],
    ],
)
def test_settings_after_an_option_and_what_launchers_add(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert "error: trainer.stepps: no such key" in refused(capsys, *arguments)


def test_another_rank_keeps_bad_input_back_and_then_names_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank, had it the same, would have said so, and the launcher would have ended this one."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("mispo.system.failure.PATIENCE_S", 0.01)
    assert refused(capsys, "train", "trainer.stepps=1").startswith("rank 3: error: trainer.stepps: no such key")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, before)


def test_a_sweep_under_a_launcher_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "-m: not under a launcher" in refused(capsys, "train", "-m", "seed=0,1")


def test_an_unwritable_run_directory_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    said = refused(capsys, "train", "recipe=smoke", f"run_dir={tmp_path}/file/run")
    assert f"run_dir: cannot write to {tmp_path}/file/run" in said


def test_a_directory_with_a_run_in_it_is_not_written_over(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Another run is never touched; this very one goes on (test_interrupt.py) once it has a checkpoint."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    save_config(load_config(["recipe=smoke", f"run_dir={tmp_path}", "seed=1"]), tmp_path / "config.yaml")
    before = (tmp_path / "config.yaml").read_text()
    said = refused(capsys, "train", "recipe=smoke", f"run_dir={tmp_path}")
    assert f"holds a run already, with another seed; give another run_dir, or `mispo train --resume {tmp_path}" in said
    said = refused(capsys, "train", "recipe=smoke", "seed=1", f"run_dir={tmp_path}")
    assert "holds a run already, but no checkpoint yet; delete it" in said
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_report_of_no_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "give the run_dir of a `mispo train` run" in refused(capsys, "report", str(tmp_path))


def test_attribute_asks_for_a_run_and_for_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "attribute").endswith("required: RUN\n")


@pytest.mark.parametrize(
    ("rows", "overrides", "words"),
    [
        ([], [], "data.path: 'd.jsonl' is empty"),
        ([{"question": "q"}], [], "data.answer: row 0 of 'd.jsonl' has no 'answer'"),
        ([{"question": "q" * 50, "answer": "1"}], ["data.max_prompt_tokens=9"], "data.max_prompt_tokens: row 0 has 52"),
        (
            [{"question": "q", "answer": "1"}],
            ["rollout.max_new_tokens=2000"],
            "rollout.max_new_tokens: with data.max_prompt_tokens",
        ),
    ],
)
def test_bad_data_and_budgets_are_named_and_leave_no_run(
    tmp_path: Path, rows: list[dict[str, str]], overrides: list[str], words: str
) -> None:
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = mispo(
        *("train", "recipe=smoke", "data=jsonl", "data.path=d.jsonl", "reward=exact", "warm_start.steps=0"),
        "data.eval_size=0",
        "data.max_prompt_tokens=64",
        *overrides,
        cwd=tmp_path,
    )
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and words in line]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("config.yaml"))


def test_the_plan_shows_config_batches_and_memory_and_runs_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["train", "recipe=smoke", "--dry-run"])
    assert exit_.value.code == 0
    plan = capsys.readouterr().out
    for words in ("trajectory_bounds:", "32 prompts × 8 = 256", "12 of 21 or 22 trajectories", "rollout KV cache"):
        assert words in plan, words
    assert "model.preset" in plan.partition("Not the default")[2]
    assert not list(tmp_path.iterdir())


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["--version"], __version__),
        (["train", "--help"], "--resume RUN"),
        (["--help"], "train"),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 0
        assert words in capsys.readouterr().out


def test_resuming_from_a_checkpoint_with_a_foreign_actor_is_refused(tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    train(run, "trainer.steps=1")
    kept = (run / "config.yaml").read_text()
    refused = mispo("train", "--resume", str(run), "trainer.mtp_weight=0.1", cwd=tmp_path)
    assert "trainer.mtp_weight: the model has no draft heads" in refused.stderr
    assert (run / "config.yaml").read_text() == kept
    train(other, "trainer.steps=1", "model.preset=tiny", "warm_start.steps=1")
    shutil.rmtree(run / "checkpoints/step_1/actor")
    shutil.copytree(other / "checkpoints/step_1/actor", run / "checkpoints/step_1/actor")
    rows = (run / "metrics.jsonl").read_bytes()
    done = mispo("train", "--resume", str(run), "trainer.steps=2", cwd=tmp_path)
    assert done.returncode == 2
    assert "holds no whole checkpoint" in done.stderr
    assert re.search(r"step_1/actor/\S+ has \d+ bytes of \d+\)", done.stderr)
    assert "Traceback" not in done.stderr
    assert (run / "metrics.jsonl").read_bytes() == rows

    settled = mispo("train", "--resume", str(run), "model.preset=tiny", cwd=tmp_path)
    assert settled.returncode == 2
    assert "model.preset: is fixed when a run begins" in settled.stderr


def test_the_version_of_the_package_is_the_programs() -> None:
    from importlib.metadata import version

    assert version("mispo") == __version__
