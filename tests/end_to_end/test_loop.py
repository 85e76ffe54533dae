"""The whole loop on real parts, micro model: repeatable, resumable, truncation-aware, on one rank and two."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from support.runs import MICRO, mispo, rows_of, train, without_times


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps without an interruption."""
    directory = tmp_path_factory.mktemp("loop") / "straight"
    train(directory, "trainer.steps=4", "checkpoint.every=2")
    return directory


def test_a_run_directory_holds_everything(straight: Path) -> None:
    rows = rows_of(straight)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {"eval/count_bits/greedy", "eval/count_bits/avg@1", "response_length/mean"} <= set(rows[0])
    assert {"eval/count_bits/greedy", "reward/mean", "moe/confidence/layer_2"} <= set(rows[4])
    assert [row["actor/updates"] for row in rows[1:]] == [4.0] * 4
    assert [row["critic/updates"] for row in rows[1:]] == [6.0] * 4
    for name in ("config.yaml", "report.html", "curve.png", "samples_before.jsonl", "samples_after.jsonl"):
        assert (straight / name).stat().st_size > 0, name
    assert sorted(p.name for p in (straight / "checkpoints").iterdir()) == ["latest", "step_2", "step_4"]
    assert len(list((straight / "rollouts").glob("*.parquet"))) == 4


def test_the_same_seed_gives_the_same_run(straight: Path, tmp_path: Path) -> None:
    """In a process of another origin, with another seed of str hashes."""
    again = train(tmp_path / "again", "trainer.steps=4", "checkpoint.every=2", fresh=True)
    assert without_times(again) == without_times(rows_of(straight))
    other = train(tmp_path / "other", "trainer.steps=1", "seed=1")
    assert other[1]["reward/mean"] != again[1]["reward/mean"]


def test_a_resumed_run_is_the_same_run(straight: Path, tmp_path: Path) -> None:
    directory = tmp_path / "resumed"
    train(directory, "trainer.steps=2", "checkpoint.every=2")
    rows = train(directory, "trainer.steps=4", resume=True)
    expected = without_times(rows_of(straight))
    assert without_times(rows)[3:] == expected[3:]
    for file in ("actor/model.safetensors", "critic.safetensors", "actor_optimizer.safetensors"):
        a, b = (load_file(run / "checkpoints/step_4" / file) for run in (straight, directory))
        assert all(torch.equal(tensor, b[name]) for name, tensor in a.items()), file


