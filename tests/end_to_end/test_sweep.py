"""`mispo train -m` as a user starts it: Hydra's basic sweeper, and one that a recipe names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from support.runs import MICRO, mispo, rows_of

SWEEPER = '''
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper


@dataclass
class Settings:
    _target_: str = "hydra_plugins.climber.Climber"
    n_trials: int = 2
    out: str = "???"


ConfigStore.instance().store(group="hydra/sweeper", name="climber", node=Settings, provider="climber")


class Climber(Sweeper):
    """Tries seed=0, and from then on one more than before; writes down what the jobs returned."""

    def __init__(self, n_trials, out):
        self.n_trials, self.out = n_trials, out

    def setup(self, *, hydra_context, task_function, config):
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments):
        with open(self.out, "w") as file:
            for trial in range(self.n_trials):
                job = [*arguments, f"seed={trial}", f"trainer.steps={2 - trial}"]
                returned = self.launcher.launch([job], initial_job_idx=trial)
                file.write(f"{returned[0].return_value}\\n")
'''
"""A plugin as a package of Hydra's ecosystem installs it."""

RECIPE = """# @package _global_
defaults:
  - smoke
  - override /hydra/sweeper: climber

hydra:
  sweeper:
    out: returned.txt
"""


def outcomes(parent: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (parent / "sweep.jsonl").read_text().splitlines()]


def test_a_run_that_fails_does_not_stop_the_others_of_a_sweep(tmp_path: Path) -> None:
    given = [*MICRO, "trainer.steps=1", "data.max_prompt_tokens=1,24"]
    done = mispo("train", "-m", *given, f"run_dir={tmp_path}/sweep", cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-2000:]
    said = done.stderr.splitlines()
    plain = " ".join([*MICRO, "trainer.steps=1"])
    for number, tokens in enumerate((1, 24)):
        assert f"[{number + 1}/2] {plain} data.max_prompt_tokens={tokens} → {tmp_path}/sweep/{number}" in said
    assert f"error: 1 of 2 runs failed: {tmp_path}/sweep/0" in said
    rows = rows_of(tmp_path / "sweep/1")
    assert len(rows) == 2
    failed, good = outcomes(tmp_path / "sweep")
    assert (failed["status"], failed["metric"], failed["value"]) == (2, None, None)
    assert good == {
        "run": f"{tmp_path}/sweep/1",
        "overrides": [*MICRO, "trainer.steps=1", "data.max_prompt_tokens=24"],
        "status": 0,
        "metric": "eval/count_bits/greedy",
        "value": rows[-1]["eval/count_bits/greedy"],
    }
    assert {path.name for path in tmp_path.iterdir()} == {"sweep"}
    assert {path.name for path in (tmp_path / "sweep").iterdir()} == {"1", "sweep.jsonl"}
    assert not list(tmp_path.rglob("*.log"))


def test_a_sweeper_that_a_recipe_names_gets_the_results_one_after_the_other(tmp_path: Path) -> None:
    plugin, recipes = tmp_path / "site/hydra_plugins/climber", tmp_path / "mine/recipe"
    for folder in (plugin, recipes):
        folder.mkdir(parents=True)
    (plugin / "__init__.py").write_text(SWEEPER)
    (recipes / "climb.yaml").write_text(RECIPE)
    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = ["recipe=climb", *(item for item in MICRO if not item.startswith("recipe=")), "--config-dir", "mine"]
    done = subprocess.run(
        [sys.executable, "-P", "-m", "mispo.cli", "train", "-m", *given, "run_dir=sweep"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[2/2] recipe=climb" in done.stderr
    first, second = (rows_of(tmp_path / f"sweep/{number}") for number in (0, 1))
    assert [len(first), len(second)] == [3, 2]
    assert first[1]["response_length/mean"] != second[1]["response_length/mean"]
    results = [rows[-1]["eval/count_bits/greedy"] for rows in (first, second)]
    assert [float(line) for line in (tmp_path / "returned.txt").read_text().split()] == results
    assert [row["value"] for row in outcomes(tmp_path / "sweep")] == results
