"""`mispo train`: a new run, a run that is continued, a run on saved rollouts, or the plan of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from mispo.commands.session import Use, has_checkpoint, session
from mispo.config.load import changed_keys, config_from_file, is_sweep, load_config, recipe_of, save_config
from mispo.config.parts import SeparateCritic
from mispo.config.rules import check_config
from mispo.config.schema import MispoConfig
from mispo.system.failure import rank
from mispo.system.files import replacing
from mispo.system.rundir import RunDir

if TYPE_CHECKING:
    from mispo.run import Run


def train(
    overrides: Sequence[str],
    *,
    config_dir: Path | None = None,
    resume: Path | None = None,
    rollouts: Sequence[str] = (),
    dry_run: bool = False,
) -> int:
    """Train, or print the plan; returns the exit status. ValueError for bad input.

    config_dir: the user's own recipes. resume: directory of the run to continue. rollouts: what followed --rollouts,
    files of saved trajectories and perhaps more overrides.
    """
    if is_sweep(overrides):
        raise ValueError("several values for one key: add -m to run every combination")
    saved, overrides = split_rollouts(rollouts, overrides)
    if saved and resume:
        raise ValueError(
            "--rollouts: cannot be combined with --resume; name the checkpoint with "
            "model.path=RUN/checkpoints/step_N/actor"
        )
    if resume:
        directory = RunDir(resume)
        config = config_from_file(directory.config, overrides)
    else:
        config = load_config(overrides, config_dir)
        directory = run_directory(config, "rollouts" if saved else recipe_of(overrides))
    if saved:
        config = _for_saved(config, saved)
        check_config(config)
    continues = resume is not None or is_same_run(directory, config, saved=bool(saved))
    if dry_run:
        _print_plan(config, directory)
        return 0
    use = Use.CONTINUE if continues else Use.ONCE if saved else Use.BEGIN
    if use is not Use.CONTINUE:
        _save(directory, config)
    return _run(config, directory, saved, use)


def split_rollouts(given: Sequence[str], overrides: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Return files of --rollouts and all overrides: argparse takes a key=value behind a file for one more file.

    ValueError for a file that does not exist; of several ranks each has written one, step_N.rank*.parquet.
    """
    files = [Path(item) for item in given if "=" not in item or Path(item).exists()]
    if given and not files:
        raise ValueError(f"--rollouts: {given[0]!r} is no file; give RUN/rollouts/step_N.parquet")
    for file in files:
        if not file.exists() and not any(file.parent.glob(f"{file.stem}.rank*{file.suffix}")):
            raise ValueError(f"--rollouts: no such file {str(file)!r}; give RUN/rollouts/step_N.parquet")
    return files, [*overrides, *(item for item in given if Path(item) not in files)]


def _for_saved(config: MispoConfig, files: Sequence[Path]) -> MispoConfig:
    """Return the config with one step per file, and as many prompts and samples as the files hold."""
    from rollouts.saved import saved_sizes

    if isinstance(config.critic, SeparateCritic) and config.critic.pretrain_steps:
        raise ValueError("critic.pretrain_steps: --rollouts samples nothing to pre-train on; set it to 0")
    prompts, samples = saved_sizes(files)
    rollout = replace(config.rollout, prompts_per_step=prompts, samples_per_prompt=samples)
    return replace(config, rollout=rollout, trainer=replace(config.trainer, steps=len(files)))


def run_directory(config: MispoConfig, name: str) -> RunDir:
    """Return run_dir, or runs/<name>-<date-time>; the choice of the first rank counts."""
    if config.run_dir is not None:
        return RunDir(Path(config.run_dir).expanduser())
    return RunDir(Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}")


def is_same_run(directory: RunDir, config: MispoConfig, *, saved: bool) -> bool:
    """Return whether the same command has begun a run there, which then continues, as when a job queue starts it again.

    saved: the run trains on saved rollouts. ValueError if another run is there, or one without a checkpoint.
    """
    if not directory.metrics.exists():
        return False
    changed = changed_keys(config, config_from_file(directory.config, []))
    if saved:
        reason = "and a run on saved rollouts needs an empty directory; give another run_dir"
    elif changed:
        key = next(iter(changed))
        reason = f"with another {key}; give another run_dir, or `mispo train --resume {directory.root} {key}=…`"
    elif not has_checkpoint(directory):
        reason = "but no checkpoint yet; delete it, or give another run_dir"
    else:
        return True
    raise ValueError(f"run_dir: {directory.root} holds a run already, {reason}")


def _print_plan(config: MispoConfig, directory: RunDir) -> None:
    if rank() == 0:
        from mispo.commands.plan import print_plan

        print_plan(config, directory.root)


def _save(directory: RunDir, config: MispoConfig) -> None:
    """Create the run directory and write config.yaml, on the first rank."""
    if rank() != 0:
        return
    root = directory.root
    try:
        root.mkdir(parents=True, exist_ok=True)
        with replacing(directory.config) as temporary:  # other ranks may be reading it
            save_config(config, temporary)
        directory.error.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: cannot write to {root} ({error.strerror}); give another run_dir") from error


def _run(config: MispoConfig, directory: RunDir, saved: Sequence[Path], use: Use) -> int:
    def build() -> Run:
        from mispo.build.run import build_run

        run = build_run(config, directory.root, resume=use is Use.CONTINUE, saved=saved)
        if use is Use.CONTINUE:  # only now: what the build refuses must not stay in config.yaml
            _save(directory, config)
        return run

    def work(run: Run) -> None:
        from mispo.loop import train

        train(run)

    return session(directory, use, build, work, _finish)


def _finish(run: Run) -> None:
    """Show the curve and where everything is."""
    if not run.ranks.first:
        return
    from mispo.monitor.console import make_console, summary
    from mispo.monitor.report.report import write_report
    from mispo.monitor.rows import before_after, read_rows, references
    from mispo.monitor.terminal_curve import curve

    console, directory = make_console(), RunDir(run.directory)
    rows = read_rows(directory.metrics)
    console.print()
    console.print(curve(rows), highlight=False, markup=False)
    console.print()
    before, after = before_after(rows)
    if before and after:
        console.print(summary(before, after, references(rows)))
        console.print()
    for name, path in (
        ("report", write_report(directory.root)),
        ("checkpoint", run.last_checkpoint / "actor" if run.last_checkpoint else "none"),
        ("metrics", directory.metrics),
    ):
        console.print(f"{name:<11}{path}", highlight=False, markup=False, soft_wrap=True)
