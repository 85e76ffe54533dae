"""The command line. Imports torch only when a command needs it, so that a typo is answered at once."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from mispo import __version__
from mispo.config.check import check_config
from mispo.config.load import (
    changed_keys,
    config_from_file,
    expand_sweep,
    is_sweep,
    load_config,
    recipe_of,
    save_config,
)
from mispo.config.schema import MispoConfig
from mispo.system.failure import rank, say, say_bad_input, say_failure
from mispo.system.files import replacing
from mispo.system.interrupt import exit_at_once

if TYPE_CHECKING:
    from mispo.run import Run

EPILOG = """examples:
  mispo train                                       the quickstart, on whatever machine this is
  mispo train recipe=smoke seed=1 run_dir=runs/try
  mispo train recipe=quickstart algorithm.filter.trajectory_bounds=[0.99,1.01]
  mispo train -m seed=0,1,2                         a sweep, one process per run
  mispo train --resume runs/try trainer.steps=20
  mispo train --replay runs/try/rollouts/step_3.parquet model.path=runs/try/checkpoints/step_2/actor model.preset=null
  mispo report runs/try
  mispo attribute runs/try                          where its rollouts and its trainer disagree
  mispo attribute runs/try rollout.dtype=bf16       … and where they would"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `mispo` command; exits with 0, 1 (run failed), 2 (bad input) or 130 (Ctrl-C)."""
    parser = _parser()
    options, extra = parser.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    unknown = [argument for argument in extra if argument.startswith("-")]
    if unknown:
        parser.error(f"unknown option {unknown[0]}; settings are given as key=value")
    if extra and options.command is not _train:
        parser.error(f"unknown argument {extra[0]}")
    if extra:
        options.overrides += extra  # argparse gives up on settings that follow an option
    try:
        sys.exit(options.command(options))
    except ValueError as error:
        say_bad_input(error)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mispo", description="RL for Mixture-of-Experts reasoning models with MIS-PO.", allow_abbrev=False,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"mispo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train", help="train, continue, or print the plan", allow_abbrev=False,
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    train.add_argument("overrides", nargs="*", metavar="key=value", help="recipe=NAME, groups and single keys")
    train.add_argument("-m", "--multirun", action="store_true", help="run every combination of a=1,2 b=x,y")
    train.add_argument("--dry-run", action="store_true", help="print config, batch arithmetic and memory plan")
    train.add_argument("--resume", type=Path, metavar="RUN", help="continue the run in this directory")
    train.add_argument(
        "--replay", nargs="+", metavar="FILE", help="train on RUN/rollouts/step_N.parquet, one step each"
    )
    train.add_argument("--config-dir", type=Path, metavar="DIR", help="your own recipes: DIR/recipe/NAME.yaml")
    for where in (parser, train):
        # The `deepspeed` launcher adds it, before the command; what counts is the environment.
        where.add_argument("--local_rank", "--local-rank", type=int, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    train.set_defaults(command=_train)
    report = commands.add_parser("report", help="write report.html and curve.png of a run again")
    report.add_argument("run", type=Path, metavar="RUN")
    report.set_defaults(command=_report)
    attribute = commands.add_parser(
        "attribute", help="sample from a run's last checkpoint and say where rollout and trainer disagree"
    )
    attribute.add_argument("run", type=Path, metavar="RUN")
    attribute.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="what if it were so; nothing is changed"
    )
    attribute.set_defaults(command=_attribute)
    return parser


def _train(options: argparse.Namespace) -> int:
    if options.multirun:
        return _sweep(options)
    if is_sweep(options.overrides):
        raise ValueError("several values for one key: add -m to run every combination")
    files, overrides = _replay_files(options)
    if options.resume:
        config = config_from_file(options.resume / "config.yaml", options.overrides)
        directory = options.resume
    else:
        config = load_config(overrides, options.config_dir)
        directory = run_directory(config, "replay" if files else recipe_of(overrides))
    if files:
        from mispo.replay import replay_config

        config = replay_config(config, files)
        check_config(config)
    resume = options.resume is not None or _is_the_same_run(directory, config, replay=bool(files))
    if options.dry_run:
        if rank() == 0:
            from mispo.commands.plan import print_plan

            print_plan(config, directory)
        return 0
    _prepare(directory, config, resume=resume)
    return _run(config, directory, resume=resume, replay=files)


