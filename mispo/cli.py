"""The `mispo` command: its parser, and which function runs. A command's imports wait until it runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mispo import __version__
from mispo.system.failure import say_bad_input

EPILOG = """examples:
  mispo train                                       the quickstart, on whatever machine this is
  mispo train recipe=smoke seed=1 run_dir=runs/try
  mispo train recipe=quickstart algorithm.filter.trajectory_bounds=[0.99,1.01]
  mispo train -m seed=0,1,2                         a sweep, one process per run
  mispo train --resume runs/try trainer.steps=20
  mispo train --rollouts runs/try/rollouts/step_3.parquet \\
      model.path=runs/try/checkpoints/step_2/actor model.preset=null
  mispo report runs/try
  mispo attribute runs/try                          where its rollouts and its trainer disagree
  mispo attribute runs/try rollout.dtype=bf16       … and where they would"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `mispo` command; exits with 0, 1 (run failed), 2 (bad input) or 130 (Ctrl-C)."""
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
        "--rollouts", nargs="+", default=[], metavar="FILE", help="train on RUN/rollouts/step_N.parquet, one step each"
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
        from mispo.commands.sweep import sweep

        if options.resume or options.dry_run or options.rollouts:
            raise ValueError("-m: cannot be combined with --resume, --rollouts or --dry-run")
        return sweep(options.overrides, config_dir=options.config_dir)
    from mispo.commands.train import train

    return train(
        options.overrides,
        config_dir=options.config_dir,
        resume=options.resume,
        rollouts=options.rollouts,
        dry_run=options.dry_run,
    )


def _report(options: argparse.Namespace) -> int:
    from mispo.commands.report import report

    return report(options.run)


def _attribute(options: argparse.Namespace) -> int:
    from mispo.commands.attribute import attribute

    return attribute(options.run, options.overrides)


if __name__ == "__main__":
    main()