def test_a_replay_of_saved_rollouts_trains_as_the_run_did(straight: Path, tmp_path: Path) -> None:
    """No engine: the same updates from the same weights, so the same numbers, bit for bit, in the second step too."""
    files = [str(straight / f"rollouts/step_{step}.parquet") for step in (1, 2)]
    done = mispo("train", *MICRO, f"run_dir={tmp_path / 'run'}", "--rollouts", *files, "seed=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "saved rollouts of 2 steps: no engine" in done.stdout
    rows, expected = without_times(rows_of(tmp_path / "run")), without_times(rows_of(straight))
    assert rows[0] == {"step": 0}
    for step in (1, 2):
        assert rows[step] == {k: v for k, v in expected[step].items() if not k.startswith(("sync/", "attribution/"))}
    for name in ("actor/loss", "critic/loss", "mismatch/k3", "moe/rollout_confidence/mean"):
        assert name in rows[2]


def test_rollouts_of_another_model_are_not_replayed(straight: Path, tmp_path: Path) -> None:
    file = straight / "rollouts/step_1.parquet"
    for replayed, words in (
        (straight / "config.yaml", "config.yaml does not read as rollouts of this version of mispo"),
        (straight / "rollouts/step_9.parquet", "--rollouts: no such file"),
    ):
        done = mispo("train", *MICRO, f"run_dir={tmp_path}/no", "--rollouts", str(file), str(replayed), cwd=tmp_path)
        assert done.returncode == 2
        assert words in done.stderr
    table = pq.read_table(file)
    pq.write_table(table.slice(0, 7), tmp_path / "cut.parquet")
    done = mispo("train", *MICRO, f"run_dir={tmp_path}/no", "--rollouts", f"{tmp_path}/cut.parquet", cwd=tmp_path)
    assert "cut.parquet does not hold equally many samples of each prompt" in done.stderr
    wide = [[10**6] * len(ids) for ids in table["prompt_ids"].to_pylist()]
    place = table.column_names.index("prompt_ids")
    pq.write_table(table.set_column(place, "prompt_ids", pa.array(wide)), tmp_path / "other.parquet")
    done = mispo("train", *MICRO, f"run_dir={tmp_path}/no", "--rollouts", f"{tmp_path}/other.parquet", cwd=tmp_path)
    assert done.returncode == 2
    assert "has the token 1000000, but the model knows only" in done.stderr


def columns_of(directory: Path, step: int) -> list[dict[str, Any]]:
    return pq.read_table(directory / f"rollouts/step_{step}.parquet").to_pylist()


def test_on_policy_in_fp32_the_papers_bounds_accept_everything(straight: Path) -> None:
    for row in rows_of(straight)[1:]:
        assert row["mis/traj_accept"] == 1.0
        assert row["mis/token_accept"] == 1.0
        assert row["mismatch/max_abs"] < 1e-4
        assert row["rollout/lag"] == 0
        assert row["sync/max_abs"] < 1e-4


def test_with_stale_rollouts_the_acceptance_falls(tmp_path: Path) -> None:
    rows = train(tmp_path / "stale", "trainer.steps=4", "rollout.lag=6", "trainer.actor_lr=3e-4")
    updates = [int(row["actor/updates"]) for row in rows[1:]]
    assert rows[1]["mis/traj_accept"] == 1.0
    assert min(row["mis/traj_accept"] for row in rows[2:]) < 0.8
    assert sum(updates[:3]) > 6
    for step in (1, 2, 3, 4):
        done = sum(updates[: step - 1])
        assert rows[step]["rollout/lag"] == min(done, 6)
        assert {row["weight_version"] for row in columns_of(tmp_path / "stale", step)} == {max(done - 6, 0)}


def test_a_stale_run_resumes_as_the_same_run(tmp_path: Path) -> None:
    options = ("rollout.lag=6", "checkpoint.every=2", "trainer.actor_lr=3e-4")
    whole = train(tmp_path / "whole", "trainer.steps=4", *options)
    train(tmp_path / "parts", "trainer.steps=2", *options)
    parts = train(tmp_path / "parts", "trainer.steps=4", resume=True)
    assert without_times(parts)[3:] == without_times(whole)[3:]


def test_a_truncated_trajectory_aims_at_the_value_after_its_last_token(tmp_path: Path) -> None:
    """γ = λ = 1: every token's critic target is R̂, so their mean is."""
    options = ("rollout.max_new_tokens=6", "critic.head_init_std=0.3", "trainer.steps=1")
    train(tmp_path / "bootstrap", *options)
    rows = columns_of(tmp_path / "bootstrap", 1)
    truncated = [row for row in rows if row["finish_reason"] == "length"]
    finished = [row for row in rows if row["finish_reason"] == "stop"]
    assert len(truncated) >= 3
    assert len(finished) >= 3
    for row in truncated:
        assert row["target_mean"] == pytest.approx(min(max(row["bootstrap"], 0.0), 1.0), abs=1e-6)
    assert any(0 < row["bootstrap"] < 1 for row in truncated)
    for row in finished:
        assert row["target_mean"] == pytest.approx(row["reward"], abs=1e-6)

    train(tmp_path / "zero", *options, "algorithm.truncation=zero")
    assert all(
        row["target_mean"] == pytest.approx(0.0, abs=1e-6)
        for row in columns_of(tmp_path / "zero", 1)
        if row["finish_reason"] == "length"
    )


def test_a_step_without_anything_accepted_moves_the_critic_only(tmp_path: Path) -> None:
    rows = train(
        tmp_path / "run",
        "trainer.steps=3",
        "rollout.lag=4",
        "trainer.actor_lr=1e-2",
        "algorithm.filter.trajectory_bounds=[1.0,1.0]",
    )
    assert rows[3]["mis/traj_accept"] == 0.0
    assert rows[3]["actor/updates"] == 0.0
    assert rows[3]["mis/empty_minibatches"] == 4.0
    assert rows[3]["critic/updates"] == 6.0


@pytest.mark.parametrize("name", ["mispo_quantile", "mispo_metropolis", "token_only", "random_reject", "no_filter"])
def test_every_filter_trains(tmp_path: Path, name: str) -> None:
    options = (f"algorithm={name}", "rollout.lag=4", "trainer.actor_lr=1e-4", "checkpoint.every=2")
    whole = train(tmp_path / "whole", *options, "trainer.steps=3")
    accepted = whole[3]["mis/traj_accept"]
    rows = columns_of(tmp_path / "whole", 3)
    counts = [row["multiplicity"] for row in rows]
    assert accepted == sum(count > 0 for count in counts) / len(counts)
    if name in ("token_only", "no_filter"):
        assert counts == [1] * 32
    elif name == "mispo_metropolis":
        assert max(counts) > 1
        assert sum(counts) == 32
    else:
        assert 0 < accepted < 1
        assert set(counts) == {0, 1}
    if name == "mispo_quantile":
        widths = [row["mis/window_high"] for row in whole[1:]]
        train(tmp_path / "parts", *options, "trainer.steps=2")
        parts = train(tmp_path / "parts", "trainer.steps=3", resume=True)
        assert [row["mis/window_high"] for row in parts[1:]] == widths


@pytest.mark.parametrize(
    ("trainer", "rollout", "largest", "window"),
    [("bf16", "bf16", 0.05, "[0.996,1.001]"), ("fp32", "fp16", 0.001, "[0.9999,1.0001]")],
)
def test_precisions_of_a_gpu_on_cpu(tmp_path: Path, trainer: str, rollout: str, largest: float, window: str) -> None:
    """Engine and trainer differ a little, and the filter sees it; old weights are kept in the rollout's precision.

    In fp16 so little (ρ̄ within 5e-4 of 1) that hardly any of 32 trajectories leaves the paper's window.
    """
    options = (f"trainer.dtype={trainer}", f"rollout.dtype={rollout}", "rollout.lag=2")
    options += (f"algorithm.filter.trajectory_bounds={window}",)
    rows = train(tmp_path / "run", "trainer.steps=2", *options)
    assert 1e-7 < rows[1]["mismatch/k3"] < largest
    for row in rows[1:]:
        assert 0 < row["sync/max_abs"] < 0.3
        assert row["critic/updates"] == 6.0
    assert rows[1]["mis/traj_accept"] < 1.0
    checkpoint = tmp_path / "run/checkpoints/step_2"
    weights = load_file(checkpoint / "actor/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    kept = {n: t.dtype for n, t in load_file(checkpoint / "history.safetensors").items() if "/probe/" not in n}
    routers = {name for name in kept if "mlp.gate." in name}
    assert {kept[name] for name in routers} == {torch.float32}
    assert {kept[name] for name in kept.keys() - routers} == {torch.float16 if rollout == "fp16" else torch.bfloat16}


@pytest.mark.parametrize(("stage", "options"), [(2, ()), (3, ("router.replay=rollout",))])
def test_two_ranks_run_the_same_first_step_as_one(
    straight: Path, tmp_path: Path, stage: int, options: tuple[str, ...]
) -> None:
    rows = train(tmp_path / "two", "trainer.steps=1", f"trainer.zero_stage={stage}", *options, ranks=2)
    one = (train(tmp_path / "one", "trainer.steps=1", *options) if options else rows_of(straight))[1]
    assert 0.9 < rows[1]["perf/balance"] <= 1
    for key in ("reward/mean", "response_length/mean", "actor/updates", "critic/updates", "moe/dead_experts"):
        assert rows[1][key] == one[key], key
    for key in ("actor/loss", "actor/grad_norm", "actor/entropy", "critic/loss", "moe/confidence/mean"):
        assert rows[1][key] == pytest.approx(one[key], rel=1e-4), key
    assert rows[1]["moe/expert_agreement"] == one["moe/expert_agreement"]


def test_the_checkpoint_opens_where_mispo_was_never_imported(straight: Path, tmp_path: Path) -> None:
    program = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "path = sys.argv[1]; tokenizer = AutoTokenizer.from_pretrained(path)\n"
        "model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'ones in 5?'}], add_generation_prompt=True,"
        " return_tensors='pt', return_dict=True)\n"
        "out = model.generate(**ids, max_new_tokens=4, do_sample=False)\n"
        "assert not any(name.split('.')[0] in ('mispo', 'model', 'rollouts') for name in sys.modules)\n"
        "print(type(model).__name__, tuple(out.shape)[0])"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program, str(straight / "checkpoints/step_4/actor")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env={"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PATH": ""},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ["StepForCausalLM", "1"]
