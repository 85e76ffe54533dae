"""What a sweep tells Hydra, without starting a run."""

from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from mispo.commands.sweep import result
from mispo.commands.sweep_loader import SweepLoader
from mispo.config.registry import register


@pytest.fixture
def loader(tmp_path: Path) -> SweepLoader:
    register()
    with initialize_config_module("recipes", version_base="1.3", job_name="mispo"):
        inner = GlobalHydra.instance().config_loader()
    return SweepLoader(inner, tmp_path / "sweep", None)


def test_the_result_is_the_greedy_accuracy_of_the_last_row_else_its_reward() -> None:
    before = {"step": 0, "eval/count_bits/greedy": 0.1}
    assert result([before, {"step": 1, "reward/mean": 0.5}]) == ("reward/mean", 0.5)
    evaluated = {"step": 2, "eval/count_bits/avg@4": 0.6, "eval/count_bits/greedy": 0.7, "eval/hard/greedy": 0.2}
    assert result([before, evaluated]) == ("eval/count_bits/greedy", 0.7)


def test_the_config_of_a_sweep_has_all_overrides_and_writes_nothing_but_runs(loader: SweepLoader) -> None:
    overrides = ["recipe=smoke", "seed=0,1", "trainer.actor_lr=interval(0,1)", "hydra.sweeper.max_batch_size=1"]
    hydra = loader.load_configuration("config", overrides, RunMode.MULTIRUN).hydra
    assert hydra.overrides.task == overrides[:3]
    assert hydra.sweeper.max_batch_size == 1
    assert hydra.sweep.dir == str(loader.parent)
    assert hydra.output_subdir is None
    assert hydra.job_logging.root is None


def test_a_job_is_checked_as_a_single_run_is(loader: SweepLoader) -> None:
    master = loader.load_configuration("config", ["recipe=smoke", "seed=0,1"], RunMode.MULTIRUN)
    with pytest.raises(ValueError, match=r"trainer\.stepps: no such key; did you mean trainer\.steps\?"):
        loader.load_sweep_config(master, ["recipe=smoke", "trainer.stepps=1"])
    assert not loader.checked
    job = loader.load_sweep_config(master, ["recipe=smoke", "seed=1"])
    assert job.hydra.overrides.task == ["recipe=smoke", "seed=1"]
    assert loader.checked == {("recipe=smoke", "seed=1")}
