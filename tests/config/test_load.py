"""Recipes: every one loads, groups choose parts at any depth, a user's own stand beside ours."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

import recipes
from mispo.config.algorithm_parts import Bounds, Gae, GroupStd, Gspo, KeepAll, Ppo, Quantile
from mispo.config.load import changed_keys, load_config
from mispo.config.parts import AdamW, Muon, NoCritic, SharedCritic
from mispo.config.registry import GROUPS, PARTS, chosen_part
from mispo.config.schema import MispoConfig
from mispo.config.setting import keys_of

ROOT = Path(recipes.__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes/recipe").glob("*.yaml"))
METHODS = sorted(path.stem for path in (ROOT / "recipes/algorithm").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_loads(recipe: str) -> None:
    given = ["data.path=d.jsonl"] if recipe == "paper" else []
    config = load_config([f"recipe={recipe}", *given])
    assert config.model.preset or config.model.path


@pytest.mark.parametrize("method", METHODS)
def test_every_method_loads_and_takes_another_part(method: str) -> None:
    config = load_config([f"algorithm={method}", "algorithm/filter=bounds", "algorithm/loss=gspo"])
    assert config.algorithm.filter == Bounds()
    assert config.algorithm.loss == Gspo()


CHOICES = [
    (group, name)
    for group in GROUPS
    for name in [
        *(path.stem for path in (ROOT / "recipes" / group).glob("*.yaml")),
        *(part().name for part in PARTS.get(group, ())),
    ]
]


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_choice_of_every_group_is_composed(group: str, name: str) -> None:
    """What a choice needs besides: another algorithm's parts, a file."""
    needed = {
        "algorithm/advantage": ["critic=none", "algorithm.truncation=zero"] if name != "gae" else [],
        "critic": {"shared": ["trainer.critic_minibatches=4"], "none": ["algorithm=grpo"]}.get(name, []),
        "data": ["data.path=d", "warm_start.steps=0", "reward=exact"] if name == "jsonl" else [],
        "recipe": ["data.path=d"] if name == "paper" else [],
    }
    config = load_config([f"{group}={name}", *needed.get(group, [])])
    if group in PARTS:
        assert chosen_part(config, group).name == name.partition("_plain")[0].partition("_clip")[0]


def test_the_papers_recipe_is_the_defaults() -> None:
    """So that mispo_defaults, which Hydra starts from, is MispoConfig() with its parts."""
    config = load_config(["recipe=paper", "data.path=d.jsonl"])
    assert dict(changed_keys(config)) == {"data.path": "d.jsonl", "reward.parts.task.name": "exact"}


def test_every_default_stands_in_one_place() -> None:
    """Recipes say only what is not the default, except the two whose choice is the default itself."""
    defaults = dict(keys_of(MispoConfig()))
    repeated = set()
    for path in sorted((ROOT / "recipes").glob("*/**/*.yaml")):
        name = path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        prefix = "" if "@package _global_" in path.read_text() else f"{name.rpartition('/')[0].replace('/', '.')}."
        body = OmegaConf.load(path)
        assert isinstance(body, DictConfig)
        body.pop("defaults", None)
        repeated |= {name for key, value in flat(body, prefix) if key in defaults and defaults[key] == value}
    assert repeated == {"data/jsonl", "reward/gym"}


