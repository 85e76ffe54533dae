"""Recipes, overrides, sweeps: what a user types, and what is answered to a typo."""

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import recipes
from mispo.config import schema
from mispo.config.load import (
    changed_keys,
    config_from_file,
    expand_sweep,
    is_sweep,
    keys_of,
    load_config,
    recipe_of,
    save_config,
)
from mispo.config.schema import MispoConfig

ROOT = Path(recipes.__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe: str) -> None:
    given = ["data.path=d.jsonl"] if recipe == "paper" else []
    config = load_config([f"recipe={recipe}", *given])
    assert config.model.preset or config.model.path


def test_the_papers_recipe_is_the_defaults() -> None:
    config = load_config(["recipe=paper", "data.path=d.jsonl"])
    assert dict(changed_keys(config)) == {"data.path": "d.jsonl", "reward.name": "exact"}


def test_the_reports_numbers() -> None:
    """Step 3.5 Flash, section 5.2 and its table of RL hyper-parameters."""
    c = MispoConfig()
    assert c.algorithm.filter.token_bounds == [0.5, 2.0]
    assert c.algorithm.filter.trajectory_bounds == [0.996, 1.001]
    assert (c.algorithm.gamma, c.algorithm.lam, c.algorithm.truncation) == (1.0, 1.0, "bootstrap")
    assert (c.rollout.prompts_per_step, c.rollout.samples_per_prompt, c.rollout.temperature) == (256, 16, 1.0)
    assert (c.trainer.actor_minibatches, c.trainer.critic_minibatches) == (4, 12)
    assert (c.trainer.actor_lr, c.trainer.critic_lr) == (2e-6, 5e-6)
    assert (c.trainer.actor_warmup_updates, c.trainer.critic_warmup_updates) == (20, 50)


def test_groups_and_overrides_win_over_the_recipe() -> None:
    config = load_config(["recipe=quickstart", "algorithm=no_filter", "tracking=disabled", "trainer.steps=3"])
    assert config.algorithm.filter.name == "none"
    assert config.tracking.wandb == "disabled"
    assert config.trainer.steps == 3
    assert config.model.preset == "tiny"