def _replay_files(options: argparse.Namespace) -> tuple[list[Path], list[str]]:
    """Files of --replay, and all overrides: argparse takes a key=value that follows a file for one more file."""
    given = options.replay or []
    files = [Path(item) for item in given if "=" not in item or Path(item).exists()]
    if given and not files:
        raise ValueError(f"--replay: {given[0]!r} is no file; give RUN/rollouts/step_N.parquet")
    if given and options.resume:
        raise ValueError(
            "--replay: goes not with --resume; name the checkpoint with model.path=RUN/checkpoints/N/actor"
        )
    return files, [*options.overrides, *(item for item in given if Path(item) not in files)]


def run_directory(config: MispoConfig, recipe: str) -> Path:
    """run_dir, or runs/<recipe>-<date-time> (of several ranks the first one's choice counts)."""
    if config.run_dir is not None:
        return Path(config.run_dir).expanduser()
    return Path("runs") / f"{recipe}-{datetime.now():%Y%m%d-%H%M%S}"


def _is_the_same_run(directory: Path, config: MispoConfig, *, replay: bool) -> bool:
    """Whether this very command has begun a run there before, which then goes on: what a job queue does after a kill.

    ValueError if the run there is another one, or has no checkpoint to go on from.
    """
    if not (directory / "metrics.jsonl").exists():
        return False
    changed = changed_keys(config, config_from_file(directory / "config.yaml", []))
    if replay:
        reason = "and a replay needs a directory of its own; give another run_dir"
    elif changed:
        key = next(iter(changed))
        reason = f"with another {key}; give another run_dir, or `mispo train --resume {directory} {key}=…`"
    elif not any((directory / "checkpoints").glob("step_*/state.json")):
        reason = "but no checkpoint yet; delete it, or give another run_dir"
    else:
        return True
    raise ValueError(f"run_dir: {directory} holds a run already, {reason}")


def _prepare(directory: Path, config: MispoConfig, *, resume: bool) -> None:
    """Create the run directory and write config.yaml, on the first rank."""
    if rank() != 0:
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with replacing(directory / "config.yaml") as temporary:  # other ranks may be reading it
            save_config(config, temporary)
        (directory / "error.txt").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"run_dir: cannot write to {directory} ({error.strerror}); give another run_dir") from error


def _run(config: MispoConfig, directory: Path, *, resume: bool, replay: Sequence[Path] = ()) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    run: Run | None = None
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from mispo.build.run import build_run
        from mispo.loop import train

        run = build_run(config, directory, resume=resume, saved=replay)
        train(run)
        run.close(0)
        if run.ranks.first:
            _finish(run)
        return 0
    except KeyboardInterrupt:
        exit_at_once()
        if run:
            run.close(130)
        elif not resume:
            _remove_if_unused(directory)
        if rank() == 0:
            say(_interrupted(run, directory))
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        if run:
            run.close(1)
        if isinstance(error, ValueError):
            if run is None and not resume:
                _remove_if_unused(directory)
            raise
        say_failure(error, run.directory if run else directory, run.last_checkpoint if run else None)
        return 1


def _remove_if_unused(directory: Path) -> None:
    """A run that never began leaves no directory behind, unless there was something in it before."""
    ours = {"config.yaml", "reference", "base"}
    if rank() == 0 and {path.name for path in directory.iterdir()} <= ours:
        shutil.rmtree(directory)


def _finish(run: Run) -> None:
    from mispo.monitor.console import make_console, summary
    from mispo.monitor.report.report import write_report
    from mispo.monitor.rows import before_after, read_rows, references
    from mispo.monitor.terminal_curve import curve

    console = make_console()
    rows = read_rows(run.directory / "metrics.jsonl")
    console.print()
    console.print(curve(rows), highlight=False, markup=False)
    console.print()
    before, after = before_after(rows)
    if before and after:
        console.print(summary(before, after, references(rows)))
        console.print()
    report = write_report(run.directory)
    for name, path in (
        ("report", report),
        ("checkpoint", run.last_checkpoint / "actor" if run.last_checkpoint else "none"),
        ("metrics", run.directory / "metrics.jsonl"),
    ):
        console.print(f"{name:<11}{path}", highlight=False, markup=False, soft_wrap=True)


