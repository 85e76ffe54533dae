"""A setting that changes nothing is a lie: runs on real parts read every one that their config has."""

import json
from pathlib import Path

from support.data_files import jsonl
from support.reads import Setting
from support.runs import MICRO, python

UNREAD = {
    ("DataConfig", "split"),  # of a file or a data set on the hub; here such a source is one of a mixture
}
"""Settings that none of these runs reads."""

WITH_CRITIC = [
    "algorithm=mispo_quantile",
    "algorithm.dynamic_sampling=true",
    "rollout.lag=1",
    "alarms.min_acceptance=1",
    "eval.sets.small.task=count_bits",
    "eval.sets.small.task_args.max_n=63",
    "eval.sets.small.prompt='ones in {number}?'",
    "eval.sets.small.size=4",
    "trainer.steps=2",
]
"""Separate critic, quantile filter, a lag, an alarm, an evaluation set of a generated task."""

WITH_GROUPS = [
    "algorithm=grpo",
    "algorithm.kl=0.01",
    "algorithm.overlong.share=0.2",
    "critic=none",
    "optimizer=muon",
    "warm_start.steps=0",
    "model.lora.rank=2",
    "router.replay=rollout",
    "data.task=null",
    "data.task_args={}",
    "tracking.wandb=offline",
    "trainer.steps=1",
]
"""Groups, KL, adapters, router replay, and a mixture of a generated task and a file."""


def test_every_setting_is_read(tmp_path: Path) -> None:
    """By at least one of the runs; each reads all of its parts."""
    mixture = [
        "data.mixture={bits: {task: count_bits, task_args: {max_n: 63}, prompt: '\"{number}?\"', weight: 2},"
        f" rows: {{path: {jsonl(tmp_path / 'rows.jsonl', [{'q': f'{n}?', 'a': str(n)} for n in range(40)])},"
        " prompt: '\"{q}\"', answer: a}}",
        f"eval.sets.file={{path: {tmp_path / 'rows.jsonl'}, prompt: '\"{{q}}\"', answer: a, samples: 1}}",
    ]
    runs = [settings(tmp_path, "critic", WITH_CRITIC), settings(tmp_path, "groups", [*WITH_GROUPS, *mixture])]
    declared = runs[0][0] | runs[1][0]
    read = runs[0][1] | runs[1][1]
    assert declared - read == UNREAD


def settings(folder: Path, name: str, overrides: list[str]) -> tuple[set[Setting], set[Setting]]:
    """(declared, read) in one run."""
    script, out = str(Path(__file__).with_name("settings_script.py")), folder / f"{name}.json"
    done = python(script, str(out), *MICRO, f"run_dir={folder / name}", *overrides, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads(out.read_text())
    declared, read = ({(section, field) for section, field in found[key]} for key in ("declared", "read"))
    return declared, read
