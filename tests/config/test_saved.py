"""config.yaml of a run directory: read back equal, and changed within what a resumed run may change."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import recipes
from mispo.config.algorithm_parts import Gspo, Quantile, Tis
from mispo.config.load import changed_keys, config_from_file, config_yaml, load_config, save_config
from mispo.config.schema import DataConfig, EvalSetConfig, MispoConfig, MixtureSourceConfig, ModelConfig

FOLDER = Path(recipes.__file__).parent


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (FOLDER / "recipe").glob("*.yaml")))
@pytest.mark.parametrize("method", sorted(path.stem for path in (FOLDER / "algorithm").glob("*.yaml")))
def test_the_config_of_every_recipe_is_read_back_equal(tmp_path: Path, recipe: str, method: str) -> None:
    source = ["data.path=d.jsonl"] if recipe == "paper" else []
    config = load_config([f"recipe={recipe}", f"algorithm={method}", *source])
    save_config(config, tmp_path / "config.yaml")
    assert config_from_file(tmp_path / "config.yaml", []) == config


@settings(max_examples=40, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"])),
        st.sampled_from(
            ["???", "${", "${oc.env:HOME}", "\\${x}", "a${", "{'q': \"#: - off\"}", "1e3", "null", "\ue000"]
        ),
    )
)
def test_any_text_is_read_back_equal(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("saved") / "config.yaml"
    config = MispoConfig(model=ModelConfig(preset="micro", path=None), data=DataConfig(task="count_bits"))
    config.data.prompt = config.tracking.project = text
    config.data.task_args = {"words": [text]}
    config.eval.sets = {"a": EvalSetConfig(path=text)}
    save_config(config, path)
    assert config_from_file(path, []) == config


def test_entries_are_read_back_equal(tmp_path: Path) -> None:
    config = load_config(["recipe=paper", "data.mixture.a.path=a.jsonl", "eval.sets.b.path=b.jsonl"])
    config.data.mixture["a"].prompt = "${not an interpolation}"
    save_config(config, tmp_path / "config.yaml")
    back = config_from_file(tmp_path / "config.yaml", ["data.mixture.a.weight=2"])
    assert back.data.mixture["a"] == MixtureSourceConfig(path="a.jsonl", prompt="${not an interpolation}", weight=2.0)
    assert dict(changed_keys(back, config)) == {"data.mixture.a.weight": 2.0}


def saved(folder: Path, *overrides: str) -> Path:
    save_config(load_config(["recipe=quickstart", "seed=5", *overrides]), folder / "config.yaml")
    return folder / "config.yaml"


def test_single_keys_are_changed_on_a_resume(tmp_path: Path) -> None:
    path = saved(tmp_path)
    assert config_from_file(path, ["trainer.steps=99"]).trainer.steps == 99
    words = ["router.replay=off", "alarms.action=off", "critic.value_clip=null", "tracking.project='a = b'"]
    changed = config_from_file(path, [*words, "algorithm.filter.token_bounds=[0.4,3]", "algorithm.advantage.lam=0.9"])
    assert (changed.router.replay, changed.alarms.action) == ("off", "off")
    assert changed.tracking.project == "a = b"
    assert dict(changed_keys(changed, config_from_file(path, []))) == {
        "algorithm.filter.token_bounds": [0.4, 3.0],
        "algorithm.advantage.lam": 0.9,
        "alarms.action": "off",
        "tracking.project": "a = b",
    }


def test_parts_are_changed_on_a_resume(tmp_path: Path) -> None:
    path = saved(tmp_path, "algorithm.filter.token_bounds=[0.4,3]")
    changed = config_from_file(
        path,
        [
            *("algorithm.filter.target_steps=9", "algorithm/filter=quantile", "algorithm/loss=gspo"),
            *("algorithm/correction=tis", "algorithm.correction.cap=5"),
        ],
    )
    assert changed.algorithm.filter == Quantile(target_steps=9)
    assert changed.algorithm.loss == Gspo()
    assert changed.algorithm.correction == Tis(cap=5.0)
    same = config_from_file(path, ["algorithm/filter=bounds"])
    assert getattr(same.algorithm.filter, "token_bounds") == [0.4, 3.0]  # noqa: B009


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe=smoke", "recipe: a resumed run keeps its recipes; override single keys"),
        ("algorithm=grpo", "algorithm: a resumed run keeps its recipes"),
        ("critic={lam: 0.5}", "critic: a resumed run keeps its recipes"),
        ("critic=shared", "critic: is fixed when a run begins; leave it out, or start a new run"),
        ("optimizer=muon", "optimizer: is fixed when a run begins"),
        ("algorithm/advantage=rloo", "algorithm/advantage: is fixed when a run begins"),
        ("critic.model=x/y", "critic.model: is fixed when a run begins"),
        ("model.path=x/y", "model.path: is fixed when a run begins"),
        ("warm_start={steps: 3}", "warm_start: is fixed when a run begins"),
        ("seed=6", "seed: is fixed when a run begins"),
        ("run_dir=x", "run_dir: is fixed when a run begins"),
        ("algorithm/filter=quantle", "algorithm/filter: no filter named 'quantle'; did you mean quantile?"),
        ("trainer.stepps=9", "trainer.stepps: no such key; did you mean trainer.steps?"),
        ("algorithm.filter.ratio=mean", "filter metropolis has it: algorithm/filter=metropolis"),
        ("trainer.steps=-1", "trainer.steps: must be at least 0 (is -1)"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        config_from_file(saved(tmp_path), [override])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("router: {replay: off}", "router.replay: YAML reads a bare off as false"),
        ("trainer: {stepps: 3}", "trainer.stepps: no such key; did you mean trainer.steps?"),
        ("trainer: {steps: many}", "trainer.steps: Value 'many'"),
        ("rollout: {slots: 3}", "rollout.slots: no such key; did you mean engine.slots?"),
        ("algorithm: {filter: {name: quantle}}", "algorithm/filter: no filter named 'quantle'; did you mean quantile?"),
        ("algorithm: {filter: {ratio: mean}}", "algorithm.filter.ratio: filter bounds has no such key"),
        ("data: [", "is no YAML"),
        ("just words", "is no config"),
    ],
)
def test_a_damaged_file_is_answered_with_the_place(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ValueError, match=re.escape(words)):
        config_from_file(tmp_path / "config.yaml", [])


def test_a_directory_without_a_config_is_no_run() -> None:
    with pytest.raises(ValueError, match="this is no run directory"):
        config_from_file(Path("gone/config.yaml"), [])


def test_the_yaml_is_for_people() -> None:
    text = config_yaml(load_config(["data.prompt='Größe: {number}?'"]))
    assert "prompt: 'Größe: {number}?'" in text
    assert text.index("model:") < text.index("seed:")
