"""What a user types on the command line, and what is answered to a typo."""

import re

import pytest

from mispo.config.load import is_sweep, load_config, recipe_of


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.step=3", "trainer.step: no such key; did you mean trainer.steps?"),
        ("actor_lr=1", "actor_lr: no such key; did you mean trainer.actor_lr?"),
        ("mode=tiny", "mode: no such key; did you mean model?"),
        ("seed.x=3", "seed.x: no such key; did you mean seed?"),
        ("hydra.run.dir=x", "hydra.run.dir: no such key"),
        ("recipe=quikstart", "recipe: no recipe named 'quikstart'; did you mean quickstart?"),
        ("model=tinny", "model: no model named 'tinny'; did you mean tiny?"),
        ("eval=math", "eval: no recipe is built in; give --config-dir a directory with eval/NAME.yaml"),
        ("algorithm/filter=quantle", "algorithm/filter: no filter named 'quantle'; did you mean quantile?"),
        ("algorithm/filters=quantile", "algorithm/filters: no such key; did you mean algorithm/filter?"),
        ("trainer.steps=many", "trainer.steps: Value 'many' of type 'str' could not be converted to Integer"),
        ("trainer.steps=2.5", "trainer.steps: "),
        ("algorithm.filter.trajectory_bounds=0.9", "algorithm.filter.trajectory_bounds: "),
        ("trainer.steps", "the form is key=value"),
        ("algorithm.overlong=3", "algorithm.overlong: is a section; set one of its keys, such as"),
        ("~trainer.steps", "trainer.steps: cannot be removed"),
        ("data.prompt='${x}'", "data.prompt: Interpolation key 'x' not found"),
        ("run_dir='???'", "run_dir: "),
    ],
)
def test_typos_are_answered_with_the_nearest_name(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config([override])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["algorithm.filter.ratio=mean"],
            "algorithm.filter.ratio: filter bounds has no such key; filter metropolis has it: "
            "algorithm/filter=metropolis",
        ),
        (
            ["algorithm/loss=gspo", "algorithm.loss.dual_clip=2"],
            "algorithm.loss.dual_clip: loss gspo has no such key; loss ppo has it: algorithm/loss=ppo",
        ),
        (
            ["algorithm=grpo", "critic.lam=0.9"],
            "critic.lam: critic none has no such key; critic separate and shared have it: critic=separate",
        ),
        (["critic.loss_weight=1"], "critic shared has it: critic=shared"),
        (["optimizer=muon", "optimizer.max_grad_norm=2"], "optimizer adamw has it: optimizer=adamw"),
        (["algorithm.filter.target_step=3"], "did you mean algorithm.filter.target_steps?"),
        (["algorithm.filter.name=quantile"], "algorithm.filter.name: choose it with algorithm/filter=quantile"),
        (["algorithm.filter=quantile"], "algorithm.filter: choose it with algorithm/filter=quantile"),
        (["critic.kind=shared"], "critic.kind: no such key; choose the critic with critic=shared"),
    ],
)
def test_a_key_of_another_part_is_refused_and_the_part_that_has_it_named(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config(overrides)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.mixture.a.pth=x", "data.mixture.a.pth: no such key; did you mean data.mixture.a.path?"),
        ("data.mixture={a: {pth: x}}", "data.mixture.a.pth: no such key; did you mean data.mixture.a.path?"),
        ("reward.parts.form.weight=x", "reward.parts.form.weight: Value 'x' of type 'str'"),
        ("eval.sets.a=x", "eval.sets: holds named entries; set one of their keys, such as eval.sets.a.task=…"),
        ("eval.sets=3", "eval.sets: holds named entries; set one of their keys, such as eval.sets.NAME.task=…"),
    ],
)
def test_entries_take_their_own_keys_only(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        load_config([override])


def test_all_bad_keys_are_told_at_once() -> None:
    with pytest.raises(ValueError) as problems:
        load_config(["trainer.stp=1", "algorithm.filter.ratio=mean", "trainer.steps=many"])
    assert [line.partition(":")[0] for line in str(problems.value).splitlines()] == [
        "trainer.stp",
        "algorithm.filter.ratio",
        "trainer.steps",
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rollout.slots=8", "engine.slots"),
        ("trainer.optimizer=adamw", "optimizer"),
        ("trainer.weight_decay=0", "optimizer.weight_decay"),
        ("trainer.max_grad_norm=2", "optimizer.max_grad_norm"),
        ("algorithm.clip=[0.1,0.1]", "algorithm.loss.clip"),
        ("algorithm.lam=0.9", "algorithm.advantage.lam"),
        ("reward.name=exact", "reward.parts.task.name"),
    ],
)
def test_a_key_that_moved_is_answered_with_its_new_place(old: str, new: str) -> None:
    with pytest.raises(ValueError, match=rf"no such key; did you mean {re.escape(new)}\?"):
        load_config([old])


def test_entries_come_by_name_from_the_command_line() -> None:
    config = load_config(
        [
            *("recipe=paper", "data.mixture.web.path=d.jsonl", "data.mixture.bits.task=count_bits"),
            *("data.mixture.bits.weight=3", "data.mixture.bits.task_args.max_n=7", "eval.sets.test={path: e, size: 9}"),
            *("+reward.parts.form.name=format", "~reward.parts.task"),
        ]
    )
    assert list(config.data.mixture) == ["web", "bits"]
    assert (config.data.mixture["bits"].weight, config.data.mixture["bits"].task_args) == (3.0, {"max_n": 7})
    assert (config.eval.sets["test"].path, config.eval.sets["test"].size) == ("e", 9)
    assert list(config.reward.parts) == ["form"]


def test_a_section_may_be_given_as_a_dictionary() -> None:
    config = load_config(["trainer={steps: 3, zero_stage: 1}", "critic={lam: 0.5}", "data.task_args={min_n: 1}"])
    assert (config.trainer.steps, config.trainer.zero_stage) == (3, 1)
    assert config.data.task_args == {"max_n": 4095, "min_n": 1}


def test_bounds_are_given_as_a_list() -> None:
    config = load_config(["algorithm.advantage.lam=0.5", "algorithm.filter.trajectory_bounds=[0.99,1.01]"])
    assert getattr(config.algorithm.filter, "trajectory_bounds") == [0.99, 1.01]  # noqa: B009


def test_several_values_are_a_sweep() -> None:
    assert is_sweep(["seed=0,1"])
    assert is_sweep(["algorithm/filter=bounds,quantile"])
    assert not is_sweep(["seed=0", "algorithm.filter.token_bounds=[0.5,2]"])


def test_the_recipe_is_the_quickstart_unless_another_one_is_chosen() -> None:
    assert recipe_of(["recipe=smoke"]) == "smoke"
    assert recipe_of(["seed=1"]) == "quickstart"
