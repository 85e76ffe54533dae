"""What a command imports before it has something to say."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HEAVY = ("torch", "transformers", "accelerate", "deepspeed", "datasets", "pyarrow", "wandb", "matplotlib")

SCRIPT = """
import json, sys
from mispo.cli import main
imported = {}
for arguments in json.loads(sys.argv[1]):
    try:
        main(arguments)
    except SystemExit as exit:
        imported[" ".join(arguments)] = [exit.code, *(name for name in json.loads(sys.argv[2]) if name in sys.modules)]
with open(sys.argv[3], "w") as file:
    json.dump(imported, file)
"""


def imported_by(commands: Sequence[Sequence[str]], modules: Sequence[str], where: Path) -> dict[str, list[object]]:
    """Exit status and imported modules after each command, all in one new process."""
    out = where / "imported.json"
    arguments = [json.dumps(commands), json.dumps(modules), str(out)]
    done = subprocess.run(
        [sys.executable, "-P", "-c", SCRIPT, *arguments], cwd=where, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def test_help_and_refusals_import_no_torch(tmp_path: Path) -> None:
    helps = [["--help"], ["train", "--help"], ["--version"]]
    refusals = [
        ["train", "trainer.stepps=1"],
        ["train", "trainer.steps=many"],
        ["train", "recipe=smok"],
        ["train", "rollout.samples_per_prompt=0"],
        ["train", "trainer.critic_minibatches=999"],
        ["train", "algorithm.kl=-1", "--dry-run"],
        ["train", "seed=0,1"],
        ["train", "--resume", "gone"],
        ["train", "--config-dir", "gone"],
        ["train", "--rollouts", "gone.parquet"],
        ["train", "-m", "seed=0,1", "trainer.stepps=1"],
        ["train", "-m", "seed=0,1", "recipe=smok"],
        ["attribute", "gone"],
    ]
    found = imported_by([*helps, *refusals], HEAVY, tmp_path)
    assert found == {" ".join(command): [0] for command in helps} | {" ".join(command): [2] for command in refusals}


def test_help_imports_no_hydra(tmp_path: Path) -> None:
    assert imported_by([["train", "--help"]], ("hydra", "omegaconf", "rich"), tmp_path) == {"train --help": [0]}


def test_the_plan_imports_nothing_that_only_a_run_needs(tmp_path: Path) -> None:
    """accelerate is not among them: transformers imports it."""
    modules = ("deepspeed", "datasets", "pyarrow", "wandb", "matplotlib", "reasoning_gym", "peft")
    command = ["train", "--dry-run", "recipe=smoke"]
    assert imported_by([command], modules, tmp_path) == {" ".join(command): [0]}