def _interrupted(run: Run | None, directory: Path) -> str:
    if run is None:
        return "interrupted before the first step; nothing to resume"
    if run.last_checkpoint is None:
        return f"interrupted after step {run.step}; no checkpoint yet, so start anew"
    return (
        f"interrupted after step {run.step}; the last checkpoint is {run.last_checkpoint.name}\n"
        f"continue with: mispo train --resume {directory}"
    )


def _sweep(options: argparse.Namespace) -> int:
    """Every combination in a process and run directory of its own, one after the other."""
    if "WORLD_SIZE" in os.environ:
        raise ValueError("-m: not under a launcher (torchrun, accelerate, deepspeed); start its runs one by one")
    if options.resume or options.dry_run or options.replay:
        raise ValueError("-m: goes with none of --resume, --replay, --dry-run")
    jobs = expand_sweep(options.overrides)
    for job in jobs:
        load_config(job, options.config_dir)  # all of them are sound before the first one starts
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    given = [item.partition("=")[2] for item in jobs[0] if item.startswith("run_dir=")]
    parent = Path(given[0] if given else f"runs/{recipe_of(jobs[0])}-{stamp}")
    failed = []
    for number, job in enumerate(jobs):
        directory = parent / str(number)
        plain = [item for item in job if not item.startswith("run_dir=")]
        say(f"[{number + 1}/{len(jobs)}] {' '.join(plain)} → {directory}")
        command = [sys.executable, "-P", "-m", "mispo.cli", "train", *plain, f"run_dir={directory}"]
        if options.config_dir:
            command += ["--config-dir", str(options.config_dir)]
        status = _wait(subprocess.Popen(command))
        if status == 130:
            return 130
        if status:
            failed.append(str(directory))
    if failed:
        say(f"error: {len(failed)} of {len(jobs)} runs failed: {', '.join(failed)}")
    return 1 if failed else 0


def _wait(process: subprocess.Popen[bytes]) -> int:
    """The exit status of a run of a sweep; a signal to the sweep is a signal to its run."""
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the terminal has told the run as well: it says how far it came and ends


def _report(options: argparse.Namespace) -> int:
    from mispo.monitor.report.report import write_report

    say(str(write_report(options.run)))
    return 0


def _attribute(options: argparse.Namespace) -> int:
    config = config_from_file(options.run / "config.yaml", options.overrides)
    if not any((options.run / "checkpoints").glob("step_*/state.json")):
        raise ValueError(
            f"{options.run}: no checkpoint yet; attribution needs one, written every checkpoint.every steps"
        )
    kept = config_from_file(options.run / "config.yaml", []).rollout.staleness
    if config.rollout.staleness > kept:
        raise ValueError(f"rollout.staleness: {config.rollout.staleness}, but the run kept older weights up to {kept}")
    signal.signal(signal.SIGTERM, _terminate)
    run: Run | None = None
    try:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        from mispo.build.run import build_run
        from mispo.loop import attribute_next
        from mispo.monitor.advice import paragraph
        from mispo.monitor.console import make_console
        from mispo.monitor.report.attribution import attribution_table, write_attribution

        run = build_run(config, options.run, resume=True, tracked=False)
        step, attribution, standing = attribute_next(run)
        if run.ranks.first:
            path = write_attribution(options.run, step, attribution, standing, options.overrides)
            console = make_console()
            console.print(attribution_table(attribution), highlight=False)
            console.print(paragraph(standing), markup=False, highlight=False)
            console.print(f"written to {path}", markup=False, highlight=False, soft_wrap=True)
    except BaseException as error:
        if run:
            run.close(1)
        if isinstance(error, RuntimeError | OSError):
            say(f"error: {error}")
            return 1
        if not isinstance(error, KeyboardInterrupt):
            raise
        exit_at_once()
        if rank() == 0:
            say("interrupted; nothing was written")
        return 130
    run.close(0)
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
