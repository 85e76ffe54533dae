"""Every method trains the micro model for three steps, through the command line."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from model.tokenizer import character_tokenizer
from support.runs import MICRO, mispo, rows_of, train, without_times

GSPO_WITH_A_CRITIC = (
    "algorithm=gspo",
    "algorithm/advantage=gae",
    "critic=separate",
    "algorithm.whiten=batch",
    "algorithm.truncation=bootstrap",
    "algorithm.loss.clip=[1e-4,1e-4]",
)
WITH_A_CRITIC = {name: (f"algorithm={name}",) for name in ("ppo", "tis", "icepop")} | {"gspo_gae": GSPO_WITH_A_CRITIC}
GROUPED = {name: (f"algorithm={name}",) for name in ("grpo", "dr_grpo", "dapo", "gspo", "cispo")}
OTHERS = WITH_A_CRITIC | GROUPED


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_trains(tmp_path: Path, name: str) -> None:
    rows = train(tmp_path / "run", *OTHERS[name], "trainer.steps=3", "rollout.lag=4", "trainer.actor_lr=1e-4")
    critic = name in WITH_A_CRITIC
    for row in rows[1:]:
        assert row["actor/updates"] == 4.0
        assert row["actor/grad_norm"] > 0
        assert ("critic/loss" in row) == critic
        assert row["mis/traj_accept"] == 1.0
    assert (tmp_path / "run/checkpoints/step_3/critic.safetensors").exists() == critic
    assert rows[3]["mismatch/k3"] > 1e-6
    if name.startswith("gspo"):
        assert rows[1]["actor/clip_frac"] > 0
    if name == "dapo":
        assert rows[1]["rollout/rounds"] >= 1
        assert rows[1]["rollout/filled"] == 0


def test_dynamic_sampling_replaces_the_same_prompts_on_two_ranks(tmp_path: Path) -> None:
    """Other problems of the same difficulty take the place of those that all or none of the samples solve."""
    options = ("algorithm=dapo", "trainer.steps=1", "rollout.samples_per_prompt=2")
    one, two = (train(tmp_path / str(ranks), *options, ranks=ranks)[1] for ranks in (1, 2))
    assert one["rollout/rounds"] > 1
    for key in ("rollout/rounds", "rollout/filled", "reward/mean", "response_length/mean", "actor/updates"):
        assert one[key] == two[key], key
    assert two["actor/loss"] == pytest.approx(one["actor/loss"], rel=1e-4)


def test_a_run_without_a_critic_resumes_and_holds_to_its_reference(tmp_path: Path) -> None:
    options = ("algorithm=grpo", "algorithm.kl=0.05", "algorithm.entropy=0.001", "trainer.actor_lr=3e-4")
    whole = train(tmp_path / "whole", *options, "trainer.steps=3", "checkpoint.every=2")
    train(tmp_path / "parts", *options, "trainer.steps=2", "checkpoint.every=2")
    parts = train(tmp_path / "parts", "trainer.steps=3", resume=True)
    assert whole[1]["actor/kl_ref"] < whole[3]["actor/kl_ref"]
    for key in ("actor/kl_ref", "actor/loss", "reward/mean"):
        assert parts[3][key] == whole[3][key]


def test_a_critic_on_the_policys_trunk_learns_with_it_and_resumes_as_the_same_run(tmp_path: Path) -> None:
    """Also where the filter rejects everything: then only values are learnt, and the trunk still moves."""
    options = ("critic=shared", "trainer.critic_minibatches=4", "critic.loss_weight=0.3", "rollout.lag=1")
    nothing = ("algorithm.filter.token_bounds=[1.0,1.0]", "algorithm.filter.trajectory_bounds=[1.0,1.0]")
    whole = train(tmp_path / "whole", *options, *nothing, "trainer.steps=3", "checkpoint.every=2")
    train(tmp_path / "parts", *options, *nothing, "trainer.steps=2")
    parts = train(tmp_path / "parts", "trainer.steps=3", resume=True)
    assert without_times(parts)[3] == without_times(whole)[3]
    assert whole[1]["mis/token_accept"] < 1
    for row in whole[1:]:
        assert row["critic/updates"] == row["actor/updates"] == 4.0
        assert row["critic/loss"] > 0
        assert row["critic/lr"] == row["actor/lr"]
    assert whole[3]["mismatch/k3"] > 1e-6  # the policy moved with the trunk
    assert sorted(load_file(tmp_path / "whole/checkpoints/latest/critic.safetensors")) == ["bias", "weight"]


def test_a_critic_with_a_backbone_of_its_own_choice(tmp_path: Path) -> None:
    """Here a dense Qwen; a model with another tokenizer is refused by name."""
    tokenizer = character_tokenizer()
    tokens = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    shape = Qwen2Config(**tokens, **heads, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    Qwen2ForCausalLM(shape).save_pretrained(tmp_path / "small")
    tokenizer.save_pretrained(tmp_path / "small")
    options = (f"critic.model={tmp_path / 'small'}", "trainer.steps=2")
    rows = train(tmp_path / "run", *options)
    assert rows[2]["critic/updates"] > 0
    saved = load_file(tmp_path / "run/checkpoints/latest/critic.safetensors")
    assert {name.split(".")[2] for name in saved if name.startswith("backbone.layers")} == {"0", "1"}
    rows = train(tmp_path / "run", "trainer.steps=3", resume=True)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    tokenizer.add_tokens(["§"])
    tokenizer.save_pretrained(tmp_path / "small")
    done = mispo("train", *MICRO, *options, f"run_dir={tmp_path / 'bad'}", cwd=tmp_path)
    assert done.returncode == 2
    assert "critic.model" in done.stderr
    assert "another tokenizer than the policy" in done.stderr


def test_adapters_learn_on_a_frozen_model_and_resume_as_the_same_run(tmp_path: Path) -> None:
    """On the preset as the warm start left it; the checkpoint is a plain model with the adapters merged in."""
    options = ("model.lora.rank=4", "trainer.actor_lr=1e-3", "rollout.lag=1", "checkpoint.every=2")
    whole = train(tmp_path / "whole", *options, "trainer.steps=3")
    train(tmp_path / "parts", *options, "trainer.steps=2")
    parts = train(tmp_path / "parts", "trainer.steps=3", resume=True)
    assert without_times(parts)[3] == without_times(whole)[3]
    assert whole[3]["mismatch/k3"] > 1e-6
    checkpoint = tmp_path / "whole/checkpoints/latest"
    base, after = (load_file(path / "model.safetensors") for path in (tmp_path / "whole/base", checkpoint / "actor"))
    assert base.keys() == after.keys()
    moved = {name for name, tensor in base.items() if not torch.equal(tensor, after[name])}
    assert "model.layers.1.self_attn.q_proj.weight" in moved
    assert not any("embed" in name or ".moe." in name or "norm" in name for name in moved)
    assert all(
        ".lora_" in name or name.startswith("value_head") for name in load_file(checkpoint / "critic.safetensors")
    )


def test_the_current_mask_rejects_what_the_old_one_keeps(tmp_path: Path) -> None:
    """On policy π_old accepts all; π_θ has left π_rollout after the first of four mini-batches."""
    options = ["trainer.steps=2", "trainer.actor_lr=1e-2", "trainer.actor_warmup_updates=0"]
    old = train(tmp_path / "old", *options)
    current = train(tmp_path / "current", *options, "algorithm.mask_policy=current")
    assert old[1]["actor/updates"] == 4.0
    assert current[1]["actor/updates"] + current[1]["mis/empty_minibatches"] == 4.0
    assert current[1]["actor/loss"] != old[1]["actor/loss"]


def test_an_alarm_names_its_cause_and_can_stop_the_run(tmp_path: Path) -> None:
    done = mispo(
        *("train", "recipe=smoke", "tracking.wandb=disabled", f"run_dir={tmp_path / 'run'}", "warm_start.steps=5"),
        *("rollout.prompts_per_step=8", "rollout.samples_per_prompt=4", "data.eval_size=8", "rollout.lag=4"),
        *("trainer.actor_lr=1e-2", "algorithm.filter.trajectory_bounds=[1.0,1.0]"),
        *("alarms.action=stop", "alarms.patience=1", "critic.pretrain_steps=1"),
        cwd=tmp_path,
    )
    assert done.returncode == 1
    assert "critic pre-training 1/1" in done.stdout
    assert "alarms.action=stop: mis/traj_accept: 0.00% of the samples accepted" in done.stderr
    assert "Suspected: stale weights (rollout.lag=4)" in done.stderr
    last = rows_of(tmp_path / "run")[-1]["step"]
    assert (tmp_path / f"run/checkpoints/step_{last}").is_dir()