def flat(body: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        if isinstance(value, DictConfig):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def test_the_reports_numbers() -> None:
    """Step 3.5 Flash, section 5.2 and its table of RL hyper-parameters."""
    c = MispoConfig()
    assert c.algorithm.filter == Bounds(token_bounds=[0.5, 2.0], trajectory_bounds=[0.996, 1.001])
    assert c.algorithm.advantage == Gae(gamma=1.0, lam=1.0)
    assert c.algorithm.truncation == "bootstrap"
    assert c.optimizer == Muon(weight_decay=0.1)
    assert (c.rollout.prompts_per_step, c.rollout.samples_per_prompt, c.rollout.temperature) == (256, 16, 1.0)
    assert (c.trainer.actor_minibatches, c.trainer.critic_minibatches) == (4, 12)
    assert (c.trainer.actor_lr, c.trainer.critic_lr) == (2e-6, 5e-6)
    assert (c.trainer.actor_warmup_updates, c.trainer.critic_warmup_updates) == (20, 50)


def test_groups_and_overrides_win_over_the_recipe() -> None:
    config = load_config(["recipe=quickstart", "algorithm=no_filter", "tracking=disabled", "trainer.steps=3"])
    assert config.algorithm.filter == KeepAll()
    assert config.tracking.wandb == "disabled"
    assert config.trainer.steps == 3
    assert config.model.preset == "tiny"
    assert config.optimizer == AdamW()
    assert load_config(["recipe=quickstart", "optimizer=muon"]).optimizer == Muon()


def test_a_method_brings_its_parts_and_no_critic() -> None:
    config = load_config(["algorithm=dapo"])
    assert config.algorithm.loss == Ppo(clip=[0.2, 0.28], dual_clip=None)
    assert config.algorithm.advantage == GroupStd()
    assert config.critic == NoCritic()
    back = ["algorithm/advantage=gae", "critic=shared", "trainer.critic_minibatches=4"]
    assert load_config(["algorithm=dapo", *back]).critic == SharedCritic()


def test_a_chosen_part_has_no_keys_of_the_one_before() -> None:
    config = load_config(["algorithm/filter=quantile", "algorithm.filter.target_steps=7"])
    assert config.algorithm.filter == Quantile(target_steps=7)
    assert dict(changed_keys(config, load_config([]))) == {
        "algorithm.filter.name": "quantile",
        "algorithm.filter.target_steps": 7,
    }


def write(folder: Path, name: str, text: str) -> None:
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_users_own_recipes_stand_beside_ours(tmp_path: Path) -> None:
    write(tmp_path, "recipe/mine", "# @package _global_\ndefaults:\n  - smoke\ntrainer:\n  steps: 77\n")
    config = load_config(["recipe=mine"], tmp_path)
    assert (config.trainer.steps, config.model.preset) == (77, "micro")
    with pytest.raises(ValueError, match=r"did you mean mine\?"):
        load_config(["recipe=mien"], tmp_path)
    with pytest.raises(ValueError, match="--config-dir: no directory"):
        load_config(["recipe=mine"], tmp_path / "gone")


def test_a_users_recipe_chooses_parts_and_entries(tmp_path: Path) -> None:
    write(
        tmp_path,
        "recipe/mine",
        "# @package _global_\n"
        "defaults:\n  - smoke\n  - override /algorithm: grpo\n  - override /algorithm/filter: quantile\n"
        "  - override /eval: math\n"
        "algorithm: {filter: {target_steps: 9}}\n"
        "reward: {parts: {form: {name: format, weight: 0.1}}}\n",
    )
    write(tmp_path, "eval/math", "sets: {aime: {path: aime.jsonl, samples: 4}}\n")
    write(tmp_path, "algorithm/filter/wide", "defaults: [bounds]\ntoken_bounds: [0.1, 10]\n")
    config = load_config(["recipe=mine", "eval.sets.aime.size=3"], tmp_path)
    assert config.algorithm.filter == Quantile(target_steps=9)
    assert config.algorithm.advantage == GroupStd()
    assert list(config.reward.parts) == ["task", "form"]
    assert (config.eval.sets["aime"].samples, config.eval.sets["aime"].size) == (4, 3)
    assert load_config(["algorithm/filter=wide"], tmp_path).algorithm.filter == Bounds(token_bounds=[0.1, 10.0])


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("trainer: {stepps: 3}", "trainer.stepps: no such key; did you mean trainer.steps? (in recipe/mine)"),
        ("trainer: {steps: many}", "trainer.steps: Value 'many' of type 'str'"),
        (
            "algorithm: {filter: {ratio: mean}}",
            "filter metropolis has it: algorithm/filter=metropolis (in recipe/mine)",
        ),
        (
            "algorithm: {filter: {name: none}}",
            "algorithm.filter.name: is fixed by the part; choose it with algorithm/f",
        ),
        ("data: {mixture: {a: {pth: x}}}", "data.mixture.a.pth: no such key; did you mean data.mixture.a.path?"),
        ("reward: {parts: {a b: {name: exact}}}", "reward.parts: a name must consist of letters, digits, _ and -"),
    ],
)
def test_typos_in_a_users_recipe_are_answered_as_on_the_command_line(tmp_path: Path, body: str, words: str) -> None:
    write(tmp_path, "recipe/mine", f"# @package _global_\ndefaults:\n  - smoke\n{body}\n")
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(["recipe=mine"], tmp_path)


def test_folders_named_as_our_packages_where_the_user_stands_do_no_harm(tmp_path: Path) -> None:
    for name in ("model", "rewards", "recipes", "rollouts"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong one')")
    command = [Path(sys.executable).with_name("mispo"), "train", "recipe=smoke", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "preset: micro" in done.stdout


def test_a_config_is_loaded_and_a_bad_key_refused_without_torch() -> None:
    program = (
        "import sys; from mispo.config.load import load_config; load_config(['recipe=smoke'])\n"
        "try: load_config(['trainer.stepps=3'])\n"
        "except ValueError: print(sorted({'torch', 'transformers', 'deepspeed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