def test_bounds_are_given_as_a_list() -> None:
    config = load_config(["algorithm.filter.trajectory_bounds=[0.99,1.01]"])
    assert config.algorithm.filter.trajectory_bounds == [0.99, 1.01]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.step=3", "trainer.step: no such key; did you mean trainer.steps?"),
        ("actor_lr=1", "actor_lr: no such key; did you mean trainer.actor_lr?"),
        ("recipe=quikstart", "recipe: no recipe named 'quikstart'; did you mean quickstart?"),
        ("model=tinny", "model: no model named 'tinny'; did you mean tiny?"),
        ("trainer.steps=many", "trainer.steps: "),
        ("trainer.steps=2.5", "trainer.steps: "),
        ("algorithm.filter.trajectory_bounds=0.9", "algorithm.filter.trajectory_bounds"),
        ("trainer.steps", "the form is key=value"),
        ("data=jsonl", "data: set exactly one of data.task and data.path; neither is"),
    ],
)
def test_typos_are_answered_with_the_nearest_name(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config([override])


def test_a_users_own_recipes_stand_beside_ours(tmp_path: Path) -> None:
    (tmp_path / "recipe").mkdir()
    (tmp_path / "recipe/mine.yaml").write_text("# @package _global_\ndefaults:\n  - smoke\ntrainer:\n  steps: 77\n")
    config = load_config(["recipe=mine"], tmp_path)
    assert (config.trainer.steps, config.model.preset) == (77, "micro")
    with pytest.raises(ValueError, match=r"did you mean mine\?"):
        load_config(["recipe=mien"], tmp_path)
    with pytest.raises(ValueError, match="--config-dir: no directory"):
        load_config(["recipe=mine"], tmp_path / "gone")


def test_folders_named_as_our_packages_where_the_user_stands_do_no_harm(tmp_path: Path) -> None:
    for name in ("model", "rewards", "recipes", "rollouts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    command = [Path(sys.executable).with_name("mispo"), "train", "recipe=smoke", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "preset: micro" in done.stdout


def test_a_saved_config_is_read_back_equal_and_can_be_changed(tmp_path: Path) -> None:
    config = load_config(["recipe=quickstart", "seed=5"])
    save_config(config, tmp_path / "config.yaml")
    assert config_from_file(tmp_path / "config.yaml", []) == config
    longer = config_from_file(tmp_path / "config.yaml", ["trainer.steps=99"])
    assert longer.trainer.steps == 99
    words = ["router.replay=off", "alarms.action=off", "critic.value_clip=null", "tracking.project='a = b'"]
    changed = config_from_file(tmp_path / "config.yaml", [*words, "algorithm.filter.token_bounds=[0.4,3]"])
    assert (changed.router.replay, changed.alarms.action) == ("off", "off")
    assert (changed.critic.value_clip, changed.tracking.project) == (None, "a = b")
    assert changed.algorithm.filter.token_bounds == [0.4, 3.0]
    with pytest.raises(ValueError, match="a resumed run keeps its recipes"):
        config_from_file(tmp_path / "config.yaml", ["recipe=smoke"])
    with pytest.raises(ValueError, match=r"did you mean trainer\.steps"):
        config_from_file(tmp_path / "config.yaml", ["trainer.stepps=9"])
    with pytest.raises(ValueError, match="this is no run directory"):
        config_from_file(tmp_path / "gone.yaml", [])
    (tmp_path / "config.yaml").write_text("router: {replay: off}\n")
    with pytest.raises(ValueError, match=r"router\.replay: YAML reads a bare off as false"):
        config_from_file(tmp_path / "config.yaml", [])
    (tmp_path / "config.yaml").write_text("trainer: {stepps: 3}\n")
    with pytest.raises(ValueError, match="stepps"):
        config_from_file(tmp_path / "config.yaml", [])


def test_sweeps_are_all_combinations() -> None:
    assert is_sweep(["seed=0,1"])
    assert not is_sweep(["seed=0", "algorithm.filter.token_bounds=[0.5,2]"])
    assert expand_sweep(["seed=0,1", "trainer.steps=3", "algorithm=mispo,no_filter"]) == [
        [f"seed={seed}", "trainer.steps=3", f"algorithm={name}"] for seed in (0, 1) for name in ("mispo", "no_filter")
    ]
    assert expand_sweep(["seed=range(0,3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    assert recipe_of(["recipe=smoke"]) == "smoke"
    assert recipe_of(["seed=1"]) == "quickstart"


def sections() -> list[type]:
    return [item for _, item in inspect.getmembers(schema, dataclasses.is_dataclass)]


def test_every_setting_is_described_under_its_field() -> None:
    source = Path(schema.__file__).read_text()
    for section in sections():
        for item in dataclasses.fields(section):
            if dataclasses.is_dataclass(item.type) or "Config" in str(item.type):
                continue
            assert re.search(rf'^    {item.name}: .*\n    """', source, re.MULTILINE), f"{section.__name__}.{item.name}"


def test_every_setting_is_read_somewhere() -> None:
    """A key that changes nothing is a lie."""
    code = "\n".join(
        path.read_text()
        for folder in ("mispo", "rollouts", "rewards", "model")
        for path in (ROOT / folder).rglob("*.py")
        if path.parent.name != "config"
    )
    unread = [key for key, _ in keys_of(MispoConfig()) if not re.search(rf"\.{key.rpartition('.')[2]}\b", code)]
    assert unread == []


def test_a_config_is_loaded_without_torch() -> None:
    program = (
        "import sys; from mispo.config.load import load_config; load_config(['recipe=smoke']);"
        "print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_keys_are_told_as_dotted_names() -> None:
    keys: dict[str, Any] = dict(keys_of(MispoConfig()))
    assert keys["algorithm.filter.token_bounds"] == [0.5, 2.0]
    assert keys["data.task_args"] == {}
    assert keys["seed"] == 0
