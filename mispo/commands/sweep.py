"""`mispo train -m`: every combination of several values, or what a sweeper of Hydra's ecosystem tries."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig

from mispo.commands.sweep_loader import SweepLoader
from mispo.config.load import parse_overrides, recipe_of
from mispo.config.registry import no_choice, register
from mispo.monitor.rows import EVAL_KEY, read_rows
from mispo.system.failure import say
from mispo.system.files import json_line
from mispo.system.rundir import RunDir


def sweep(overrides: Sequence[str], *, config_dir: Path | None = None) -> int:
    """Run all jobs of a sweep, each in its process and its run directory; returns 0, 1 if a run failed, 130 on Ctrl-C.

    overrides: as for one run, with several values (seed=0,1), and Hydra's own such as hydra/sweeper=optuna. config_dir:
    the user's own recipes. ValueError for bad input, with the default sweeper before the first job starts.
    """
    if "WORLD_SIZE" in os.environ:
        raise ValueError("-m: not under a launcher (torchrun, accelerate, deepspeed); start its runs one by one")
    if config_dir is not None and not config_dir.is_dir():
        raise ValueError(f"--config-dir: no directory {str(config_dir)!r}")
    parent, overrides = _split_directory(overrides)
    earlier = len(_outcomes(parent))
    try:
        _multirun(parent, overrides, config_dir)
    except KeyboardInterrupt:
        return 130
    except HydraException as error:
        raise ValueError(_reason(error)) from error
    finally:
        _tidy(parent)
    outcomes = _outcomes(parent)[earlier:]
    failed = [row["run"] for row in outcomes if row["status"]]
    if failed:
        say(f"error: {len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


def run(config: DictConfig, *, loader: SweepLoader) -> float | None:
    """Run one job in a process; returns its result, None if it failed. Any launcher of Hydra's may call this.

    KeyboardInterrupt if the process was interrupted.
    """
    hydra = HydraConfig.get()
    directory = Path(hydra.sweep.dir) / str(hydra.sweep.subdir)
    overrides = list(hydra.overrides.task)
    count = hydra.sweeper.get("n_trials") or len(loader.checked)
    say(f"[{hydra.job.num + 1}/{count}] {' '.join(overrides)} → {directory}")
    command = [sys.executable, "-P", "-m", "mispo.cli", "train", *overrides, f"run_dir={directory}"]
    if loader.config_dir:
        command += ["--config-dir", str(loader.config_dir)]
    status = _wait(subprocess.Popen(command))
    name, value = result(read_rows(RunDir(directory).metrics)) if status == 0 else (None, None)
    row = {"run": str(directory), "overrides": overrides, "status": status, "metric": name, "value": value}
    with _record(directory.parent).open("a", encoding="utf-8") as file:
        file.write(json_line(row))
    if status == 130:
        raise KeyboardInterrupt
    return value


def result(rows: Sequence[Mapping[str, Any]]) -> tuple[str, float | None]:
    """Return name and value of what a sweeper optimises: of the last row the first greedy accuracy, else the reward."""
    last = rows[-1]
    greedy = [key for key in last if EVAL_KEY.fullmatch(key) and key.endswith("/greedy")]
    name = greedy[0] if greedy else "reward/mean"
    return name, last.get(name)


def _split_directory(overrides: Sequence[str]) -> tuple[Path, list[str]]:
    """The directory of the sweep (run_dir, or runs/<recipe>-<date-time>), and the overrides without it."""
    parsed = parse_overrides(overrides)
    given = [override for override in parsed if override.key_or_group == "run_dir"]
    others = [str(override.input_line) for override in parsed if override not in given]
    if any(override.is_sweep_override() for override in given):
        raise ValueError("run_dir: give one directory; the runs of a sweep get 0, 1, … in it")
    if given:
        return Path(str(given[-1].value())).expanduser(), others
    recipes = [override for override in parsed if override.key_or_group == "recipe"]
    name = "sweep" if any(recipe.is_sweep_override() for recipe in recipes) else recipe_of(others)
    return Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}", others


def _multirun(parent: Path, overrides: Sequence[str], config_dir: Path | None) -> None:
    register()
    searched = [f"hydra.searchpath=[file://{config_dir.resolve()}]"] if config_dir else []
    with initialize_config_module("recipes", version_base="1.3", job_name="mispo"):
        hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    loader = SweepLoader(hydra.config_loader, parent, config_dir)
    hydra.config_loader = loader
    hydra.multirun("config", partial(run, loader=loader), [*overrides, *searched], with_log_configuration=False)


def _record(parent: Path) -> Path:
    """The file with one line per job that has ended: run, overrides, status, metric and value (see `result`)."""
    return parent / "sweep.jsonl"


def _outcomes(parent: Path) -> list[dict[str, Any]]:
    return read_rows(_record(parent)) if _record(parent).exists() else []


def _tidy(parent: Path) -> None:
    """Remove what Hydra's basic sweeper has written, which lacks the single keys; and a directory without runs."""
    (parent / "multirun.yaml").unlink(missing_ok=True)
    if parent.is_dir() and not any(parent.iterdir()):
        parent.rmdir()


def _wait(process: subprocess.Popen[bytes]) -> int:
    """Return the exit status of a run; a signal to the sweep is a signal to its run."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    try:
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                continue  # The terminal has signalled the run as well: it says how far it came and ends.
    finally:
        signal.signal(signal.SIGTERM, before)


def _reason(error: HydraException) -> str:
    """What does not fit together, in one line."""
    if not isinstance(error, MissingConfigException) or not error.options:
        return " ".join(str(error).splitlines()[:2])
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    if group.startswith("hydra/"):
        options = ", ".join(error.options)
        return f"{group}: no {group} named {name!r}; is its package installed? (there are {options})"
    return no_choice(group, name, list(error.options))
